"""Building blocks of every kernel: row statistics that merge, and what is derived from them.

Tiles are [lanes, columns] in fp32, z of the student and y of the teacher; quantities of a row are
scalars or [lanes, 1]. Exponentials and logarithms are to base 2, with 1 / T folded into a scale.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastkd.kernels.arithmetic import LN2, LOG2E, log1p, log2, product_sum, reciprocal
from fastkd.kernels.records import (
    AGAIN,
    ENTROPY,
    GAP,
    KL,
    MEAN,
    MIXTURE,
    SCALE_SLOPE,
    TEACHER_ENTROPY,
    UNIT,
    Row,
    Statistics,
    replace,
)
from fastkd.kernels.terms import expm1_times

# Below every maximum: a piece of a row that is masked throughout has exponentials of 0, not NaN.
FLOOR = tl.constexpr(-1e30)

# The sum of a saturated row: its maximum has nearly all of the probability, and in its gradient two
# numbers nearly cancel, its slope and the mean of all slopes.
SATURATED = tl.constexpr(1.1)
# Scaled logits of this size are rounded by up to 64.
HUGE = tl.constexpr(2.0**30)
# Keeps the sum of a row's finite logits finite.
SHARE = tl.constexpr(2.0**-24)
# A KL divergence beyond this is right to 1e-5 from the first sweep's sums, which cancel.
LEAST_KNOWN = tl.constexpr(0.1)
# Where the largest q and the largest p differ by this share of them, so does some q - p at least,
# and what q - p of two exponentials lacks is no more than 2e-5 of that.
APART = tl.constexpr(2.0**-5)

# --- row statistics --------------------------------------------------------------------------


@triton.jit
def empty(LANES: tl.constexpr):
    """The neutral element."""
    zero = tl.zeros([LANES, 1], tl.float32)
    floor = zero + FLOOR
    return Statistics(
        floor, floor, floor / 10, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero,
    )  # fmt: skip


@triton.jit
def move(stats, s_max, t_max, temper, WANT: tl.constexpr):
    """The same sums relative to maxima that are as high or higher."""
    ds, dt = (stats.s_max - s_max) * temper.s_scale, (stats.t_max - t_max) * temper.t_scale
    moved = shift(stats, s_max, t_max, ds, dt, temper, WANT)
    rise = stats.rise * tl.exp2(dt)
    rise += expm1_times(moved.s_sum, (dt - ds) * LN2, stats.s_sum * tl.exp2(dt))
    lift = stats.lift
    if MIXTURE & WANT:
        dw = temper.a * (dt - ds)
        factor = tl.exp2(ds + dw)
        lift = lift * factor + expm1_times(moved.s_sum, dw * LN2, stats.s_sum * factor)
    return replace(moved, rise=rise, lift=lift)


@triton.jit
def shift(stats, s_max, t_max, ds, dt, temper, WANT: tl.constexpr):
    """The same sums of u + ds and v + dt."""
    fs, ft = tl.exp2(ds), tl.exp2(dt)
    mixture_max, gap, unit = stats.mixture_max, stats.gap, stats.unit
    s_entropy, t_entropy, total = stats.s_entropy, stats.t_entropy, stats.total
    if GAP & WANT:
        gap = tl.where(fs > 0, fs * (gap + stats.s_sum * (ds - dt)), 0.0)
    elif KL & WANT:
        gap = ft * (gap + stats.t_sum * (dt - ds))
        if AGAIN & WANT == 0:
            gap = tl.where(ft > 0, gap, 0.0)
    if MIXTURE & WANT:
        moved = mixture_max + ds + temper.a * (dt - ds)
        mixture_max = tl.where(stats.mixture > 0, moved, FLOOR / 10)
    if UNIT & WANT:
        unit *= tl.exp2((stats.s_max - s_max) * LOG2E)
    if MEAN & WANT:
        total += stats.share * (stats.s_max - s_max)
    if (ENTROPY + SCALE_SLOPE) & WANT:
        s_entropy = tl.where(fs > 0, fs * (s_entropy + stats.s_sum * ds), 0.0)
    if TEACHER_ENTROPY & WANT:
        t_entropy = tl.where(ft > 0, ft * (t_entropy + stats.t_sum * dt), 0.0)
    return replace(
        stats, s_max=s_max, t_max=t_max, mixture_max=mixture_max, s_sum=stats.s_sum * fs,
        t_sum=stats.t_sum * ft, gap=gap, s_entropy=s_entropy, t_entropy=t_entropy, unit=unit,
        total=total,
    )  # fmt: skip


@triton.jit
def measure(z, u, v, inside, s_max, t_max, mixture_max, temper, WANT: tl.constexpr):
    """Statistics [lanes, 1] of a tile, relative to maxima that are as high as its own or higher.

    Masked entries are -inf, inside: their mask. mixture_max: the least that it may come out as.
    """
    q, p = tl.exp2(u), tl.exp2(v)
    zero = tl.zeros([z.shape[0], 1], tl.float32)
    mixture, gap, s_entropy, t_entropy, unit = zero, zero, zero, zero, zero
    total, share = zero, zero
    if GAP & WANT:
        gap = tl.sum(q * tl.where(q > 0, u - v, 0.0), 1, keep_dims=True)
    elif KL & WANT:
        log2_ratio = v - u
        if inside is not None or AGAIN & WANT == 0:
            log2_ratio = tl.where(p > 0, log2_ratio, 0.0)
        gap = tl.sum(p * log2_ratio, 1, keep_dims=True)
    if MIXTURE & WANT:
        # Finite stand-ins for -inf: w is then hugely negative or positive, never NaN.
        low = tl.maximum(u, FLOOR)
        w = low + temper.a * (tl.maximum(v, FLOOR) - low)
        # To a whole number, so that a mixture of equals has the same sums as they.
        mixture_max = tl.maximum(mixture_max, tl.floor(tl.max(w, 1, keep_dims=True) + 0.5))
        mixture = tl.sum(tl.exp2(w - mixture_max), 1, keep_dims=True)
    if UNIT & WANT:
        unit = tl.sum(tl.exp2((z - s_max) * LOG2E), 1, keep_dims=True)
    if MEAN & WANT:
        terms = (z - s_max) * SHARE
        if inside is None:
            share = zero + SHARE * z.shape[1]
        else:
            terms = tl.where(inside, terms, 0.0)
            share = tl.sum(tl.where(inside, SHARE, 0.0), 1, keep_dims=True)
        total = tl.sum(terms, 1, keep_dims=True)
    if (ENTROPY + SCALE_SLOPE) & WANT:
        s_entropy = tl.sum(tl.where(q > 0, q * u, 0.0), 1, keep_dims=True)
    if TEACHER_ENTROPY & WANT:
        t_entropy = tl.sum(tl.where(p > 0, p * v, 0.0), 1, keep_dims=True)
    return Statistics(
        s_max=s_max, t_max=t_max, mixture_max=mixture_max, s_sum=tl.sum(q, 1, keep_dims=True),
        t_sum=tl.sum(p, 1, keep_dims=True), mixture=mixture, gap=gap, s_entropy=s_entropy,
        t_entropy=t_entropy, unit=unit, total=total, share=share, rise=zero, lift=zero,
    )  # fmt: skip


@triton.jit
def product(x, y):
    """x y, rounded: the maximum keeps a compiler from carrying its digits into a sum."""
    return tl.maximum(x * y, FLOOR)


@triton.jit
def bounded(scale, most):
    """The scale, or less, so that the maximum's product is rounded by less than 64.

    Of logits beyond, neighbours differ by more than that, and a greater scale changes no sum.
    """
    return tl.minimum(scale, tl.abs(reciprocal(most)) * HUGE)


@triton.jit
def add(stats, z, y, inside, temper, WANT: tl.constexpr):
    """Statistics [lanes, 1] with a tile added; `rebase` them at the end.

    They are relative to the rounded products of maxima and scales: so that an exponent is a single
    operation, with a single rounding.
    """
    s_max = tl.maximum(stats.s_max, tl.max(z, 1, keep_dims=True))
    t_max = tl.maximum(stats.t_max, tl.max(y, 1, keep_dims=True))
    s_scale, t_scale = bounded(temper.s_scale, s_max), bounded(temper.t_scale, t_max)
    s_top, t_top = product(s_max, s_scale), product(t_max, t_scale)
    ds = product(stats.s_max, s_scale) - s_top
    dt = product(stats.t_max, t_scale) - t_top
    old = shift(stats, s_max, t_max, ds, dt, temper, WANT)
    u, v = product_sum(z, s_scale, -s_top), product_sum(y, t_scale, -t_top)
    new = measure(z, u, v, inside, s_max, t_max, old.mixture_max, temper, WANT)
    return both(old, new, WANT)


@triton.jit
def both(old, new, WANT: tl.constexpr):
    """The statistics of two pieces that have their maxima in common, mixture_max aside."""
    mixture = new.mixture
    if MIXTURE & WANT:
        mixture += old.mixture * tl.exp2(old.mixture_max - new.mixture_max)
    return replace(
        new, s_sum=old.s_sum + new.s_sum, t_sum=old.t_sum + new.t_sum, mixture=mixture,
        gap=old.gap + new.gap, s_entropy=old.s_entropy + new.s_entropy,
        t_entropy=old.t_entropy + new.t_entropy, unit=old.unit + new.unit,
        total=old.total + new.total, share=old.share + new.share,
    )  # fmt: skip


@triton.jit
def of_one_side(stats):
    """Where there is no teacher, its figures are the student's, and the compiler sees it."""
    return replace(stats, t_max=stats.s_max, t_sum=stats.s_sum, t_entropy=stats.s_entropy)


