"""Kullback-Leibler divergences, either way and both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import NONE, REVERSE_KL, Divergence, check_weights
from .pair import LN2, Descent, Pair, plogr


@dataclass(frozen=True)
class ForwardKL(Divergence):
    r"""Forward Kullback-Leibler divergence: KL(p || q) = sum p (log p - log q).

    The classical distillation loss: the student must cover all of the teacher's mass.
    +inf where the student masks an entry that the teacher does not.

    Source: Kullback & Leibler 1951; Hinton, Vinyals & Dean 2015, arXiv 1503.02531.

    Example:
        >>> import torch, fastkd
        >>> z, y = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.0, 2.0]])
        >>> round(fastkd.distillation_loss(z, y, divergence=fastkd.ForwardKL()).item(), 4)
        1.1504
    """

    name = "forward_kl"
    sharded = True
    by_name = True
    least_in_fp32 = 1 / 128  # above it, off by 1e-4 of itself at most
    constant = NONE
    cancels = False

    @staticmethod
    def value(lp, lq, a, b):
        return plogr(lp, lp - lq)

    @staticmethod
    def curvature(a, b):
        return 1.0

    @classmethod
    def value_and_descent(cls, pair, a, b):
        p = pair.teacher
        return _forward(pair, lambda: pair.log2_ratio(p.log2_exp).mul_(p.exp))

    def dual(self):
        return ReverseKL.name, self.parameters, 1.0


@dataclass(frozen=True)
class ReverseKL(Divergence):
    r"""Reverse Kullback-Leibler divergence: KL(q || p) = sum q (log q - log p).

    Mode-seeking: the student may leave out modes of the teacher. +inf, with gradient 0 in that
    row, where the teacher masks an entry that the student does not.

    Source: Gu et al. 2024 (MiniLLM), arXiv 2306.08543.

    Example:
        >>> import torch, fastkd
        >>> z, y = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.0, 2.0]])
        >>> round(fastkd.distillation_loss(z, y, divergence="reverse_kl").item(), 4)
        1.1504
    """

    name = "reverse_kl"
    sharded = True
    by_name = True
    least_in_fp32 = 1 / 128  # above it, off by 1e-4 of itself at most
    constant = REVERSE_KL

    @staticmethod
    def value(lp, lq, a, b):
        return plogr(lq, lq - lp)

    @staticmethod
    def curvature(a, b):
        return 1.0

    @classmethod
    def value_and_descent(cls, pair, a, b):
        return _reverse(pair, pair.log2_ratio(pair.teacher.log2_exp).mul_(pair.student.exp))

    def dual(self):
        return ForwardKL.name, self.parameters, 1.0


@dataclass(frozen=True)
class Jeffreys(Divergence):
    r"""Jeffreys divergence, weighted: forward * KL(p || q) + reverse * KL(q || p).

    Args:
        forward: weight >= 0 of KL(p || q).
        reverse: weight >= 0 of KL(q || p); not both 0.

    Source: Jeffreys 1946; weights of 1/2 each are torchtune's symmetric loss.

    Example:
        >>> import torch, fastkd
        >>> z, y = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.0, 2.0]])
        >>> round(fastkd.distillation_loss(z, y, divergence=fastkd.Jeffreys(0.5, 0.5)).item(), 4)
        1.1504
    """

    forward: float = 1.0
    reverse: float = 1.0

    name = "jeffreys"
    sharded = True
    by_name = True
    least_in_fp32 = 1 / 128  # above it, off by 1e-4 of itself at most
    constant = REVERSE_KL

    def __post_init__(self):
        check_weights(self)

    @staticmethod
    def value(lp, lq, a, b):
        forward = a * plogr(lp, lp - lq) if a else torch.zeros_like(lp)
        return forward + b * plogr(lq, lq - lp) if b else forward

    @staticmethod
    def curvature(a, b):
        return a + b

    @classmethod
    def value_and_descent(cls, pair, a, b):
        log2_ratio = pair.log2_ratio(pair.teacher.log2_exp)
        forward, one = _forward(
            pair, lambda: torch.mul(log2_ratio, pair.teacher.exp, out=pair.new())
        )
        reverse, other = _reverse(pair, log2_ratio.mul_(pair.student.exp))
        terms = other.terms.mul_(other.factor / one.factor * b).add_(one.terms, alpha=a)
        return a * forward + b * reverse, Descent(
            terms, one.factor, a * one.total + b * other.total
        )

    def dual(self):
        return self.name, (self.reverse, self.forward), 1.0


# --- from the exponentials times `log2_ratio` --------------------------------------------------


def _forward(pair: Pair, products: Callable[[], Tensor]) -> tuple[Tensor, Descent]:
    """Forward KL; with the products of the teacher's terms."""
    p = pair.teacher
    factor = p.sum_exp.reciprocal()
    sums = pair.total_log2_ratio(p, products)
    return torch.addcmul(pair.gap, sums, factor, value=LN2), Descent(p.exp, factor, 1.0)


def _reverse(pair: Pair, products: Tensor) -> tuple[Tensor, Descent]:
    """Reverse KL; with the products of the student's terms."""
    factor = LN2 / pair.student.sum_exp
    sums = pair.total_log2_ratio(pair.student, lambda: products) * factor
    return -(sums + pair.gap), Descent(products, factor, sums)
