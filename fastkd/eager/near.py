"""Rows whose sides are near each other: how near they are, and what is computed of them instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastkd.divergences.pair import LN2, MASKED, Descent, Pair, Softmax, total

from .blocks import Precision, Rows, of_rows

# In fp64, a divergence below CLOSE loses digits; where its log-ratios spread by less than SPREAD,
# its first term is as good. What is below ROUNDING has no digits.
CLOSE, SPREAD, ROUNDING = 1e-13, 1e-7, 1e-15
# In a row whose log-ratios are smaller, the difference of the sums is formed entry by entry.
SMALL = 1e-3


def apart(q: Softmax, p: Softmax, spare: Tensor) -> Tensor:
    """The total variation of both sides over these columns alone, [R, 1]."""
    excess = torch.addcmul(p.exp, q.exp, p.sum_exp / q.sum_exp, value=-1, out=spare)
    return total(excess.abs_()) / (2 * p.sum_exp)


def closeness(
    q: Softmax, p: Softmax, new: Callable[[], Tensor], tempered: bool
) -> dict[Any, Tensor]:
    """How much the sides differ, and, of rows in fp64, sums of their log-ratio d."""
    none = torch.zeros_like(q.sum_exp)
    found: dict[Any, Tensor] = dict.fromkeys(("mean", "square", "cross"), none)
    found |= {"excess": p.sum_exp - q.sum_exp, "spread": torch.ones_like(none)}
    if q.exp.dtype != torch.float64:
        return found
    d = torch.sub(p.log2_exp, q.log2_exp, out=new()).mul_(LN2)
    d.masked_fill_((q.exp + p.exp) == 0, 0.0)
    found["spread"] = spread = d.abs().amax(-1, keepdim=True)
    small = (spread[:, 0] < SMALL).nonzero()[:, 0]
    if len(small):
        d, terms = d[small], q.exp[small]
        found["excess"][small] = total(d.expm1().mul_(terms))
        products = d * terms
        found["mean"] = none.index_copy(0, small, total(products))
        found["square"] = none.index_copy(0, small, total(products * d))
        if tempered:
            products.mul_(q.log2_exp[small]).nan_to_num_(nan=0.0)
            found["cross"] = none.index_copy(0, small, total(products))
    return found


# --- the first term of a divergence of rows that differ little -----------------------------------


def serves(spread: Tensor, curvature: float | None) -> Tensor:
    """Whether it does: of an unknown curvature only where both sides are the same."""
    return spread == 0 if curvature is None else spread < SPREAD


def log_ratios(precision: Precision, rows: Rows, pair: Pair, some: Tensor) -> Tensor:
    """d of some of the rows, by their places among these, measured from both shifts, in fp64."""
    part, (q, p) = rows.only(some), (pair.student, pair.teacher)
    z, y = (x[part.outer, part.inner].double().clamp_min_(MASKED) for x in precision.sides)
    d = y.sub_(p.shift[some]).mul_(of_rows(precision.scales[-1], part))
    d -= z.sub_(q.shift[some]).mul_(of_rows(precision.scales[0], part))
    return d.masked_fill_(q.exp[some] + p.exp[some] == 0, 0.0)


def first_term(
    descent: Descent, some: Tensor, d: Tensor, q: Softmax, curvature: float | None
) -> Descent:
    """With that of some of its rows; d: their log-ratio, less its mean under q."""
    descent.terms[some] = (d * q.exp[some]).to(descent.terms.dtype)
    size = torch.ones_like(q.sum_exp)
    factor, sums = size * descent.factor, size * descent.total
    factor[some], sums[some] = (curvature or 0.0) / q.sum_exp[some], 0.0
    return Descent(descent.terms, factor, sums)
