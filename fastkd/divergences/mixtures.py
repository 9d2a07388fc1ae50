"""Divergences to a mixture of both, which masks cannot make infinite; and total variation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastkd.scalars import own_numbers

from .base import Divergence
from .kullback_leibler import ForwardKL, ReverseKL
from .pair import Descent, Pair, Softmax, plogr


@dataclass(frozen=True)
class JSD(Divergence):
    r"""Generalised Jensen-Shannon divergence, with m = beta p + (1 - beta) q:

    JSD = beta KL(p || m) + (1 - beta) KL(q || m).

    Bounded by the binary entropy of beta, finite for any masks. It tends to 0 at both ends of
    beta, with JSD/beta -> KL(p || q) and JSD/(1 - beta) -> KL(q || p); some trainers define the
    ends as those divergences instead.

    Args:
        beta: weight of the teacher, in (0, 1). Losses and gradients have four digits at least for
            weights as near to the ends as 1e-3, and tend to the limits beyond.

    Source: Lin 1991; Agarwal et al. 2024 (GKD), arXiv 2306.13649.

    Example:
        >>> import torch, fastkd
        >>> z, y = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.0, 2.0]])
        >>> round(fastkd.distillation_loss(z, y, divergence=fastkd.JSD(beta=0.5)).item(), 4)
        0.2476
    """

    beta: float = 0.5

    name = "jsd"
    sharded = True
    least_in_fp32 = 1 / 256  # off by 2e-7 at most

    def __post_init__(self):
        own_numbers(self)
        if not 0 < self.beta < 1:
            raise ValueError(
                f"JSD: beta must lie in (0, 1), got {self.beta!r}; generalised JSD tends to 0 at "
                "both ends: use 'forward_kl' or 'reverse_kl' there"
            )

    @property
    def parameters(self):
        return (self.beta, 1 - self.beta)

    @staticmethod
    def value(lp, lq, a, b):
        lm = log_mixture(lp, lq, a)
        return a * plogr(lp, lp - lm) + (1 - a) * plogr(lq, lq - lm)

    @staticmethod
    def curvature(a, b):
        return a * (1 - a)

    @staticmethod
    def most(a, b):
        return (a - 1) * math.log1p(-a)

    @classmethod
    def value_and_descent(cls, pair, a, b):
        p, q = pair.teacher, pair.student
        p_to_m, q_to_m = _log_shares(pair.d(p.log2_exp).clamp_(-MOST, MOST), a, pair.new())
        terms, factor = q_to_m.mul_(q.exp), (a - 1) / q.sum_exp
        sums = pair.total(terms) * factor
        return a * pair.total_product(p_to_m, p) / p.sum_exp - sums, Descent(terms, factor, sums)

    def dual(self):
        return self.name, (1 - self.beta, self.beta), 1.0


@dataclass(frozen=True)
class _Skewed:
    """What both skewed divergences have in common."""

    alpha: float = 0.1  # the share of its first side in the mixture

    least_in_fp32 = 1 / 128  # above it, off by 1e-4 of itself at most

    def __post_init__(self):
        own_numbers(self)
        if not 0 <= self.alpha < 1:
            raise ValueError(
                f"{type(self).__name__}: alpha must lie in [0, 1), got {self.alpha!r}; at 1 the "
                "divergence is 0"
            )

    @property
    def parameters(self):
        return (self.alpha, 1 - self.alpha)

    @staticmethod
    def curvature(a, b):
        return (1 - a) ** 2


@dataclass(frozen=True)
class SkewKL(_Skewed, Divergence):
    r"""Skewed forward KL: KL(p || m) with m = alpha p + (1 - alpha) q.

    Bounded by -log(alpha), so masks of the student are safe. alpha = 0 is forward KL.

    Args:
        alpha: share of the teacher in the mixture, in [0, 1). Losses and gradients have four
            digits at least for shares as near to the ends as 1e-3, and tend to the limits beyond.

    Source: Ko et al. 2024 (DistiLLM), arXiv 2402.03898.

    Example:
        >>> import torch, fastkd
        >>> z, y = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.0, 2.0]])
        >>> round(fastkd.distillation_loss(z, y, divergence=fastkd.SkewKL(alpha=0.1)).item(), 4)
        0.8299
    """

    name = "skew_kl"
    sharded = True

    @staticmethod
    def value(lp, lq, a, b):
        return plogr(lp, lp - log_mixture(lp, lq, a))

    @classmethod
    def value_and_descent(cls, pair, a, b):
        if a == 0:
            return ForwardKL.value_and_descent(pair, a, b)
        p, q = pair.teacher, pair.student
        share, log_share = _shares(pair, p, q, a)
        value = pair.total_product(log_share, p) / p.sum_exp
        # p - a p p / m, without the difference: next to nothing is left where p lacks all of q.
        return value, _descent(pair, share.mul_(q.exp), (1 - a) / q.sum_exp)

    def dual(self):
        return SkewReverseKL.name, self.parameters, 1.0


@dataclass(frozen=True)
class SkewReverseKL(_Skewed, Divergence):
    r"""Skewed reverse KL: KL(q || m) with m = (1 - alpha) p + alpha q.

    Bounded by -log(alpha), so masks of the teacher are safe. alpha = 0 is reverse KL.

    Args:
        alpha: share of the student in the mixture, in [0, 1). Losses and gradients have four
            digits at least for shares as near to the ends as 1e-3, and tend to the limits beyond.

    Source: Ko et al. 2024 (DistiLLM), arXiv 2402.03898.

    Example:
        >>> import torch, fastkd
        >>> z, y = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.0, 2.0]])
        >>> loss = fastkd.distillation_loss(z, y, divergence=fastkd.SkewReverseKL(alpha=0.1))
        >>> round(loss.item(), 4)
        0.8299
    """

    name = "skew_reverse_kl"
    sharded = True

    @staticmethod
    def value(lp, lq, a, b):
        return plogr(lq, lq - log_mixture(lq, lp, a))

    @staticmethod
    def most(a, b):
        return abs(1 + math.log(a)) if a else math.inf

    @classmethod
    def value_and_descent(cls, pair, a, b):
        if a == 0:
            return ReverseKL.value_and_descent(pair, a, b)
        q = pair.student
        share, log_share = _shares(pair, q, pair.teacher, a)
        descent = _descent(pair, share.mul_(a).sub_(log_share).mul_(q.exp), 1 / q.sum_exp)
        return pair.total_product(log_share, q) / q.sum_exp, descent

    def dual(self):
        return SkewKL.name, self.parameters, 1.0


@dataclass(frozen=True)
class TVD(Divergence):
    r"""Total variation distance: 1/2 sum abs(p - q), in [0, 1].

    Its gradient falls as 1/T, not 1/T^2, so scale_by_temperature multiplies it by
    sqrt(T_s T_t). The derivative of abs at 0 is taken as 0.

    Source: Wen et al. 2023 (f-DISTILL), arXiv 2307.15190.

    Example:
        >>> import torch, fastkd
        >>> z, y = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.0, 2.0]])
        >>> round(fastkd.distillation_loss(z, y, divergence="tvd").item(), 4)
        0.5752
    """

    name = "tvd"
    sharded = True
    by_name = True
    temperature_power = 1

    @staticmethod
    def value(lp, lq, a, b):
        return 0.5 * (lp.exp() - lq.exp()).abs()

    @staticmethod
    def most(a, b):
        return 0.5

    @classmethod
    def value_and_descent(cls, pair, a, b):
        p, q = pair.teacher, pair.student
        ratio = p.sum_exp / q.sum_exp
        excess = torch.addcmul(p.exp, q.exp, ratio, value=-1, out=pair.spare())  # of p over q
        terms = torch.sign(excess, out=pair.new()).mul_(q.exp)
        return 0.5 * pair.total(excess.abs_()) / p.sum_exp, _descent(pair, terms, 0.5 / q.sum_exp)

    def dual(self):
        return self.name, self.parameters, 1.0


# Log-ratios are clamped to it, which changes nothing beyond rounding, but keeps infinities out.
MOST = 80

# --- helpers ---------------------------------------------------------------------------------


def log_mixture(lp: Tensor, lq: Tensor, w: float) -> Tensor:
    """log(w p + (1 - w) q) in the log domain; -inf where both are."""
    if w == 0:
        return lq
    x, y = lp + math.log(w), lq + math.log1p(-w)
    empty = (x == -math.inf) & (y == -math.inf)
    mixed = torch.logaddexp(torch.where(empty, 0.0, x), torch.where(empty, 0.0, y))
    return torch.where(empty, -math.inf, mixed)


def _shares(pair: Pair, p: Softmax, q: Softmax, a: float) -> tuple[Tensor, Tensor]:
    """p / m and its log for m = a p + (1 - a) q, in buffers; finite where p, or both, are 0.

    p and q are the sides of the pair, either way round.
    """
    m, spare = pair.spare(), pair.new()
    if m.dtype == torch.float64:
        d = pair.d(m) if p is pair.teacher else pair.d(m).neg_()
        log_share = _log_share(d.clamp_(-MOST, MOST), a, spare)
        return torch.exp(log_share, out=m), log_share
    # It keeps m from being 0: beside any other number it is nothing, and it takes no pass.
    least = m.new_full((), torch.finfo(m.dtype).tiny)
    torch.add(least, p.exp, alpha=a, out=m).addcmul_(q.exp, (1 - a) * p.sum_exp / q.sum_exp)
    share = torch.addcdiv(least, p.exp, m, out=m)
    return share, torch.log(share, out=spare)


def _log_share(d: Tensor, a: float, out: Tensor) -> Tensor:
    """log p / m for m = a p + (1 - a) q, to the last digit where d = log p / q is small."""
    return torch.neg(d, out=out).expm1_().mul_(1 - a).log1p_().neg_()


def _descent(pair: Pair, terms: Tensor, factor: Tensor) -> Descent:
    return Descent(terms, factor, pair.total(terms) * factor)


def _log_shares(d: Tensor, a: float, spare: Tensor) -> tuple[Tensor, Tensor]:
    """log p / m and log q / m for m = a p + (1 - a) q, in the place of d and in the spare buffer.

    The more there is of p in m, the better the first is known, and of q likewise.
    """
    if d.dtype == torch.float64:
        p_to_m = _log_share(d, a, spare)
        return p_to_m, _log_share(d.neg_(), 1 - a, d)
    logit = math.log(a / (1 - a))
    if a < 0.5:
        q_to_m = torch.add(d, logit, out=spare).neg_().sigmoid_().div_(1 - a).log_()
        return d.add_(q_to_m), q_to_m
    p_to_m = torch.sigmoid(torch.add(d, logit, out=spare) if logit else d, out=spare)
    p_to_m.div_(a).log_()
    return p_to_m, torch.sub(p_to_m, d, out=d)
