"""The alpha-beta divergences, with all of their limits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastkd.scalars import own_numbers

from .base import Divergence

# A series replaces exp(x) - 1 - x for x below NEAR: in fp64, and where both orders are below SMALL,
# as the direct form then divides by a small number.
NEAR, SMALL = 0.5, 1 / 16
# Where both orders sum to less, the unlikely entries weigh so much, q^(a + b), that sides which
# differ little are far apart; where to more, a certain student's gradient is a smaller difference.
# fp64 then has all rows.
LEAST_SUM, MOST_SUM = 0.6, 3.0


@dataclass(frozen=True)
class AlphaBeta(Divergence):
    r"""Alpha-beta divergence, with a = alpha and b = beta:

    -1 / (a b) sum p^a q^b - a / (a + b) p^(a + b) - b / (a + b) q^(a + b),

    and its limits where a, b or a + b is 0. Forward KL at (1, 0), reverse KL at (0, 1), Amari's
    alpha divergence where a + b = 1, half the squared distance at (1, 1), half that of the
    logarithms at (0, 0). The limits are continuous, with 1 / a^2 and 1 / b^2; some ports have 1 / a
    and 1 / b. Where a + b is not 1 the size depends on the vocabulary, as V^(1 - a - b). +inf where
    a mask leaves it infinite.

    Args:
        alpha, beta: finite, of either sign.

    Source: Cichocki, Cruces & Amari 2011; Wang et al. 2025 (ABKD), arXiv 2505.04560, with (0.2,
    0.7).

    Example:
        >>> import torch, fastkd
        >>> z, y = torch.tensor([[2.0, 1.0]]).log(), torch.tensor([[1.0, 2.0]]).log()
        >>> loss = fastkd.distillation_loss(z, y, divergence=fastkd.AlphaBeta(alpha=0.2, beta=0.7))
        >>> round(loss.item(), 4)
        0.2468
    """

    alpha: float = 0.2
    beta: float = 0.7

    name = "alpha_beta"

    def __post_init__(self):
        own_numbers(self)
        for name, order in (("alpha", self.alpha), ("beta", self.beta)):
            if not -math.inf < order < math.inf:
                raise ValueError(f"AlphaBeta: {name} must be finite, got {order!r}")

    @staticmethod
    def value(lp, lq, a, b):
        if abs(a) > abs(b):
            return _terms(lq, lp, b, a)
        return _terms(lp, lq, a, b)

    @staticmethod
    def curvature(a, b):
        return 1.0 if a + b == 1 else None

    @classmethod
    def least_of(cls, a, b):
        return cls.least_in_fp32 if LEAST_SUM <= a + b <= MOST_SUM else math.inf

    def dual(self):
        return self.name, (self.beta, self.alpha), 1.0


def _terms(lp: Tensor, lq: Tensor, a: float, b: float) -> Tensor:
    """(g(a + b) - g(a)) / b with g(x) = q^(a + b) ((p / q)^x - 1) / x, for abs(a) <= abs(b)."""
    b = b or 1e-20  # whose difference quotient is the limit, 1/2 at a = 0
    s = a + b
    empty = (lp == -math.inf) & (lq == -math.inf)
    lp, lq = torch.where(empty, 0.0, lp), torch.where(empty, 0.0, lq)
    d = lp - lq
    far = (_growth(lp, lq, d, s, s) - _growth(lp, lq, d, a, s)) / b
    far = torch.where(far.isnan() & ~d.isnan(), math.inf, far)  # of infinite terms the larger
    near = torch.maximum((s * d).abs(), (a * d).abs()) < NEAR
    if d.dtype != torch.float64 and abs(b) > SMALL:
        near = torch.zeros_like(near)  # a row where the direct form fails comes again in fp64
    x = torch.where(near, d, 0.0)
    close = (s * _expm1_remainder(s * x) - a * _expm1_remainder(a * x)) / b
    terms = torch.where(near, _power(lq, s) * x * x * close, far)
    return torch.where(empty, 0.0, terms)


def _growth(lp: Tensor, lq: Tensor, d: Tensor, x: float, s: float) -> Tensor:
    """q^s ((p / q)^x - 1) / x, and its limit."""
    q = _power(lq, s)
    if x == 0:
        none = q == 0
        return torch.where(none, 0.0, q * torch.where(none, 0.0, d))
    near = (x * d).abs() < NEAR
    small = q * torch.where(near, x * d, 0.0).expm1()
    return torch.where(near, small, _power(lp, x) * _power(lq, s - x) - q) / x


def _power(logs: Tensor, x: float) -> Tensor:
    return (logs * x).exp() if x else torch.ones_like(logs)


def _expm1_remainder(x: Tensor) -> Tensor:
    """(e^x - 1 - x) / x^2 by its series, for abs(x) < 0.5."""
    series = torch.ones_like(x)
    for n in range(15, 2, -1):
        series = 1 + x / n * series
    return series / 2
