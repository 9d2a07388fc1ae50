"""How far apart both sides of an owner's columns are, which says how a row is to be computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastkd.divergences.pair import LN2, Softmax, total

# In a row whose log-ratios are smaller, the difference of the sums is formed entry by entry.
SMALL = 1e-3


def apart(q: Softmax, p: Softmax, spare: Tensor) -> Tensor:
    """The total variation of both sides over these columns alone, [R, 1]."""
    excess = torch.addcmul(p.exp, q.exp, p.sum_exp / q.sum_exp, value=-1, out=spare)
    return total(excess.abs_()) / (2 * p.sum_exp)


def closeness(
    q: Softmax, p: Softmax, new: Callable[[], Tensor], tempered: bool
) -> dict[Any, Tensor]:
    """Of rows in fp64: how much the sides differ, and sums of their log-ratio d."""
    found = {name: torch.zeros_like(q.sum_exp) for name in ("mean", "square", "cross")}
    found["excess"] = p.sum_exp - q.sum_exp
    d = torch.sub(p.log2_exp, q.log2_exp, out=new()).mul_(LN2)
    d.masked_fill_((q.exp + p.exp) == 0, 0.0)
    spread = d.abs().amax(-1, keepdim=True)
    found["spread"] = spread
    small = (spread[:, 0] < SMALL).nonzero()[:, 0]
    if len(small):
        d, terms = d[small], q.exp[small]
        found["excess"][small] = total(d.expm1().mul_(terms))
        products = d * terms
        found["mean"][small] = total(products)
        found["square"][small] = total(products * d)
        if tempered:
            found["cross"][small] = total(products.mul_(q.log2_exp[small]).nan_to_num_(nan=0.0))
    return found
