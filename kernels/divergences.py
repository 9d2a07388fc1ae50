"""Table 2: every divergence on the device, the twin of table 1, `fastkd/divergences/`.

`evaluate(lp, lq, p, q, d, d2, c, a, b)` gives, for a tile, a value that sums without cancellation,
and the gradient of the row's divergence to the tempered logits; `outer(total, c, a, b)` maps the
row sum of the values. d is log(p / q); lp, lq and d2 are log p, log q and d to base 2, as the
exponential takes them. c is the row constant that the class's `constant` names; with "slope_sum"
the second result is slope - q c, and c the sum of the slopes at c = 0. `README.md` derives the
forms. All logarithms may be infinite, or NaN where both sides are masked: p and q are exactly 0
there, and the results are never NaN.

A divergence that looks at a row's label is one of the other columns, with p and q normalised among
them, and of the label's odds: `evaluate` sees the others, `outer(total, c, a, b, label)` joins what
they give with the label (a `records.Label`), and `at_label(total, c, a, b, label)` gives the factor
by which `outer` takes up the total, and the derivative to the log-odds that the student gives the
label. total is known to `at_label` where c is the slope sum, and NaN elsewhere.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastkd.divergences import Divergence
from fastkd.divergences.base import NONE, REVERSE_KL, SLOPE_SUM, exchanged
from fastkd.kernels import label_aware
from fastkd.kernels.arithmetic import LN2, LOG2E, fast_log2, log1p, log1p_remainder, reciprocal
from fastkd.kernels.terms import (
    EXP2M1_RADIUS,
    EXPM1_RADIUS,
    LOG1P_RADIUS,
    LOG_MIXTURE_RADIUS,
    at_most,
    exp,
    exp2m1_remainder,
    exp2m1_times,
    expm1_remainder,
    kl_terms,
    log2_mixture_ratio,
    log_of,
    log_ratio,
    mixture_value,
    powers,
    times,
)


@triton.jit
def identity(total, c, a, b):
    return total


class Device(NamedTuple):
    """A divergence for the Triton backend: functions decorated with triton.jit."""

    evaluate: Any
    outer: Any = identity
    constant: str | None = None  # where it is not the class's
    at_label: Any = None  # of one that looks at the label


@triton.jit
def forward_kl(lp, lq, p, q, d, d2, c, a, b):
    return kl_terms(p, q, log_ratio(p, d * -1.0))


@triton.jit
def forward_slope(lp, lq, p, q, d, d2, c, a, b):
    """Where q - p of two exponentials has the digits; its value is none."""
    return q, q - p


@triton.jit
def reverse_kl(lp, lq, p, q, d, d2, c, a, b):
    x = log_ratio(q, d)
    value, _ = kl_terms(q, p, x)
    return value, q * (x * -1.0 - c)


@triton.jit
def jeffreys(lp, lq, p, q, d, d2, c, a, b):
    x, y = log_ratio(q, d), log_ratio(p, d * -1.0)
    forward, rise = kl_terms(p, q, y)
    linear = q * x
    # The reverse term is -(rise + linear); near 0, as the two add up to -rise * x, what is left.
    near = tl.abs(y) < EXPM1_RADIUS
    reverse = -(rise * tl.where(near, x, 1.0) + tl.where(near, forward, linear))
    return a * forward + b * reverse, a * rise - b * (linear + q * c)


@triton.jit
def jeffreys_forward(lp, lq, p, q, d, d2, c, a, b):
    """Of a weight b of 0, without reverse KL, which may be infinite."""
    value, slope = forward_kl(lp, lq, p, q, d, d2, c, a, b)
    return a * value, a * slope


@triton.jit
def jeffreys_reverse(lp, lq, p, q, d, d2, c, a, b):
    """Of a weight a of 0, without forward KL."""
    value, slope = reverse_kl(lp, lq, p, q, d, d2, c, a, b)
    return b * value, b * slope


@triton.jit
def jsd(lp, lq, p, q, d, d2, c, a, b):
    x = at_most(d2, 120.0)
    r = log2_mixture_ratio(x, a)
    slope = -b * LN2 * r
    return mixture_value(p, q, tl.maximum(x, -60.0), r, q * slope, a), q * (slope - c)


@triton.jit
def jsd_ends(lp, lq, p, q, d, d2, c, a, b):
    """Near the ends of a, where the mixture differs from one side by a factor of 1 + y, y small.

    With w = min(a, b), p the side of weight w and q the other: y = w (p/q - 1), and in
    w KL(p || m) + (1 - w) KL(q || m) the first order, w KL(p || q), is a KL term.
    """
    swap = a > b
    w, rest = tl.minimum(a, b), tl.maximum(a, b)
    x = tl.maximum(at_most(tl.where(swap, -d2, d2), 60.0), -60.0)
    few, many = tl.where(swap, q, p), tl.where(swap, p, q)
    y = w * tl.where(tl.abs(x) < EXP2M1_RADIUS, exp2m1_times(1.0, x), tl.exp2(x) - 1.0)
    near = tl.abs(y) < LOG1P_RADIUS
    log_m = log1p(y)  # of m over the side of most weight
    excess = tl.where(near, y * (y * log1p_remainder(y)), y - log_m)
    first, _ = kl_terms(few, many, log_ratio(few, x * -LN2))
    lead = w * first + many * ((1.0 + y) * excess - y * y)
    value = tl.where(near, lead, w * few * (x * LN2 - log_m) - rest * many * log_m)
    slope = -b * tl.where(swap, log_m - x * LN2, log_m)
    return value, q * (slope - c)


@triton.jit
def skew_kl(lp, lq, p, q, d, d2, c, a, b):
    x = log_ratio(p, d2 * -1.0)
    e, rise, m = powers(x, a, b)
    gap = tl.where(tl.abs(x) < EXP2M1_RADIUS, p * rise, q - p)
    rise *= b
    far = b * gap - LN2 * (p * log_of(m, x, a))
    value = tl.where(tl.abs(rise) < LOG1P_RADIUS, (p * rise) * (rise * log1p_remainder(rise)), far)
    return value, b * b * (gap * (e * reciprocal(m))) - q * c


@triton.jit
def skew_reverse_kl(lp, lq, p, q, d, d2, c, a, b):
    x = log_ratio(q, d2)
    _, rise, m = powers(x, a, b)
    rise *= b
    log_m = log_of(m, x, a)
    far = b * (p - q) - LN2 * (q * log_m)
    value = tl.where(tl.abs(rise) < LOG1P_RADIUS, (q * rise) * (rise * log1p_remainder(rise)), far)
    # log(m / q) + a (q / m - 1); near 0 by the cumulants of a coin, as K(x) - K'(x) + K'(0).
    k = a * b
    skew = 2.0 * a - 1.0
    k3 = k * skew
    k4 = k * (1.0 - 6.0 * k)
    k5 = k3 * (1.0 - 12.0 * k)
    S: tl.constexpr = LN2 * LN2
    y = S * LN2 / 6 * (k3 - k4) + x * (S * S / 24 * (k4 - k5))
    y = x * (LN2 * (b * b) + x * (S / 2 * (k - k3) + x * y))
    slope = tl.where(tl.abs(x) < LOG_MIXTURE_RADIUS, y, LN2 * log_m + a * (reciprocal(m) - 1.0))
    return value, q * (slope * -1.0 - c)


@triton.jit
def skew_reverse_kl_near_one(lp, lq, p, q, d, d2, c, a, b):
    """Where m is nearly q, at a distance that is of second order in b."""
    x = log_ratio(q, d2)
    e, rise, m = powers(x, a, b)
    rise *= b
    log_m = fast_log2(m)
    near = tl.abs(rise) < LOG1P_RADIUS
    curved = rise * log1p_remainder(rise)
    value = tl.where(near, (q * rise) * curved, b * (p - q) - LN2 * (q * log_m))
    # log(m / q) + a (q / m - 1), whose first orders in rise cancel.
    share = reciprocal(m)
    slope = tl.where(near, rise * (b * e * share - curved), LN2 * log_m + a * (share - 1.0))
    return value, q * (slope * -1.0 - c)


@triton.jit
def tvd(lp, lq, p, q, d, d2, c, a, b):
    _, rise = kl_terms(p, q, log_ratio(p, d * -1.0))
    sign = tl.where(d < 0, 0.5, 0.0) - tl.where(d > 0, 0.5, 0.0)
    return 0.5 * tl.abs(rise), q * (sign - c)


@triton.jit
def alpha_terms(lp, lq, p, q, d2, c, a, b):
    """Terms of the alpha divergence, and q - w / sum w with w = p^a q^b, c = log sum w."""
    x = a * d2
    near = tl.abs(d2) < reciprocal(tl.maximum(tl.abs(a), 1.0)) * EXP2M1_RADIUS  # d2 and x both
    log_w = tl.where(tl.maximum(lp, lq) > -float("inf"), a * lp + b * lq, -float("inf"))
    one_a, one_b = 1.0 / a, 1.0 / b
    series = q * d2 * d2 * (exp2m1_remainder(d2) - a * exp2m1_remainder(x)) * one_b
    # Scaled before the exponential, which may overflow where the value does not.
    w = tl.exp2(log_w - fast_log2(tl.abs(a * b)))
    value = (one_b * p + one_a * q) + tl.where(a * b > 0, -1.0, 1.0) * w
    c *= LOG2E
    x -= c
    # w is at most its sum, which rounding of huge logarithms forgets; a NaN stays.
    share = tl.exp2(tl.minimum(log_w - c, 0.0, tl.PropagateNan.ALL))
    slope = tl.where(tl.abs(x) < EXP2M1_RADIUS, -exp2m1_times(q, x), q - share)
    return tl.where(near, series, value), slope


@triton.jit
def alpha(lp, lq, p, q, d, d2, c, a, b):
    value, slope = alpha_terms(lp, lq, p, q, d2, c, a, b)
    return value, slope * alpha_factor(c, a, b)


@triton.jit
def alpha_factor(c, a, b):
    """sum w / a, held within the range of fp32; 0 where the value leaves it."""
    c *= LOG2E
    factor = tl.exp2(tl.minimum(c - fast_log2(tl.abs(a)), 127.99))
    factor = tl.where(c - fast_log2(tl.abs(a * b)) < 128.0, factor, 0.0)
    return tl.where(a > 0, factor, -factor)


@triton.jit
def alpha_near_zero(lp, lq, p, q, d, d2, c, a, b):
    """Reverse KL less what is of order a; with c the slope sum, since log sum w has few digits."""
    far, _ = alpha_terms(lp, lq, p, q, d2, 0.0, a, b)
    x = log_ratio(q, d)
    t = a * x
    near, curve = tl.abs(t) < EXPM1_RADIUS, expm1_remainder(t)
    first, _ = kl_terms(q, p, x)
    value = (first - a * ((q * x) * (x * curve))) * (1.0 / b)
    slope = tl.where(near, x * (-1.0 - t * curve), (1.0 - exp(t)) * (1.0 / a))
    return tl.where(near, value, far), q * (slope - c)


@triton.jit
def renyi_near_zero(lp, lq, p, q, d, d2, c, a, b):
    value, _ = alpha_near_zero(lp, lq, p, q, d, d2, 0.0, a, b)
    _, slope = alpha_terms(lp, lq, p, q, d2, c, a, b)
    return value, slope


@triton.jit
def alpha_near_one(lp, lq, p, q, d, d2, c, a, b):
    value, slope = renyi_near_one(lp, lq, p, q, d, d2, c, a, b)
    return value, slope * alpha_factor(c, a, b)


@triton.jit
def renyi_near_one(lp, lq, p, q, d, d2, c, a, b):
    """Forward KL less what is of order b."""
    far, slope = alpha_terms(lp, lq, p, q, d2, c, a, b)
    t = d * -b
    first, _ = kl_terms(p, q, log_ratio(p, d * -1.0))
    value = (first - b * ((p * d) * (d * expm1_remainder(t)))) * (1.0 / a)
    return tl.where(tl.abs(t) < EXPM1_RADIUS, value, far), slope


@triton.jit
def renyi(lp, lq, p, q, d, d2, c, a, b):
    return alpha_terms(lp, lq, p, q, d2, c, a, b)


@triton.jit
def renyi_outer(total, c, a, b):
    excess = -a * b * total
    near = tl.abs(excess) < 0.5
    return tl.where(near, log1p(tl.where(near, excess, 0.0)), c) / -b


@triton.jit
def todi(lp, lq, p, q, d, d2, c, a, b):
    """Weights w = p / (p + q), as constants: the value is that of Jeffreys' divergence, and the
    slope -w p + (1 - w) q (1 - d) = q - p - (1 - w) q d.
    """
    value, _ = jeffreys(lp, lq, p, q, d, d2, 0.0, 1.0, 1.0)
    _, fall = kl_terms(p, q, log_ratio(p, d * -1.0))
    rest = reciprocal(1.0 + tl.exp2(at_most(d2, 120.0)))
    return value, fall - rest * (q * log_ratio(q, d)) - q * c


@triton.jit
def taid(lp, lq, p, q, d, d2, c, a, b):
    """Terms of KL(m || q), and q - m, with m = w / sum w, w = p^a q^b, c = log sum w."""
    log_w = tl.where(tl.maximum(lp, lq) > -float("inf"), a * lp + b * lq, -float("inf"))
    c *= LOG2E
    m = tl.exp2(log_w - c)
    x = a * d2 - c  # log2(m / q)
    value, _ = kl_terms(m, q, log_ratio(m, x * -LN2))
    return value, tl.where(tl.abs(x) < EXP2M1_RADIUS, -exp2m1_times(q, x), q - m)


@triton.jit
def taid_outer(total, c, a, b):
    return tl.where(c == -float("inf"), float("inf"), total)


@triton.jit
def growth(lp, lq, d2, x, s):
    """q^s ((p / q)^x - 1) / x, and its limit at x = 0."""
    q = tl.exp2(times(s, lq))
    limit = LN2 * tl.where(q > 0, q * d2, 0.0)
    far = tl.exp2(times(x, lp) + times(s - x, lq)) - q
    rise = tl.where(tl.abs(x * d2) < EXP2M1_RADIUS, exp2m1_times(q, x * d2), far)
    return tl.where(x == 0, limit, rise / tl.where(x == 0, 1.0, x))


@triton.jit
def alpha_beta(lp, lq, p, q, d, d2, c, a, b):
    """(g(s) - g(a)) / b with g(x) = growth and s = a + b, or the same with the roles exchanged: the
    order that divides is the larger. Near 0 the first orders of both cancel.
    """
    some = tl.maximum(lp, lq) > -float("inf")
    swap = tl.abs(a) > tl.abs(b)
    low, high = tl.where(swap, b, a), tl.where(swap, a, b)
    high = tl.where(high == 0, 1e-20, high)
    s = low + high
    x = tl.where(swap, -d2, d2)
    lm, lo = tl.where(swap, lq, lp), tl.where(swap, lp, lq)
    far = (growth(lm, lo, x, s, s) - growth(lm, lo, x, low, s)) / high
    far = tl.where(far == far, far, float("inf"))  # of infinite terms the larger
    near = tl.maximum(tl.abs(s * x), tl.abs(low * x)) < EXP2M1_RADIUS
    curved = (s * exp2m1_remainder(s * x) - low * exp2m1_remainder(low * x)) / high
    value = tl.where(near, tl.exp2(times(s, lo)) * (x * x) * curved, far)
    slope = -growth(lp, lq, d2, a, a + b)
    slope = tl.where(slope == slope, slope, float("inf"))
    fault = (p + q) * 0.0  # NaN of a broken row, which `far` has not kept
    return tl.where(some, value, 0.0) + fault, tl.where(some, slope, 0.0) - q * c


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
    "todi": Device(todi),
    "taid": Device(taid, taid_outer),
    "alpha_beta": Device(alpha_beta),
    "dkd": Device(forward_kl, label_aware.dkd_outer, at_label=label_aware.dkd_at_label),
    "nkd": Device(
        label_aware.cross_entropy, label_aware.nkd_outer, at_label=label_aware.nkd_at_label
    ),
}
# With the roles exchanged, of those that say `dual_on_device`.
EXCHANGED = {
    exchanged("dkd"): Device(
        reverse_kl, label_aware.dkd_exchanged_outer, REVERSE_KL, label_aware.dkd_exchanged_at_label
    ),
    exchanged("nkd"): Device(
        label_aware.cross_entropy_exchanged,
        label_aware.nkd_exchanged_outer,
        SLOPE_SUM,
        label_aware.nkd_exchanged_at_label,
    ),
}
# What has their slope in fewer instructions, of rows whose value the first sweep's sums give.
SLOPES = {"forward_kl": forward_slope, "reverse_kl": reverse_kl}
# What serves in their place where a, or b = 1 - a, is below NEAR_END, and they lose digits.
NEAR_END = 1 / 16
LEAST_WEIGHT = 2.0**-126  # in fp32 one below is 0, which also removes an infinite term
NEAR_ZERO = {
    "jsd": Device(jsd_ends),
    "alpha": Device(alpha_near_zero, constant=SLOPE_SUM),
    "renyi": Device(renyi_near_zero, renyi_outer),
}
NEAR_ONE = {
    "jsd": Device(jsd_ends),
    "skew_reverse_kl": Device(skew_reverse_kl_near_one),
    "alpha": Device(alpha_near_one),
    "renyi": Device(renyi_near_one, renyi_outer),
}


def device_of(name: str, a: float, b: float) -> Device:
    """The entry of table 2, or what the user's own class brings."""
    if name == "taid" and b == 0:
        return Device(forward_kl, constant=NONE)
    if name == "jeffreys" and b < LEAST_WEIGHT:
        return Device(jeffreys_forward, constant=NONE)
    if name == "jeffreys" and a < LEAST_WEIGHT:
        return Device(jeffreys_reverse)
    if (name, b) == (exchanged("dkd"), 0) or (name, a) == (exchanged("nkd"), 0):
        # Without the others, whose divergence may be infinite.
        return EXCHANGED[name]._replace(evaluate=forward_kl, constant=NONE)
    near = NEAR_ZERO if abs(a) < NEAR_END else NEAR_ONE if abs(b) < NEAR_END else {}
    device = near.get(name) or TABLE.get(name) or EXCHANGED.get(name)
    device = device or Divergence.of_name(name).device
    if device is None:
        raise NotImplementedError(
            f"divergence {name!r} has no device function: give its class a `device`, a "
            "fastkd.kernels.divergences.Device, or use backend='torch'"
        )
    return device
