"""The difference of both sides' sums, where it is small: of the sums it would have few digits.

rise = sum 2^v - 2^u gives log(t_sum / s_sum), and lift = sum 2^w - 2^u the mixture's logarithm.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastkd.kernels import labels as L
from fastkd.kernels import memory as M
from fastkd.kernels import records
from fastkd.kernels import rows as R
from fastkd.kernels import walk as W
from fastkd.kernels.terms import exp, expm1_times

# A difference of both sides' sums below this share of them is summed up by itself: of the sums it
# has three digits at most, and d is then no larger where the student's mass is.
CLOSE = tl.constexpr(2.0**-9)


@triton.jit
def close(stats, lift, temper, WANT: tl.constexpr):
    """Whether the sums lack the digits of a difference; of w too, more so at an order near 0."""
    few = tl.abs(stats.t_sum - stats.s_sum) < stats.s_sum * CLOSE
    if records.MIXTURE & WANT:
        most = tl.where(tl.abs(temper.a) < 1 / 16, CLOSE * 32, CLOSE)
        few |= tl.abs(lift) < stats.s_sum * most
    return few


@triton.jit
def by_sums(stats, WANT: tl.constexpr):
    """(rise, lift) by the sums, which serves where they are not close."""
    lift = tl.zeros_like(stats.s_sum)
    if records.MIXTURE & WANT:
        lift = stats.mixture * tl.exp2(stats.mixture_max) - stats.s_sum
    return stats.t_sum - stats.s_sum, lift


@triton.jit
def of_tile(z, y, stats, temper, SAME: tl.constexpr, WANT: tl.constexpr):
    """(rise, lift) of a tile, relative to the maxima of stats.

    By natural exponents, and x by z - y: what the sweeps before and after it compute likewise, a
    compiler would keep of a whole row, which may not even be close.
    """
    dz, dy = z - stats.s_max, y - stats.t_max
    u, v = dz * temper.s_rate, dy * temper.t_rate
    x = (dz - dy) * -temper.s_rate if SAME else v - u
    q = exp(u)
    rise = tl.sum(expm1_times(q, x, exp(v)), 1, keep_dims=True)
    lift = tl.zeros_like(rise)
    if records.MIXTURE & WANT:
        low = tl.maximum(u, R.FLOOR)
        w = low + temper.a * (tl.maximum(v, R.FLOOR) - low)
        lift = tl.sum(expm1_times(q, temper.a * x, exp(w)), 1, keep_dims=True)
    return rise, lift


@triton.jit
def step(found, tile, sides, stats, FACTS: tl.constexpr):
    z = M.load(sides.student, tile.at, tile.inside, "")
    y = M.load(sides.teacher, tile.at, tile.inside, "")
    z, y = L.others(z, y, tile.at, sides.temper)
    rise, lift = of_tile(z, y, stats, sides.temper, FACTS.SAME, FACTS.WANT)
    return records.Differences(found.rise + rise, found.lift + lift)


@triton.jit
def swept(sides, stats, stretch, LANES: tl.constexpr, FACTS: tl.constexpr):
    """(rise, lift) of a piece of a row, in a sweep of its own, which few rows need."""
    zero = tl.zeros([LANES, 1], tl.float32)
    found = records.Differences(zero, zero)
    found = W.walk(found, stretch, sides, stats, FACTS, step, True)
    return tl.sum(found.rise), tl.sum(found.lift)
