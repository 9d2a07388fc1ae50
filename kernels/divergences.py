"""Table 2: every divergence on the device, the twin of table 1, `fastkd/divergences/`.

`evaluate(lp, lq, p, q, d, c, a, b)` gives, for a tile, a value that sums without cancellation, and
the gradient of the row's divergence to the tempered logits; `outer(total, c, a, b)` maps the row
sum of the values. c is the row constant that the class's `constant` names; with "slope_sum" the
second result is slope - q c, and c the sum of the slopes at c = 0. `README.md` derives the forms.
d, lp and lq may be infinite, or NaN where both sides are masked: p and q are exactly 0 there, and
the results are never NaN.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastkd.divergences import Divergence
from fastkd.kernels.rows import INTERPRETED, LN2, LOG2E, fast_log2, log1p, log_bend, reciprocal

# Below these a series replaces the direct form: e^x - 1 - x; the logarithm of a mixture; the value
# of JSD, which needs more digits of that logarithm; y - log(1 + y) with y = m/p - 1, likewise.
NEAR = tl.constexpr(0.5)
NEAR_LOG = tl.constexpr(0.125)
NEAR_VALUE = tl.constexpr(0.6)
NEAR_RATIO = tl.constexpr(0.25)


@triton.jit
def identity(total, c, a, b):
    return total


class Device(NamedTuple):
    """A divergence for the Triton backend: two functions, decorated with triton.jit."""

    evaluate: Any
    outer: Any = identity


# --- helpers ---------------------------------------------------------------------------------


@triton.jit
def bend(x):
    """(e^x - 1 - x) / x^2 for |x| < 0.5, to a relative 8e-7."""
    return 0.49999996 + x * (0.1666628 + x * (0.041667477 + x * (0.008395411 + x * 0.0013914635)))


@triton.jit
def at_most(x, bound):
    """The smaller; a NaN, which is where p and q are 0, becomes the bound."""
    if INTERPRETED:
        return tl.where(x < bound, x, bound)
    else:
        return tl.minimum(x, bound)


@triton.jit
def log_ratio(x):
    """x = log(m / p), but finite where p is 0; 2^-200 is 0 in fp32."""
    return at_most(x, 200.0)


@triton.jit
def kl_terms(p, m, x):
    """(m - p - p x, m - p) where m = p e^x, without cancellation; x not infinite where p is 0."""
    near = tl.abs(x) < NEAR
    linear = p * x
    curved = linear * (x * bend(x))
    rise = m - p
    return tl.where(near, curved, rise - linear), tl.where(near, linear + curved, rise)


@triton.jit
def expm1_times(q, x):
    """q (e^x - 1), for |x| < 0.5."""
    return q * (x + x * (x * bend(x)))


@triton.jit
def exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def log2_mixture_ratio(x, a):
    """log2(1 - a + a e^x) for x <= 40: the cumulants of a coin near 0, else one logarithm."""
    k = a * (1.0 - a)
    y = LOG2E / 6 * k * (1.0 - 2.0 * a) + x * (LOG2E / 24 * k * (1.0 - 6.0 * k))
    y = LOG2E * a + x * (LOG2E / 2 * k + x * y)
    return tl.where(tl.abs(x) < NEAR_LOG, x * y, fast_log2(1.0 - a + a * exp(x)))


@triton.jit
def mixture_value(p, q, x, r, a):
    """a p log(p/m) + (1 - a) q log(q/m), m = a p + (1 - a) q, x = log(p/q), r = log2(m/q).

    Near 0 it is m (x K'(x) - K(x)) by the cumulants, where K(x) = log(m/q).
    """
    from_p = a * p
    m = from_p + (1.0 - a) * q
    k = a * (1.0 - a)
    skew = 1.0 - 2.0 * a
    k5 = k * skew * (1.0 - 12.0 * k) / 30
    k6 = k * (1.0 - k * (30.0 - 120.0 * k)) / 144
    k7 = k * skew * (1.0 - k * (60.0 - 360.0 * k)) / 840
    k8 = k * (1.0 - k * (126.0 - k * (1680.0 - 5040.0 * k))) / 5760
    y = k * (1.0 - 6.0 * k) / 8 + x * (k5 + x * (k6 + x * (k7 + x * k8)))
    y = k / 2 + x * (k * skew / 3 + x * y)
    far = from_p * (x - LN2 * r) - (1.0 - a) * LN2 * (q * r)
    return tl.where(tl.abs(x) < NEAR_VALUE, (m * x) * (x * y), far)


@triton.jit
def powers(x, a):
    """(e, e - 1, m) with e = e^x and m = a + (1 - a) e, x held within [-80, 80]."""
    x = tl.maximum(at_most(x, 80.0), -80.0)
    e = exp(x)
    rise = tl.where(tl.abs(x) < NEAR, expm1_times(1.0, x), e - 1.0)
    return e, rise, a + (1.0 - a) * e


@triton.jit
def log_of(m, x, a):
    """log m, for (_, _, m) = powers(x, a); a = 0 is a KL, with its infinities."""
    return tl.where(a == 0, x, fast_log2(m) * LN2)


# --- the divergences -------------------------------------------------------------------------


@triton.jit
def forward_kl(lp, lq, p, q, d, c, a, b):
    return kl_terms(p, q, log_ratio(d * -1.0))


@triton.jit
def reverse_kl(lp, lq, p, q, d, c, a, b):
    x = log_ratio(d)
    value, _ = kl_terms(q, p, x)
    return value, q * (x * -1.0 - c)


@triton.jit
def jeffreys(lp, lq, p, q, d, c, a, b):
    x = log_ratio(d)
    forward, rise = kl_terms(p, q, log_ratio(d * -1.0))
    linear = q * x
    # The two add up to rise * log(q / p).
    near = tl.abs(x) < NEAR
    reverse = tl.where(near, rise * x, rise + linear) * -1.0 - tl.where(near, forward, 0.0)
    # A weight of exactly 0 also removes an infinite term.
    value = tl.where(a > 0, a * forward, 0.0) + tl.where(b > 0, b * reverse, 0.0)
    return value, a * rise - tl.where(b > 0, b * (linear + q * c), 0.0)


@triton.jit
def jsd(lp, lq, p, q, d, c, a, b):
    x = at_most(d, 40.0)
    r = log2_mixture_ratio(x, a)
    return mixture_value(p, q, tl.maximum(x, -40.0), r, a), q * ((a - 1.0) * LN2 * r - c)


@triton.jit
def skew_kl(lp, lq, p, q, d, c, a, b):
    x = log_ratio(d * -1.0)
    e, rise, m = powers(x, a)
    gap = tl.where(tl.abs(x) < NEAR, p * rise, q - p)
    rise *= 1.0 - a
    far = (1.0 - a) * gap - p * log_of(m, x, a)
    value = tl.where(tl.abs(rise) < NEAR_RATIO, (p * rise) * (rise * log_bend(rise)), far)
    return value, (1.0 - a) * (1.0 - a) * (gap * (e * reciprocal(m))) - q * c


@triton.jit
def skew_reverse_kl(lp, lq, p, q, d, c, a, b):
    x = log_ratio(d)
    _, rise, m = powers(x, a)
    rise *= 1.0 - a
    log_m = log_of(m, x, a)
    far = (1.0 - a) * (p - q) - q * log_m
    value = tl.where(tl.abs(rise) < NEAR_RATIO, (q * rise) * (rise * log_bend(rise)), far)
    # log(m / q) + a (q / m - 1); near 0 by the cumulants of a coin, as K(x) - K'(x) + K'(0).
    k = a * (1.0 - a)
    skew = 2.0 * a - 1.0
    k3 = k * skew
    k4 = k * (1.0 - 6.0 * k)
    k5 = k3 * (1.0 - 12.0 * k)
    y = (k3 - k4) / 6 + x * ((k4 - k5) / 24)
    y = x * ((1.0 - a) * (1.0 - a) + x * ((k - k3) / 2 + x * y))
    slope = tl.where(tl.abs(x) < NEAR_LOG, y, log_m + a * (reciprocal(m) - 1.0))
    return value, q * (slope * -1.0 - c)


@triton.jit
def tvd(lp, lq, p, q, d, c, a, b):
    _, rise = kl_terms(p, q, log_ratio(d * -1.0))
    sign = tl.where(d < 0, 0.5, 0.0) - tl.where(d > 0, 0.5, 0.0)
    return 0.5 * tl.abs(rise), q * (sign - c)


@triton.jit
def alpha_terms(lp, lq, p, q, d, c, a):
    """Terms of the alpha divergence, and q - w / sum w with w = p^a q^(1-a), c = log sum w."""
    x = a * d
    near = tl.maximum(tl.abs(d), tl.abs(x)) < NEAR
    log_w = tl.where(d == d, a * lp + (1.0 - a) * lq, -float("inf"))
    series = q * d * d * (a * bend(x) - bend(d)) / (a - 1.0)
    value = (exp(log_w) - a * p - (1.0 - a) * q) / (a * (a - 1.0))
    x -= c
    slope = tl.where(near & (tl.abs(x) < NEAR), -expm1_times(q, x), q - exp(log_w - c))
    return tl.where(near, series, value), slope


@triton.jit
def alpha(lp, lq, p, q, d, c, a, b):
    value, slope = alpha_terms(lp, lq, p, q, d, c, a)
    return value, slope * (exp(c) / a)


@triton.jit
def renyi(lp, lq, p, q, d, c, a, b):
    return alpha_terms(lp, lq, p, q, d, c, a)


@triton.jit
def renyi_outer(total, c, a, b):
    excess = a * (a - 1.0) * total
    near = tl.abs(excess) < 0.5
    return tl.where(near, log1p(tl.where(near, excess, 0.0)), c) / (a - 1.0)


TABLE = {
    "forward_kl": Device(forward_kl),
    "reverse_kl": Device(reverse_kl),
    "jeffreys": Device(jeffreys),
    "jsd": Device(jsd),
    "skew_kl": Device(skew_kl),
    "skew_reverse_kl": Device(skew_reverse_kl),
    "tvd": Device(tvd),
    "alpha": Device(alpha),
    "renyi": Device(renyi, renyi_outer),
}


def device_of(name: str) -> Device:
    """The entry of table 2, or what the user's own class brings."""
    device = TABLE.get(name) or Divergence.of_name(name).device
    if device is None:
        raise NotImplementedError(
            f"divergence {name!r} has no device function: give its class a `device`, a "
            "fastkd.kernels.divergences.Device, or use backend='torch'"
        )
    return device