@triton.jit
def rebase(stats, temper, WANT: tl.constexpr):
    """Statistics from `add`, relative to the maxima themselves."""
    s_scale = bounded(temper.s_scale, stats.s_max)
    t_scale = bounded(temper.t_scale, stats.t_max)
    ds = -product_sum(stats.s_max, s_scale, -product(stats.s_max, s_scale))
    dt = -product_sum(stats.t_max, t_scale, -product(stats.t_max, t_scale))
    ds, dt = tl.where(stats.s_sum > 0, ds, 0.0), tl.where(stats.t_sum > 0, dt, 0.0)
    moved = shift(stats, stats.s_max, stats.t_max, ds, dt, temper, WANT)
    mixture = stats.mixture
    if MIXTURE & WANT:  # whose maximum stays a whole number
        mixture *= tl.exp2(ds + temper.a * (dt - ds))
    return replace(
        stats, s_sum=moved.s_sum, t_sum=moved.t_sum, mixture=mixture, gap=moved.gap,
        s_entropy=moved.s_entropy, t_entropy=moved.t_entropy,
    )  # fmt: skip


@triton.jit
def log2_exps(z, y, s_max, t_max, temper):
    """u and v, of a tile that is needed again: the differences from its maxima stay."""
    return (z - s_max) * temper.s_scale, (y - t_max) * temper.t_scale


