"""What divergences on the device are made of: series, terms of a KL divergence, mixtures."""

from __future__ import annotations

import triton
import triton.language as tl

from fastkd.kernels.arithmetic import INTERPRETED, LN2, LOG2E, fast_log2, log1p, reciprocal

# Where |x| is below these a series replaces the direct form:
EXPM1_RADIUS = tl.constexpr(0.5)  # of e^x - 1 - x,
EXP2M1_RADIUS = tl.constexpr(0.72)  # of 2^x - 1 - x log 2,
LOG1P_RADIUS = tl.constexpr(0.25)  # of x - log(1 + x),
LOG_MIXTURE_RADIUS = tl.constexpr(0.18)  # of the logarithm of a mixture, x = log2(p / q),
MIXTURE_VALUE_RADIUS = tl.constexpr(0.866)  # and of the value of JSD, which needs more digits.


@triton.jit
def expm1_remainder(x):
    """(e^x - 1 - x) / x^2 for |x| < 0.5, to a relative 8e-7."""
    return 0.49999996 + x * (0.1666628 + x * (0.041667477 + x * (0.008395411 + x * 0.0013914635)))


@triton.jit
def exp2m1_remainder(x):
    """(2^x - 1 - x log 2) / x^2 for |x| < 0.72, to a relative 8e-7."""
    y = 0.009618316 + x * (0.0013432884 + x * 0.00015432084)
    return 0.24022649 + x * (0.05550282 + x * y)


@triton.jit
def at_most(x, bound):
    """The smaller; a NaN, which is where p and q are 0, becomes the bound."""
    if INTERPRETED:
        return tl.where(x < bound, x, bound)
    else:
        return tl.minimum(x, bound)


@triton.jit
def log_ratio(p, x):
    """x = log(m / p), but finite where p is 0, be it masked or too small for fp32."""
    return tl.where(p > 0, x, 200.0)


@triton.jit
def kl_terms(p, m, x):
    """(m - p - p x, m - p) where m = p e^x, without cancellation; x not infinite where p is 0."""
    near = tl.abs(x) < EXPM1_RADIUS
    linear = p * x
    curved = linear * (x * expm1_remainder(x))
    rise = m - p
    return tl.where(near, curved, rise - linear), tl.where(near, linear + curved, rise)


@triton.jit
def exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def expm1_times(q, x, p):
    """p - q where p = q e^x, without cancellation."""
    return tl.where(tl.abs(x) < EXPM1_RADIUS, (q * x) * (1.0 + x * expm1_remainder(x)), p - q)


@triton.jit
def times(x, log):
    """x log, and 0 where x is, be the logarithm infinite."""
    return tl.where(x == 0, 0.0, x * log)


@triton.jit
def exp2m1_times(q, x):
    """q (2^x - 1), for |x| < 0.72."""
    return (q * x) * (LN2 + x * exp2m1_remainder(x))


@triton.jit
def log2_mixture_ratio(x, a):
    """log2(1 - a + a 2^x) for x <= 60: the cumulants of a coin near 0, else one logarithm.

    The fourth, whose x^3 is left to the best line, costs 1e-5, as much as the logarithm beyond.
    """
    k = a * (1.0 - a)
    fourth = LN2 * LN2 * LN2 / 24 * k * (1.0 - 6.0 * k)
    y = LN2 / 2 * k + 0.75 * LOG_MIXTURE_RADIUS * LOG_MIXTURE_RADIUS * fourth
    y = a + x * (y + x * (LN2 * LN2 / 6 * k * (1.0 - 2.0 * a)))
    return tl.where(tl.abs(x) < LOG_MIXTURE_RADIUS, x * y, fast_log2(1.0 - a + a * tl.exp2(x)))


@triton.jit
def mixture_value(p, q, x, r, linear, a):
    """a p log(p/m) + (1 - a) q log(q/m), m = a p + (1 - a) q, x = log2(p/q), r = log2(m/q).

    linear: the second term. Near 0 it is m (x K'(x) - K(x)) by the cumulants, where K = log(m/q);
    the last one's x^6 is left to the best polynomial of fewer.
    """
    from_p = (a * LN2) * p
    m = from_p + ((1.0 - a) * LN2) * q
    k = a * (1.0 - a)
    skew = 1.0 - 2.0 * a
    H: tl.constexpr = (MIXTURE_VALUE_RADIUS * LN2) * (MIXTURE_VALUE_RADIUS * LN2)
    k8 = k * (1.0 - k * (126.0 - k * (1680.0 - 5040.0 * k))) / 5760
    k7 = k * skew * (1.0 - k * (60.0 - 360.0 * k)) / 840
    k6 = k * (1.0 - k * (30.0 - 120.0 * k)) / 144 + 1.5 * H * k8
    k5 = k * skew * (1.0 - 12.0 * k) / 30
    k4 = k * (1.0 - 6.0 * k) / 8 - 0.5625 * H * H * k8
    k2 = k / 2 + H * H * H / 32 * k8
    S: tl.constexpr = LN2 * LN2
    y = S * S * LN2 * k6 + x * (S * S * S * k7)
    y = S * (k * skew / 3) + x * (S * LN2 * k4 + x * (S * S * k5 + x * y))
    y = LN2 * k2 + x * y
    return tl.where(tl.abs(x) < MIXTURE_VALUE_RADIUS, (m * x) * (x * y), from_p * (x - r) + linear)


@triton.jit
def powers(x, a, b):
    """(e, e - 1, m) with e = 2^x and m = a + b e, x held within [-115, 115]."""
    x = tl.maximum(at_most(x, 115.0), -115.0)
    e = tl.exp2(x)
    rise = tl.where(tl.abs(x) < EXP2M1_RADIUS, exp2m1_times(1.0, x), e - 1.0)
    return e, rise, a + b * e


@triton.jit
def log_of(m, x, a):
    """log2 m, for (_, _, m) = powers(x, a, b); a = 0 is a KL, with its infinities."""
    return tl.where(a == 0, x, fast_log2(m))


# --- yes and no, by log2 of their odds ------------------------------------------------------------


@triton.jit
def probabilities(odds):
    """Of yes and of no."""
    return reciprocal(1.0 + tl.exp2(-odds)), reciprocal(1.0 + tl.exp2(odds))


@triton.jit
def surprisal(odds):
    """-log p, with all digits where p is nearly 1."""
    return LN2 * tl.maximum(-odds, 0.0) + log1p(tl.exp2(-tl.abs(odds)))


@triton.jit
def binary_entropy(odds):
    mine, rest = probabilities(odds)
    return times(mine, surprisal(odds)) + times(rest, surprisal(-odds))


@triton.jit
def binary_kl(t_odds, s_odds, d):
    """KL(p || q) of yes and no, and q - p, its slope to log of the student's odds.

    d: log of the odds' ratio.
    """
    p, p_rest = probabilities(t_odds)
    q, q_rest = probabilities(s_odds)
    near = tl.abs(d) < EXPM1_RADIUS
    # log(q / p) and log((1 - q) / (1 - p)): from d where that is small.
    growth = d * (1.0 + d * expm1_remainder(d))
    fall = d * (d * expm1_remainder(-d) - 1.0)
    x = tl.where(near, log1p(q_rest * fall), surprisal(t_odds) - surprisal(s_odds))
    x_rest = tl.where(near, log1p(q * growth), surprisal(-t_odds) - surprisal(-s_odds))
    mine, rise = kl_terms(p, q, log_ratio(p, x))
    rest, fall = kl_terms(p_rest, q_rest, log_ratio(p_rest, x_rest))
    return mine + rest, tl.where(p > 0.5, -fall, rise)
