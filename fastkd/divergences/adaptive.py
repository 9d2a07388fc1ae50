"""Divergences whose target or weights follow the student, without a gradient of their own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastkd.scalars import own_numbers

from .base import LOG_MIXTURE, Divergence
from .orders import log_escort
from .pair import MASKED_BELOW, plogr


@dataclass(frozen=True)
class TAID(Divergence):
    r"""Temporally adaptive interpolated distillation: KL(m || q), m = softmax((1 - t) z + t y).

    z and y are the logits over their temperatures, and the student in m gets no gradient: that of
    the loss is q - m, the gradient of the Renyi divergence of order t. At t = 1 it is forward KL.
    +inf, with gradient 0 in that row, for disjoint supports.

    Args:
        t: share of the teacher in the target, in (0, 1]. The source raises it from 0.4 to 1 in the
            course of training.

    Source: Shing et al. 2025, arXiv 2501.16937.

    Example:
        >>> import torch, fastkd
        >>> z = torch.tensor([[2.0, 1.0]]).log().requires_grad_()
        >>> fastkd.distillation_loss(
        ...     z, torch.tensor([[1.0, 2.0]]).log(), divergence=fastkd.TAID(t=0.5)).backward()
        >>> round(z.grad[0, 0].item(), 4)
        0.1667
    """

    t: float = 0.5

    name = "taid"
    constant = LOG_MIXTURE

    def __post_init__(self):
        own_numbers(self)
        if not 0 < self.t <= 1:
            raise ValueError(
                f"TAID: t must lie in (0, 1], got {self.t!r}; at 0 the student is its own target"
            )

    @property
    def parameters(self):
        return (self.t, 1 - self.t)

    @classmethod
    def of_rows(cls, lp, lq, a, b, labels=None):
        lw = log_escort(lp, lq.detach(), a) if b else lp
        apart = lw.amax(-1, keepdim=True) < MASKED_BELOW
        lm = torch.where(apart, 0.0, lw).log_softmax(-1)
        value = plogr(lm, lm - torch.where(apart, 0.0, lq)).sum(-1)
        return torch.where(apart[:, 0], math.inf, value)


@dataclass(frozen=True)
class AKL(Divergence):
    r"""Adaptive Kullback-Leibler divergence: w KL(p || q) + (1 - w) KL(q || p), by row.

    w is the head's share of sum abs(p - q); the head are the entries that the teacher thinks
    likeliest, as many as it takes to reach a mass of mu. w has no gradient; it is 1/2 where p = q.
    By PyTorch on every device: to find the head would take the kernels ten sweeps more.

    Args:
        mu: mass of the head, in (0, 1). Entries as likely as the head's last belong to it.

    Source: Wu et al. 2024, arXiv 2404.02657.

    Example:
        >>> import torch, fastkd
        >>> z, y = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.0, 2.0]])
        >>> round(fastkd.distillation_loss(z, y, divergence=fastkd.AKL(mu=0.5)).item(), 4)
        1.1504
    """

    mu: float = 0.5

    name = "akl"
    has_device_function = False

    def __post_init__(self):
        own_numbers(self)
        if not 0 < self.mu < 1:
            raise ValueError(
                f"AKL: mu must lie in (0, 1), got {self.mu!r}; with all in the head, or nothing, "
                "it is 'forward_kl' or 'reverse_kl'"
            )

    @classmethod
    def of_rows(cls, lp, lq, a, b, labels=None):
        with torch.no_grad():
            gap = (lp.exp() - lq.exp()).abs()
            total = gap.sum(-1)
            head = torch.where(_head(lp, a), gap, 0.0).sum(-1)
            share = torch.where(total == 0, 0.5, head / total)
        forward, reverse = plogr(lp, lp - lq).sum(-1), plogr(lq, lq - lp).sum(-1)
        return share * forward + torch.where(share == 1, 0.0, (1 - share) * reverse)


@dataclass(frozen=True)
class ToDi(Divergence):
    r"""Token-wise distillation: sum w p d - (1 - w) q d, with d = log(p / q) and w = sigmoid(d).

    Forward KL where the student has too little, reverse KL where it has too much. w has no
    gradient, so the gradient differs from that of Jeffreys' divergence, KL(p || q) + KL(q || p),
    whose value it has.

    Source: Jung et al. 2025, arXiv 2505.16297.

    Example:
        >>> import torch, fastkd
        >>> z, y = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.0, 2.0]])
        >>> round(fastkd.distillation_loss(z, y, divergence=fastkd.ToDi()).item(), 4)
        2.3008
    """

    name = "todi"

    @staticmethod
    def value(lp, lq, a, b):
        empty = (lp == -math.inf) & (lq == -math.inf)
        w = (lp - lq).detach().masked_fill(empty, 0.0).sigmoid()
        return w * plogr(lp, lp - lq) + (1 - w) * plogr(lq, lq - lp)


# Logarithms that lie further below the largest have no mass that counts.
DEPTH, STEPS = 64.0, {torch.float32: 31, torch.float64: 60}


def _head(lp: Tensor, mass: float) -> Tensor:
    """Which entries are in the head, bool [R, V]: the least likely of them is found by halving an
    interval, since to sort takes longer.
    """
    p = lp.exp()
    high = lp.amax(-1, keepdim=True) + 1
    low = high - DEPTH
    for _ in range(STEPS[lp.dtype]):
        middle = (low + high) / 2
        enough = torch.where(lp >= middle, p, 0.0).sum(-1, keepdim=True) >= mass
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return lp >= low
