"""The divergences on the device as a textbook has them: what the values that do not cancel cost.

Twins of `fastkd/kernels/divergences.py` for `python -m benchmarks.compiled` to count, with hardware
logarithms and the infinities held back alike. Near teacher = student their values are wrong.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastkd.kernels.arithmetic import LN2, fast_log2, reciprocal
from fastkd.kernels.divergences import Device
from fastkd.kernels.terms import at_most, exp, log_ratio


@triton.jit
def forward_kl(lp, lq, p, q, d, d2, c, a, b):
    return p * log_ratio(p, d * -1.0) * -1.0, q - p


@triton.jit
def reverse_kl(lp, lq, p, q, d, d2, c, a, b):
    value = q * log_ratio(q, d) * -1.0
    return value, value - q * c


@triton.jit
def jeffreys(lp, lq, p, q, d, d2, c, a, b):
    forward, reverse = p * log_ratio(p, d * -1.0) * -1.0, q * log_ratio(q, d) * -1.0
    value = tl.where(a > 0, a * forward, 0.0) + tl.where(b > 0, b * reverse, 0.0)
    return value, a * (q - p) + tl.where(b > 0, b * (reverse - q * c), 0.0)


@triton.jit
def jsd(lp, lq, p, q, d, d2, c, a, b):
    x = at_most(d2, 60.0)
    r = fast_log2(1.0 - a + a * tl.exp2(x))
    slope = (a - 1.0) * LN2 * r
    return (a * LN2) * p * (tl.maximum(x, -60.0) - r) + q * slope, q * (slope - c)


@triton.jit
def skew_kl(lp, lq, p, q, d, d2, c, a, b):
    x = log_ratio(p, d2 * -1.0)
    e = tl.exp2(tl.maximum(at_most(x, 115.0), -115.0))
    m = a + (1.0 - a) * e
    value = p * tl.where(a == 0, x, fast_log2(m)) * -LN2
    return value, (1.0 - a) * (1.0 - a) * ((q - p) * (e * reciprocal(m))) - q * c


@triton.jit
def skew_reverse_kl(lp, lq, p, q, d, d2, c, a, b):
    x = log_ratio(q, d2)
    m = a + (1.0 - a) * tl.exp2(tl.maximum(at_most(x, 115.0), -115.0))
    log_m = tl.where(a == 0, x, fast_log2(m)) * LN2
    return q * log_m * -1.0, q * ((log_m + a * (reciprocal(m) - 1.0)) * -1.0 - c)


@triton.jit
def tvd(lp, lq, p, q, d, d2, c, a, b):
    sign = tl.where(d < 0, 0.5, 0.0) - tl.where(d > 0, 0.5, 0.0)
    return 0.5 * tl.abs(q - p), q * (sign - c)


@triton.jit
def alpha(lp, lq, p, q, d, d2, c, a, b):
    w = tl.exp2(tl.where(d2 == d2, a * lp + (1.0 - a) * lq, -float("inf")))
    value = (w - a * p - (1.0 - a) * q) / (a * (a - 1.0))
    return value, (q - w * exp(c * -1.0)) * (exp(c) / a)


@triton.jit
def renyi(lp, lq, p, q, d, d2, c, a, b):
    w = tl.exp2(tl.where(d2 == d2, a * lp + (1.0 - a) * lq, -float("inf")))
    return (w - a * p - (1.0 - a) * q) / (a * (a - 1.0)), q - w * exp(c * -1.0)


TABLE = {
    function.__name__: Device(function)
    for function in (
        forward_kl, reverse_kl, jeffreys, jsd, skew_kl, skew_reverse_kl, tvd, alpha, renyi,
    )
}  # fmt: skip
