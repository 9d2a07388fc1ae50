"""Divergences with an order: Amari's alpha and Renyi's, both of sum p^a q^(1-a)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import LOG_MIXTURE, Divergence
from .pair import LN2, Pair, Pull, total


@dataclass(frozen=True)
class AlphaDivergence(Divergence):
    r"""Amari's alpha divergence: (sum p^a q^(1-a) - 1) / (a (a - 1)).

    Tends to forward KL as a -> 1 and to reverse KL as a -> 0; a = 1/2 is four times one minus
    the Bhattacharyya coefficient. +inf, with gradient 0 in that row, where the masks leave it
    infinite or its sum leaves the range of fp32.

    Args:
        alpha: the order a, finite, neither 0 nor 1.

    Source: Amari 1985; Cichocki & Amari 2010.

    Example:
        >>> import torch, fastkd
        >>> z, y = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.0, 2.0]])
        >>> loss = fastkd.distillation_loss(z, y, divergence=fastkd.AlphaDivergence(alpha=0.5))
        >>> round(loss.item(), 4)
        1.0633
    """

    alpha: float = 0.5

    name = "alpha"
    constant = LOG_MIXTURE

    def __post_init__(self):
        if not -math.inf < self.alpha < math.inf or self.alpha in (0, 1):
            raise ValueError(
                f"AlphaDivergence: alpha must be finite and neither 0 nor 1, got {self.alpha!r}; "
                "use 'forward_kl' for the limit at 1, 'reverse_kl' for the limit at 0"
            )

    @property
    def parameters(self):
        return (self.alpha, 1 - self.alpha)

    @staticmethod
    def value(lp, lq, a, b):
        p, q = lp.exp(), lq.exp()
        return (_escort(lp, lq, a) - a * p - (1 - a) * q) / (a * (a - 1))

    @classmethod
    def value_and_pull(cls, pair, a, b):
        w, top = _escorts(pair, a)
        mass, scale = total(w), top.exp()
        factor = (scale / a).to(w.dtype)
        return (scale * mass - 1) / (a * (a - 1)), Pull(w, factor, factor * mass)

    def dual(self):
        return self.name, (1 - self.alpha, self.alpha), 1.0


@dataclass(frozen=True)
class Renyi(Divergence):
    r"""Renyi divergence of order a: log(sum p^a q^(1-a)) / (a - 1).

    Tends to forward KL as a -> 1. Its student gradient is that of TAID with interpolation a.
    +inf, with gradient 0 in that row, for disjoint supports, and for a > 1 where the student
    masks an entry that the teacher does not.

    Args:
        alpha: the order a, positive, finite, not 1.

    Source: Renyi 1961; van Erven & Harremoes 2014, arXiv 1206.2459.

    Example:
        >>> import torch, fastkd
        >>> z, y = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.0, 2.0]])
        >>> round(fastkd.distillation_loss(z, y, divergence=fastkd.Renyi(alpha=0.5)).item(), 4)
        0.618
    """

    alpha: float = 0.5

    name = "renyi"
    constant = LOG_MIXTURE

    def __post_init__(self):
        if not 0 < self.alpha < math.inf or self.alpha == 1:
            raise ValueError(
                f"Renyi: alpha must be positive, finite and not 1, got {self.alpha!r}; "
                "use 'forward_kl' for the limit at 1"
            )

    @property
    def parameters(self):
        return (self.alpha, 1 - self.alpha)

    @staticmethod
    def value(lp, lq, a, b):
        return _escort(lp, lq, a)

    @staticmethod
    def outer(total, a, b):
        return total.log() / (a - 1)

    @classmethod
    def value_and_pull(cls, pair, a, b):
        w, top = _escorts(pair, a)
        mass = total(w)
        known = torch.where(top.abs() < 1e100, 1 / mass, math.nan)  # infinite: no gradient
        return (mass.double().log() + top) / (a - 1), Pull(w, known, known * mass)

    def dual(self):
        return self.name, (1 - self.alpha, self.alpha), self.alpha / (1 - self.alpha)


def _escort(lp: Tensor, lq: Tensor, a: float) -> Tensor:
    """p^a q^(1-a), and 0 where both are 0; differentiable."""
    empty = (lp == -math.inf) & (lq == -math.inf)
    lp, lq = torch.where(empty, 0.0, lp), torch.where(empty, 0.0, lq)
    return torch.where(empty, 0.0, (a * lp + (1 - a) * lq).exp())


def _escorts(pair: Pair, a: float) -> tuple[Tensor, Tensor]:
    """p^a q^(1-a) / exp(top) and top, of each row the log of the largest, in fp64."""
    p, q = pair.teacher, pair.student
    depth = p.depth.mul_(a).add_(q.depth, alpha=1 - a)
    top = depth.amax(-1, keepdim=True)
    w = depth.sub_(top).exp2_()
    return w, LN2 * top.double() - a * p.log_mass - (1 - a) * q.log_mass
