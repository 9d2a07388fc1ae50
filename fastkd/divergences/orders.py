"""Divergences with an order: Amari's alpha and Renyi's, both of sum p^a q^(1-a)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd.scalars import own_numbers

from .base import LOG_MIXTURE, Divergence
from .pair import LN2, MASKED, MASKED_BELOW, Descent, Pair

# Where |a (a - 1)| is less, and in fp64, S - 1 is summed entry by entry: it keeps its digits.
NEAR_END = 0.2


@dataclass(frozen=True)
class AlphaDivergence(Divergence):
    r"""Amari's alpha divergence: (sum p^a q^(1-a) - 1) / (a (a - 1)).

    Tends to forward KL as a -> 1 and to reverse KL as a -> 0; a = 1/2 is four times one minus
    the Bhattacharyya coefficient. +inf, with gradient 0 in that row, where the masks leave it
    infinite or its sum leaves the range of fp32.

    Args:
        alpha: the order a, finite, neither 0 nor 1. Losses and gradients have four digits at
            least for orders as near to these as 1e-3, and tend to the limits beyond.

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
    sharded = True
    constant = LOG_MIXTURE

    def __post_init__(self):
        own_numbers(self)
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

    @staticmethod
    def curvature(a, b):
        return 1.0

    @classmethod
    def value_and_descent(cls, pair, a, b):
        escorts = _escorts(pair, a)
        size = (escorts.log.exp() / a).to(escorts.share.terms.dtype)
        terms, factor, sums = escorts.share
        return escorts.excess / (a * (a - 1)), Descent(terms, factor * size, sums * size)

    def dual(self):
        return self.name, (1 - self.alpha, self.alpha), 1.0


@dataclass(frozen=True)
class Renyi(Divergence):
    r"""Renyi divergence of order a: log(sum p^a q^(1-a)) / (a - 1).

    Tends to forward KL as a -> 1. Its student gradient is that of TAID with interpolation a.
    +inf, with gradient 0 in that row, for disjoint supports, and for a > 1 where the student
    masks an entry that the teacher does not.

    Args:
        alpha: the order a, positive, finite, not 1. Losses and gradients have four digits at least
            for orders as near to 0 and 1 as 1e-3, and tend to the limits beyond.

    Source: Renyi 1961; van Erven & Harremoes 2014, arXiv 1206.2459.

    Example:
        >>> import torch, fastkd
        >>> z, y = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.0, 2.0]])
        >>> round(fastkd.distillation_loss(z, y, divergence=fastkd.Renyi(alpha=0.5)).item(), 4)
        0.618
    """

    alpha: float = 0.5

    name = "renyi"
    sharded = True
    constant = LOG_MIXTURE

    def __post_init__(self):
        own_numbers(self)
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
    def outer(total, a, b, *label):
        return total.log() / (a - 1)

    @classmethod
    def of_rows(cls, lp, lq, a, b, labels=None):
        return log_escort(lp, lq, a).logsumexp(-1) / (a - 1)

    @staticmethod
    def curvature(a, b):
        return a

    @classmethod
    def value_and_descent(cls, pair, a, b):
        escorts = _escorts(pair, a)
        terms, factor, sums = escorts.share
        known = torch.where(escorts.log.abs() < 1e100, factor, math.nan)  # infinite: no gradient
        return escorts.log / (a - 1), Descent(terms, known, sums)

    def dual(self):
        return self.name, (1 - self.alpha, self.alpha), self.alpha / (1 - self.alpha)


def _escort(lp: Tensor, lq: Tensor, a: float) -> Tensor:
    """p^a q^(1-a), and 0 where both are 0; differentiable."""
    return log_escort(lp, lq, a).exp()


def log_escort(lp: Tensor, lq: Tensor, a: float) -> Tensor:
    empty = (lp == -math.inf) & (lq == -math.inf)
    lp, lq = torch.where(empty, 0.0, lp), torch.where(empty, 0.0, lq)
    return torch.where(empty, -math.inf, a * lp + (1 - a) * lq)


class _Escorts(NamedTuple):
    """Of S = sum p^a q^(1-a), [R, 1] in fp64; its terms over S as a Descent, may lack some q."""

    log: Tensor  # log S
    excess: Tensor  # S - 1
    share: Descent


def _escorts(pair: Pair, a: float) -> _Escorts:
    double = pair.student.exp.dtype == torch.float64
    near = _excess(pair, a) if double or abs(a * (a - 1)) < NEAR_END else None
    w, shift, sum_exp = _weights(pair, a)
    log = sum_exp.double().log() + shift
    share = Descent(w, 1 / sum_exp, sum_exp / sum_exp)  # NaN where the sum is
    if near is None:
        return _Escorts(log, log.expm1(), share)
    terms, excess = near
    # Where S is far from 1, as by entries that one side masks, its logarithm has the digits.
    known = (excess.abs() < 0.5) & (log.abs() < 1)
    log = torch.where(known, excess.double().log1p(), log)
    if a < 0.5:
        size = 1 / (1 + excess)
        share = Descent(
            torch.where(known, terms, w),
            torch.where(known, size / pair.student.sum_exp, share.factor),
            torch.where(known, excess * size, share.total),
        )
    return _Escorts(log, torch.where(known, excess.double(), log.expm1()), share)


def _excess(pair: Pair, a: float) -> tuple[Tensor, Tensor]:
    """p^a q^(1-a) less q, or less p for an order near 1, over the sum of that side; its sum."""
    side, order = (pair.student, a) if a < 0.5 else (pair.teacher, a - 1)
    terms = pair.d(pair.new()).mul_(order).expm1_().mul_(side.exp)
    terms.masked_fill_(side.exp == 0, 0.0)
    return terms, pair.total_growth(side, order, terms) / side.sum_exp


def _weights(pair: Pair, a: float) -> tuple[Tensor, Tensor, Tensor]:
    """p^a q^(1-a) / exp(shift); shift, of a row the log of the largest, in fp64; and their sum."""
    p, q = pair.teacher, pair.student
    empty = None
    if not 0 <= a <= 1 and q.log2_exp.dtype == torch.float64:
        empty = (p.log2_exp < MASKED_BELOW) & (q.log2_exp < MASKED_BELOW)
    log2_exp = p.log2_exp.mul_(a).add_(q.log2_exp, alpha=1 - a)
    if empty is not None:
        log2_exp.masked_fill_(empty, MASKED)
    w, shift, sum_exp = pair.blend(log2_exp, a)
    return w, LN2 * shift.double() - a * p.log_sum - (1 - a) * q.log_sum, sum_exp