@triton.jit
def highest(x, other):
    """Of the rows of a tile, and other."""
    return tl.maximum(tl.max(x, 1, keep_dims=True), other)


@triton.jit
def piece(z, y, inside, s_max, t_max, mixture_max, temper, WANT: tl.constexpr):
    """`measure` of a tile that is needed again."""
    u, v = log2_exps(z, y, s_max, t_max, temper)
    return measure(z, u, v, inside, s_max, t_max, mixture_max, temper, WANT)


@triton.jit
def collapse(stats, temper, WANT: tl.constexpr):
    """The statistics of the whole from those of its lanes: scalars."""
    return gather(move(stats, tl.max(stats.s_max), tl.max(stats.t_max), temper, WANT), WANT)


@triton.jit
def gather(stats, WANT: tl.constexpr):
    """The same from lanes that have their maxima in common."""
    mixture_max = FLOOR / 10
    mixture, gap, unit, total, share = 0.0, 0.0, 0.0, 0.0, 0.0
    s_entropy, t_entropy, lift = 0.0, 0.0, 0.0
    if MIXTURE & WANT:
        lift = tl.sum(stats.lift)
        mixture_max = tl.max(stats.mixture_max)
        mixture = tl.sum(stats.mixture * tl.exp2(stats.mixture_max - mixture_max))
    if (GAP + KL) & WANT:
        gap = tl.sum(stats.gap)
    if UNIT & WANT:
        unit = tl.sum(stats.unit)
    if MEAN & WANT:
        total, share = tl.sum(stats.total), tl.sum(stats.share)
    if (ENTROPY + SCALE_SLOPE) & WANT:
        s_entropy = tl.sum(stats.s_entropy)
    if TEACHER_ENTROPY & WANT:
        t_entropy = tl.sum(stats.t_entropy)
    return Statistics(
        s_max=stats.s_max, t_max=stats.t_max, mixture_max=mixture_max, s_sum=tl.sum(stats.s_sum),
        t_sum=tl.sum(stats.t_sum), mixture=mixture, gap=gap, s_entropy=s_entropy,
        t_entropy=t_entropy, unit=unit, total=total, share=share, rise=tl.sum(stats.rise),
        lift=lift,
    )  # fmt: skip


# --- what follows from them ------------------------------------------------------------------


@triton.jit
def positive(total):
    """1 for the sum of a row that is masked throughout, so that its logarithm is finite."""
    return tl.where(total == 0, 1.0, total)


@triton.jit
def row_of(s_max, t_max, s_log, t_log, gap, alive, c, mean_log2_exp, unit):
    zero = tl.zeros_like(s_max)
    return Row(
        s_max, t_max, s_log, t_log, gap, c, zero, mean_log2_exp, zero, log2(positive(unit)), alive,
        zero, zero, s_max, (),
    )  # fmt: skip


