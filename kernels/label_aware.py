"""Divergences that look at a row's label, on the device: what `divergences.py` has of them.

"exchanged": with the roles of teacher and student exchanged.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastkd.kernels.arithmetic import LN2
from fastkd.kernels.terms import binary_kl, kl_terms, log_ratio, probabilities, surprisal, times


@triton.jit
def dkd_outer(total, c, a, b, label):
    value, _ = binary_kl(label.t_odds, label.s_odds, label.d)
    return tl.where(a > 0, a * value, 0.0) + tl.where(b > 0, b * total, 0.0)


@triton.jit
def dkd_at_label(total, c, a, b, label):
    _, slope = binary_kl(label.t_odds, label.s_odds, label.d)
    return b, a * slope


@triton.jit
def dkd_exchanged_outer(total, c, a, b, label):
    value, _ = binary_kl(label.s_odds, label.t_odds, -label.d)
    return tl.where(a > 0, a * value, 0.0) + tl.where(b > 0, b * total, 0.0)


@triton.jit
def dkd_exchanged_at_label(total, c, a, b, label):
    q, rest = probabilities(label.s_odds)
    size, lost = a * (q * rest), -label.d
    return b, tl.where((size == 0) & (tl.abs(lost) == float("inf")), 0.0, size * lost)


@triton.jit
def cross_entropy(lp, lq, p, q, d, d2, c, a, b):
    _, rise = kl_terms(p, q, log_ratio(p, d * -1.0))
    return times(p, lq) * -LN2, rise


@triton.jit
def nkd_outer(total, c, a, b, label):
    p, _ = probabilities(label.t_odds)
    return times(p, surprisal(label.s_odds)) + tl.where(a > 0, a * total, 0.0)


@triton.jit
def nkd_at_label(total, c, a, b, label):
    p, _ = probabilities(label.t_odds)
    _, rest = probabilities(label.s_odds)
    return a, -p * rest


@triton.jit
def cross_entropy_exchanged(lp, lq, p, q, d, d2, c, a, b):
    value = times(q, lp) * -LN2
    return value, value - q * c


@triton.jit
def nkd_exchanged_outer(total, c, a, b, label):
    q, _ = probabilities(label.s_odds)
    return times(q, surprisal(label.t_odds)) + tl.where(a > 0, a * total, 0.0)


@triton.jit
def nkd_exchanged_at_label(total, c, a, b, label):
    q, rest = probabilities(label.s_odds)
    size, lost = q * rest, surprisal(label.t_odds)
    return a, tl.where((size == 0) & (lost == float("inf")), 0.0, size * lost)
