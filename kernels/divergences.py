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
from fastkd.kernels.rows import LN2, LOG2E, fast_log2, log1p

# Where the series below replace the direct forms.
NEAR = tl.constexpr(0.7)
NEAR_MIXTURE = tl.constexpr(0.5)


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
    """(e^x - 1 - x) / x^2 for |x| < 0.7, to a relative 3e-7."""
    y = 0.00833334 + x * (0.00140592 + x * 0.00019961)
    return 0.5 + x * (0.16666667 + x * (0.04166408 + x * y))


@triton.jit
def kl_terms(p, m, x):
    """(m - p - p x, m - p) where m = p e^x, without cancellation; x not infinite where p is 0."""
    near = tl.abs(x) < NEAR
    linear = p * x
    curved = linear * (x * bend(x))
    rise = tl.where(near, linear + curved, m - p)
    return tl.where(near, curved, rise - linear), rise


@triton.jit
def log_ratio(p, x):
    """x where p is positive, else any finite number that is not small."""
    return tl.where(p > 0, x, 1.0)


@triton.jit
def expm1_times(q, x):
    """q (e^x - 1), for |x| < 0.7."""
    return q * (x + x * x * bend(x))


@triton.jit
def exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def clamp(x):
    """x within [-80, 80]; a NaN, which is where p and q are 0, becomes a number."""
    return tl.minimum(tl.where(x > -80.0, x, -80.0), 80.0)


@triton.jit
def log_mixture_ratio(x, w):
    """log(w + (1 - w) e^x) for |x| <= 80: the cumulants of a coin near 0, else one logarithm."""
    k1 = 1.0 - w
    k2 = k1 * w
    skew = w - k1
    k6 = k2 * (1.0 - k2 * (30.0 - 120.0 * k2)) / 720
    y = k2 * (1.0 - 6.0 * k2) / 24 + x * (k2 * skew * (1.0 - 12.0 * k2) / 120 + x * k6)
    y = k1 + x * (k2 / 2 + x * (k2 * skew / 6 + x * y))
    return tl.where(tl.abs(x) < NEAR_MIXTURE, x * y, fast_log2(w + k1 * exp(x)) * LN2)


@triton.jit
def skew_ratio(p, x, w):
    """log(m / p) for m = w p + (1 - w) q, x = log(q / p); w = 0 is a KL, with its infinities."""
    return tl.where(w == 0, log_ratio(p, x), log_mixture_ratio(clamp(x), w))


# --- the divergences -------------------------------------------------------------------------


@triton.jit
def forward_kl(lp, lq, p, q, d, c, a, b):
    return kl_terms(p, q, log_ratio(p, -d))


@triton.jit
def reverse_kl(lp, lq, p, q, d, c, a, b):
    x = log_ratio(q, d)
    value, _ = kl_terms(q, p, x)
    return value, -q * (x + c)


@triton.jit
def jeffreys(lp, lq, p, q, d, c, a, b):
    x = log_ratio(q, d)
    forward, rise = kl_terms(p, q, log_ratio(p, -d))
    reverse, _ = kl_terms(q, p, x)
    # A weight of exactly 0 also removes an infinite term.
    value = tl.where(a > 0, a * forward, 0.0) + tl.where(b > 0, b * reverse, 0.0)
    return value, a * rise - tl.where(b > 0, b * (q * (x + c)), 0.0)


@triton.jit
def jsd(lp, lq, p, q, d, c, a, b):
    x = clamp(d)
    m = a * p + (1.0 - a) * q
    from_q = log_mixture_ratio(x, 1.0 - a)
    of_p, _ = kl_terms(p, m, from_q - x)
    of_q, _ = kl_terms(q, m, from_q)
    return a * of_p + (1.0 - a) * of_q, -q * ((1.0 - a) * from_q + c)


@triton.jit
def skew_kl(lp, lq, p, q, d, c, a, b):
    ratio = skew_ratio(p, -d, a)
    value, _ = kl_terms(p, a * p + (1.0 - a) * q, ratio)
    far = q - tl.where(a == 0, p, q * exp(-ratio))
    gain = tl.where(tl.abs(ratio) < NEAR, -expm1_times(q, -ratio), far)  # q - p q / m
    return value, (1.0 - a) * gain - q * c


@triton.jit
def skew_reverse_kl(lp, lq, p, q, d, c, a, b):
    ratio = skew_ratio(q, d, a)
    value, _ = kl_terms(q, (1.0 - a) * p + a * q, ratio)
    near = tl.abs(ratio) < NEAR
    fall = tl.where(near, expm1_times(1.0, -ratio), exp(-ratio) - 1.0)  # q / m - 1
    return value, -q * (ratio + c + tl.where(a == 0, 0.0, a * fall))


@triton.jit
def tvd(lp, lq, p, q, d, c, a, b):
    _, rise = kl_terms(p, q, log_ratio(p, -d))
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