@triton.jit
def gap_of(stats):
    """log(t_sum / s_sum), of a row that is masked on neither side."""
    low = tl.minimum(positive(stats.s_sum), positive(stats.t_sum))
    gap = log1p(tl.abs(stats.rise) * reciprocal(low))
    return tl.where(stats.rise < 0, -gap, gap)


@triton.jit
def summarize(stats, temper, CONSTANT: tl.constexpr, WANT: tl.constexpr):
    """Row from its statistics, with the row constant where the first sweep gives it."""
    zero = tl.zeros_like(stats.s_max)
    row = row_of(
        stats.s_max, stats.t_max, log2(positive(stats.s_sum)), log2(positive(stats.t_sum)),
        gap_of(stats), (stats.s_sum != 0) & (stats.t_sum != 0), zero, zero, stats.unit,
    )  # fmt: skip
    c = row.gap * 0.0  # NaN where a side has one
    mean_log2_exp, t_entropy = row.mean_log2_exp, row.t_entropy
    if CONSTANT == "reverse_kl":
        c = stats.gap / positive(stats.s_sum) * LN2 + row.gap
    if CONSTANT == "log_mixture":
        growth = (stats.mixture - stats.s_sum) / positive(stats.s_sum)
        lift = stats.lift * reciprocal(positive(stats.s_sum))
        near = tl.abs(lift) < 0.25
        size = log1p(tl.where(near, lift, growth))
        c = tl.where(near, 0.0, stats.mixture_max * LN2) + size - temper.a * row.gap
        c = tl.where(tl.abs(c) > 1e20, c * float("inf"), c)
    if (ENTROPY + SCALE_SLOPE) & WANT:
        mean_log2_exp = stats.s_entropy / positive(stats.s_sum)
    if TEACHER_ENTROPY & WANT:
        t_entropy = (row.t_log - stats.t_entropy / positive(stats.t_sum)) * LN2
        t_entropy = tl.where(row.alive, t_entropy, 0.0)
    return replace(row, c=c, mean_log2_exp=mean_log2_exp, t_entropy=t_entropy)


@triton.jit
def centred_log2_exp(z, row, temper):
    """(log q + H) / log 2, whose mean under q is 0: at a high temperature, both are far larger."""
    return product_sum(z - row.s_max, temper.s_scale, -row.mean_log2_exp)


@triton.jit
def saturated(stats):
    return stats.s_sum < SATURATED


@triton.jit
def huge(stats, temper):
    """Whether differences of the scaled logits were bounded in the first sweep."""
    s, t = tl.abs(stats.s_max) * temper.s_scale, tl.abs(stats.t_max) * temper.t_scale
    return tl.maximum(s, t) > HUGE


@triton.jit
def kl_of(stats, row, WANT: tl.constexpr):
    """The KL divergence by the sums of the first sweep: reverse with GAP, else forward."""
    if GAP & WANT:
        return row.c
    else:
        return stats.gap / positive(stats.t_sum) * LN2 - row.gap


@triton.jit
def value_is_right(kl, stats, temper):
    """Whether the KL divergence that kl_of has found has its digits."""
    return (kl > LEAST_KNOWN) & (huge(stats, temper) == 0)


@triton.jit
def slopes_are_right(stats, WANT: tl.constexpr):
    """Whether the slopes that cost least have the digits that a gradient needs: of reverse KL
    -q (d + c) without `rest`, of forward KL q - p, whose two terms may cancel.
    """
    if GAP & WANT:
        return saturated(stats) == 0
    else:
        return tl.abs(stats.t_sum - stats.s_sum) > tl.maximum(stats.s_sum, stats.t_sum) * APART


@triton.jit
def elements(z, y, row, temper, SAME: tl.constexpr):
    """(lp, lq, p, q, d, d2) of a tile: see `divergences.py`.

    SAME: one temperature, so that d needs no difference of products.
    """
    dz, dy = z - row.s_max, y - row.t_max
    u = product_sum(dz, temper.s_scale, -row.s_log)
    v = product_sum(dy, temper.t_scale, -row.t_log)
    if SAME:
        d = (dy - dz) * temper.s_rate - row.gap
        d2 = (dy - dz) * temper.s_scale - row.gap * LOG2E
    else:
        d = dy * temper.t_rate - (dz * temper.s_rate + row.gap)
        d2 = dy * temper.t_scale - (dz * temper.s_scale + row.gap * LOG2E)
    return v, u, tl.exp2(v), tl.exp2(u), d, d2
