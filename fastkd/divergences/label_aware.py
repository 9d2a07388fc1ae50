"""Divergences that tell a row's label from its other classes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastkd.scalars import own_numbers

from .base import NONE, Divergence, check_weights
from .pair import plogr


@dataclass(frozen=True)
class DKD(Divergence):
    r"""Decoupled knowledge distillation, with k the row's label:

    alpha KL([p_k, 1 - p_k] || [q_k, 1 - q_k]) + beta KL(p' || q'),

    where p' and q' are p and q without k, normalised again. Forward KL is the same with weights 1
    and 1 - p_k: DKD keeps what a certain teacher says of the other classes. Finite at p_k = 1 and
    q_k = 1, since 1 - p_k is summed over the others. Needs labels; rows with `ignore_index` do not
    count.

    Args:
        alpha: weight >= 0 of label against the rest.
        beta: weight >= 0 of the rest, 0.5 to 10 in the source; not both 0.

    Source: Zhao et al. 2022, arXiv 2203.08679, with T = 4 and a cross-entropy of weight 1.

    Example:
        >>> import torch, fastkd
        >>> q, p = torch.tensor([[0.4, 0.4, 0.2]]), torch.tensor([[0.5, 0.3, 0.2]])
        >>> loss = fastkd.distillation_loss(
        ...     q.log(), p.log(), torch.tensor([0]), divergence=fastkd.DKD(alpha=1, beta=8))
        >>> round(loss.item(), 4)
        0.0981
    """

    alpha: float = 1.0
    beta: float = 8.0

    name = "dkd"
    constant = NONE
    label_aware = True
    dual_on_device = True

    def __post_init__(self):
        check_weights(self)

    @classmethod
    def of_rows(cls, lp, lq, a, b, labels=None):
        p, p_rest, p_others = _apart(lp, labels)
        q, q_rest, q_others = _apart(lq, labels)
        value = torch.zeros_like(q)
        if a:
            value = value + a * (plogr(p, p - q) + plogr(p_rest, p_rest - q_rest))
        if b:
            value = value + b * plogr(p_others, p_others - q_others).sum(-1)
        return value


@dataclass(frozen=True)
class NKD(Divergence):
    r"""Normalised knowledge distillation, with k the row's label:

    -p_k log q_k - gamma sum over j != k of p'_j log q'_j,

    where p' and q' are p and q without k, normalised again. A cross-entropy: its least value is not
    0. Both terms are at the temperature; the source has the first at T = 1, where the two are the
    same. Needs labels; rows with `ignore_index` do not count.

    Args:
        gamma: weight >= 0 of the other classes.

    Source: Yang et al. 2023, arXiv 2303.13005, with gamma = 1.5, T = 1.

    Example:
        >>> import torch, fastkd
        >>> q, p = torch.tensor([[0.4, 0.4, 0.2]]), torch.tensor([[0.5, 0.3, 0.2]])
        >>> loss = fastkd.distillation_loss(
        ...     q.log(), p.log(), torch.tensor([0]), divergence=fastkd.NKD(gamma=1.5))
        >>> round(loss.item(), 4)
        1.4822
    """

    gamma: float = 1.5

    name = "nkd"
    constant = NONE
    label_aware = True
    dual_on_device = True

    def __post_init__(self):
        own_numbers(self)
        if not 0 <= self.gamma < math.inf:
            raise ValueError(f"NKD: gamma must be a finite weight >= 0, got {self.gamma!r}")

    @classmethod
    def of_rows(cls, lp, lq, a, b, labels=None):
        p, _, p_others = _apart(lp, labels)
        q, _, q_others = _apart(lq, labels)
        return plogr(p, -q) + (a * plogr(p_others, -q_others).sum(-1) if a else 0.0)


def _apart(logs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p_k and log(1 - p_k), [R], and log p of the others normalised again, -inf at k."""
    at = labels.long()[:, None]
    others = logs.scatter(-1, at, -math.inf)
    none = (others == -math.inf).all(-1, keepdim=True)
    rest = torch.where(none, 0.0, others).logsumexp(-1, keepdim=True)
    rest = torch.where(none, -math.inf, rest)
    return logs.gather(-1, at)[:, 0], rest[:, 0], torch.where(none, -math.inf, others - rest)
