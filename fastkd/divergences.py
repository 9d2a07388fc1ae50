"""Table 1: every divergence in PyTorch, as a textbook value and as a fast value with its gradient.

p = teacher and q = student probabilities, lp and lq their logs, d = lp - lq. A divergence is
outer(sum over the vocabulary of value(lp, lq)). Table 2, `kernels/divergences.py`, is the twin for
the device.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

__all__ = [
    "JSD",
    "TVD",
    "AlphaDivergence",
    "Divergence",
    "ForwardKL",
    "Jeffreys",
    "Renyi",
    "ReverseKL",
    "SkewKL",
    "SkewReverseKL",
]

# What the row constant c of a device function is, and with it in which sweep it is found.
NONE = "none"  # unused
REVERSE_KL = "reverse_kl"  # KL(q || p), from the first sweep
LOG_MIXTURE = "log_mixture"  # log sum p^a q^(1-a), from the first sweep
SLOPE_SUM = "slope_sum"  # the sum of the slopes at c = 0, from the second sweep


@dataclass(frozen=True)
class Divergence:
    r"""A divergence between teacher and student rows; subclass it to add one of your own.

    A subclass names itself and gives `value`; the PyTorch backend differentiates that. For speed
    it may give `value_and_pull` too, for the Triton backend `device`, and for the teacher's
    gradient there `dual`.

    Example:
        >>> import torch, fastkd
        >>> class SquaredHellinger(fastkd.Divergence):
        ...     name = "squared_hellinger"
        ...     @staticmethod
        ...     def value(lp, lq, a, b):
        ...         return 0.5 * ((lp / 2).exp() - (lq / 2).exp()) ** 2
        >>> z, y = torch.randn(4, 10, requires_grad=True), torch.randn(4, 10)
        >>> loss = fastkd.distillation_loss(z, y, divergence=SquaredHellinger())
        >>> loss.backward()
    """

    name: ClassVar[str]
    constant: ClassVar[str] = SLOPE_SUM
    # The loss is scaled by (T_s * T_t) ** (temperature_power / 2), which keeps the gradient's size.
    temperature_power: ClassVar[int] = 2
    # A fastkd.kernels.divergences.Device, for the Triton backend.
    device: ClassVar[Any] = None

    _classes: ClassVar[dict[str, type[Divergence]]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if not isinstance(cls.__dict__.get("name"), str):
            raise TypeError(f"{cls.__qualname__} needs a class attribute `name`, a string")
        Divergence._classes[cls.name] = cls

    @property
    def parameters(self) -> tuple[float, float]:
        """The run-time numbers (a, b) that `value`, `value_and_pull` and the device take."""
        return (0.0, 0.0)

    @staticmethod
    def value(lp: Tensor, lq: Tensor, a: float, b: float) -> Tensor:
        """The textbook term of each vocabulary entry, differentiable in lp and lq.

        -inf on either side must not give NaN: see `plogr`.
        """
        raise NotImplementedError

    @staticmethod
    def outer(total: Tensor, a: float, b: float) -> Tensor:
        """What the sum of the textbook values is mapped through; increasing."""
        return total

    @classmethod
    def value_and_pull(cls, pair: Pair, a: float, b: float) -> tuple[Tensor, Tensor]:
        """The divergence of each row, [R, 1], and the pull, [R, V], which is -d divergence / d lq.

        Any multiple of q may be added to the pull: it has no effect on the logits. Plain formulas
        serve: a row where they lose digits, or meet -inf, comes again in fp64, with -1e300 for
        -inf. What belongs to the pair must not be changed.
        """
        lp, leaf = pair.lp, pair.lq.detach()
        with _autograd():
            value = cls.value(lp, leaf.requires_grad_(), a, b).sum(-1, keepdim=True)
            value = cls.outer(value, a, b)
            (slope,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), slope.neg_()

    def dual(self) -> tuple[str, tuple[float, float], float]:
        """(name, parameters, factor): D(p, q) = factor * D'(q, p); for the teacher's gradient."""
        kind, name = type(self), f"{self.name} with roles exchanged"
        if name not in Divergence._classes:
            value = staticmethod(lambda lp, lq, a, b: kind.value(lq, lp, a, b))
            members = {"name": name, "value": value, "outer": staticmethod(kind.outer)}
            members["__module__"] = kind.__module__
            type(f"{kind.__name__}Dual", (Divergence,), members)
        return name, self.parameters, 1.0

    @staticmethod
    def of_name(name: str) -> type[Divergence]:
        return Divergence._classes[name]


@contextlib.contextmanager
def _autograd() -> Iterator[None]:
    """Autograd inside an operator, whose body the dispatcher runs with autograd's keys excluded."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


class Pair:
    """Rows of student and teacher logits, [R, V], and what divergences are made of, when needed.

    A scale is 1 / T: a number where all rows share it, else [R, 1]. `new()` is a buffer [R, V],
    for `out=`, from a store that outlasts the rows: fresh memory costs more than arithmetic.
    """

    def __init__(
        self,
        student: Tensor,
        teacher: Tensor,
        student_scale: float | Tensor,
        teacher_scale: float | Tensor,
        new: Callable[[], Tensor],
    ) -> None:
        self.student, self.teacher = student, teacher
        self.student_scale, self.teacher_scale = student_scale, teacher_scale
        self.new = new
        self.student_max, self._q, self._q_sum = _exponentials(student, student_scale, new())
        self.teacher_max, self._p, self._p_sum = _exponentials(teacher, teacher_scale, new())

    @cached_property
    def p(self) -> Tensor:
        return self._p.mul_(1 / self._p_sum)

    @cached_property
    def q(self) -> Tensor:
        return self._q.mul_(1 / self._q_sum)

    @cached_property
    def lp(self) -> Tensor:
        log_sum = self.teacher_max * self.teacher_scale + self._p_sum.log()
        return _affine(self.teacher, self.teacher_scale, -log_sum, self.new())

    @cached_property
    def lq(self) -> Tensor:
        log_sum = self.student_max * self.student_scale + self._q_sum.log()
        return _affine(self.student, self.student_scale, -log_sum, self.new())

    @cached_property
    def d(self) -> Tensor:
        """lp - lq, not made of them: the difference of logits keeps more digits."""
        gap = self.student_max * self.student_scale - self.teacher_max * self.teacher_scale
        gap -= (self._p_sum / self._q_sum).log()
        d = self.new()
        if self.teacher_scale is self.student_scale:
            return _affine(torch.sub(self.teacher, self.student, out=d), self.teacher_scale, gap, d)
        _affine(self.teacher, self.teacher_scale, gap, d)
        return d.sub_(self.student * self.student_scale)

    def times_q(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """rows * q, for [R, 1], in one pass whether q has been asked for or not."""
        out = self.new() if out is None else out
        if "q" in vars(self):
            return torch.mul(self.q, rows, out=out)
        return torch.mul(self._q, rows / self._q_sum, out=out)


def _exponentials(x: Tensor, scale: float | Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """max, exp((x - max) * scale) and its sum. exp2 takes half the time of exp."""
    top, scale = x.amax(-1, keepdim=True), scale * math.log2(math.e)
    terms = _affine(x, scale, top * -scale, out).exp2_()
    return top, terms, terms.sum(-1, keepdim=True)


def _affine(x: Tensor, scale: float | Tensor, shift: Tensor, out: Tensor) -> Tensor:
    """x * scale + shift, in one pass where the scale is a number."""
    if isinstance(scale, Tensor):
        return torch.mul(x, scale, out=out).add_(shift)
    return torch.add(shift, x, alpha=scale, out=out)


# --- helpers ---------------------------------------------------------------------------------


def plogr(lp: Tensor, r: Tensor) -> Tensor:
    """exp(lp) * r, and 0 where exp(lp) is 0, in value and in gradient."""
    p = lp.exp()
    return torch.where(p > 0, p * torch.where(p > 0, r, 0.0), 0.0)


def total(terms: Tensor) -> Tensor:
    return terms.sum(-1, keepdim=True)


def log_mixture(lp: Tensor, lq: Tensor, w: float) -> Tensor:
    """log(w p + (1 - w) q) in the log domain; -inf where both are."""
    if w == 0:
        return lq
    x, y = lp + math.log(w), lq + math.log1p(-w)
    empty = (x == -math.inf) & (y == -math.inf)
    mixed = torch.logaddexp(torch.where(empty, 0.0, x), torch.where(empty, 0.0, y))
    return torch.where(empty, -math.inf, mixed)


def _check_range(owner: str, name: str, value: float, low: float, high: float, hint: str) -> None:
    if not low < value < high:
        raise ValueError(f"{owner}: {name} must lie in ({low:g}, {high:g}), got {value!r}; {hint}")


# --- the divergences -------------------------------------------------------------------------


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
    constant = NONE

    @staticmethod
    def value(lp, lq, a, b):
        return plogr(lp, lp - lq)

    @classmethod
    def value_and_pull(cls, pair, a, b):
        return total(torch.mul(pair.p, pair.d, out=pair.new())), pair.p

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
    constant = REVERSE_KL

    @staticmethod
    def value(lp, lq, a, b):
        return plogr(lq, lq - lp)

    @classmethod
    def value_and_pull(cls, pair, a, b):
        pull = torch.mul(pair.q, pair.d, out=pair.new())
        return -total(pull), pull

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
    constant = REVERSE_KL

    def __post_init__(self):
        for name, weight in (("forward", self.forward), ("reverse", self.reverse)):
            if not 0 <= weight < math.inf:
                raise ValueError(f"Jeffreys: {name} must be a finite weight >= 0, got {weight!r}")
        if self.forward == 0 and self.reverse == 0:
            raise ValueError("Jeffreys: forward and reverse are both 0; give one a positive weight")

    @property
    def parameters(self):
        return (self.forward, self.reverse)

    @staticmethod
    def value(lp, lq, a, b):
        return a * plogr(lp, lp - lq) + b * plogr(lq, lq - lp)

    @classmethod
    def value_and_pull(cls, pair, a, b):
        forward = torch.mul(pair.p, pair.d, out=pair.new())
        reverse = torch.mul(pair.q, pair.d, out=pair.new())
        value = a * total(forward) - b * total(reverse)
        return value, reverse.mul_(b).add_(pair.p, alpha=a)

    def dual(self):
        return self.name, (self.reverse, self.forward), 1.0


@dataclass(frozen=True)
class JSD(Divergence):
    r"""Generalised Jensen-Shannon divergence, with m = beta p + (1 - beta) q:

    JSD = beta KL(p || m) + (1 - beta) KL(q || m).

    Bounded by the binary entropy of beta, finite for any masks. It tends to 0 at both ends of
    beta, with JSD/beta -> KL(p || q) and JSD/(1 - beta) -> KL(q || p); some trainers define the
    ends as those divergences instead.

    Args:
        beta: weight of the teacher, in (0, 1).

    Source: Lin 1991; Agarwal et al. 2024 (GKD), arXiv 2306.13649.

    Example:
        >>> import torch, fastkd
        >>> z, y = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.0, 2.0]])
        >>> round(fastkd.distillation_loss(z, y, divergence=fastkd.JSD(beta=0.5)).item(), 4)
        0.2476
    """

    beta: float = 0.5

    name = "jsd"

    def __post_init__(self):
        _check_range(
            "JSD", "beta", self.beta, 0, 1,
            "generalised JSD tends to 0 at both ends: use 'forward_kl' or 'reverse_kl' there",
        )  # fmt: skip

    @property
    def parameters(self):
        return (self.beta, 0.0)

    @staticmethod
    def value(lp, lq, a, b):
        lm = log_mixture(lp, lq, a)
        return a * plogr(lp, lp - lm) + (1 - a) * plogr(lq, lq - lm)

    @classmethod
    def value_and_pull(cls, pair, a, b):
        # Clamping changes nothing beyond rounding, but keeps infinities out.
        d = torch.clamp(pair.d, -80, 80, out=pair.new())
        p_to_m, q_to_m = _log_shares(d, a, pair.new())
        pull = q_to_m.mul_(pair.q).mul_(a - 1)
        return a * total(p_to_m.mul_(pair.p)) - total(pull), pull

    def dual(self):
        return self.name, (1 - self.beta, 0.0), 1.0


@dataclass(frozen=True)
class SkewKL(Divergence):
    r"""Skewed forward KL: KL(p || m) with m = alpha p + (1 - alpha) q.

    Bounded by -log(alpha), so masks of the student are safe. alpha = 0 is forward KL.

    Args:
        alpha: share of the teacher in the mixture, in [0, 1).

    Source: Ko et al. 2024 (DistiLLM), arXiv 2402.03898.

    Example:
        >>> import torch, fastkd
        >>> z, y = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.0, 2.0]])
        >>> round(fastkd.distillation_loss(z, y, divergence=fastkd.SkewKL(alpha=0.1)).item(), 4)
        0.8299
    """

    alpha: float = 0.1

    name = "skew_kl"

    def __post_init__(self):
        _check_skew("SkewKL", self.alpha)

    @property
    def parameters(self):
        return (self.alpha, 0.0)

    @staticmethod
    def value(lp, lq, a, b):
        return plogr(lp, lp - log_mixture(lp, lq, a))

    @classmethod
    def value_and_pull(cls, pair, a, b):
        if a == 0:
            return ForwardKL.value_and_pull(pair, a, b)
        share, log_share = _shares(pair.p, pair.q, a, pair)
        value = total(log_share.mul_(pair.p))
        return value, share.mul_(-a).add_(1).mul_(pair.p)

    def dual(self):
        return SkewReverseKL.name, self.parameters, 1.0


@dataclass(frozen=True)
class SkewReverseKL(Divergence):
    r"""Skewed reverse KL: KL(q || m) with m = (1 - alpha) p + alpha q.

    Bounded by -log(alpha), so masks of the teacher are safe. alpha = 0 is reverse KL.

    Args:
        alpha: share of the student in the mixture, in [0, 1).

    Source: Ko et al. 2024 (DistiLLM), arXiv 2402.03898.

    Example:
        >>> import torch, fastkd
        >>> z, y = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.0, 2.0]])
        >>> loss = fastkd.distillation_loss(z, y, divergence=fastkd.SkewReverseKL(alpha=0.1))
        >>> round(loss.item(), 4)
        0.8299
    """

    alpha: float = 0.1

    name = "skew_reverse_kl"

    def __post_init__(self):
        _check_skew("SkewReverseKL", self.alpha)

    @property
    def parameters(self):
        return (self.alpha, 0.0)

    @staticmethod
    def value(lp, lq, a, b):
        return plogr(lq, lq - log_mixture(lq, lp, a))

    @classmethod
    def value_and_pull(cls, pair, a, b):
        if a == 0:
            return ReverseKL.value_and_pull(pair, a, b)
        share, log_share = _shares(pair.q, pair.p, a, pair)
        pull = share.mul_(a).sub_(log_share).mul_(pair.q)
        return total(log_share.mul_(pair.q)), pull

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
    temperature_power = 1

    @staticmethod
    def value(lp, lq, a, b):
        return 0.5 * (lp.exp() - lq.exp()).abs()

    @classmethod
    def value_and_pull(cls, pair, a, b):
        value = 0.5 * total(torch.sub(pair.q, pair.p, out=pair.new()).abs_())
        return value, torch.sign(pair.d, out=pair.new()).mul_(pair.q).mul_(0.5)

    def dual(self):
        return self.name, self.parameters, 1.0


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
        return (self.alpha, 0.0)

    @staticmethod
    def value(lp, lq, a, b):
        p, q = lp.exp(), lq.exp()
        return (_escort(lp, lq, a) - a * p - (1 - a) * q) / (a * (a - 1))

    @classmethod
    def value_and_pull(cls, pair, a, b):
        w, top = _escorts(pair, a)
        scale = top.exp()
        return (scale * total(w) - 1) / (a * (a - 1)), w.mul_(scale / a)

    def dual(self):
        return self.name, (1 - self.alpha, 0.0), 1.0


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
        return (self.alpha, 0.0)

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
        return (mass.log() + top) / (a - 1), w.mul_(known)

    def dual(self):
        return self.name, (1 - self.alpha, 0.0), self.alpha / (1 - self.alpha)


def _check_skew(owner: str, alpha: float) -> None:
    if not 0 <= alpha < 1:
        raise ValueError(
            f"{owner}: alpha must lie in [0, 1), got {alpha!r}; at 1 the divergence is 0"
        )


def _escort(lp: Tensor, lq: Tensor, a: float) -> Tensor:
    """p^a q^(1-a), and 0 where both are 0; differentiable."""
    empty = (lp == -math.inf) & (lq == -math.inf)
    lp, lq = torch.where(empty, 0.0, lp), torch.where(empty, 0.0, lq)
    return torch.where(empty, 0.0, (a * lp + (1 - a) * lq).exp())


def _escorts(pair: Pair, a: float) -> tuple[Tensor, Tensor]:
    """p^a q^(1-a) / exp(top) and top, of each row the log of the largest."""
    log_w = torch.mul(pair.lq, 1 - a, out=pair.new()).add_(pair.lp, alpha=a)
    top = log_w.amax(-1, keepdim=True)
    return log_w.sub_(top).exp_(), top


def _shares(p: Tensor, q: Tensor, a: float, pair: Pair) -> tuple[Tensor, Tensor]:
    """p / m and its log for m = a p + (1 - a) q; finite where p, or both, are 0."""
    least = torch.finfo(p.dtype).tiny
    m = torch.mul(p, a, out=pair.new()).add_(q, alpha=1 - a).clamp_min_(least)
    share = torch.div(p, m, out=m)
    return share, torch.clamp(share, min=least, out=pair.new()).log_()


def _log_shares(d: Tensor, a: float, spare: Tensor) -> tuple[Tensor, Tensor]:
    """log p / m and log q / m for m = a p + (1 - a) q, in the place of d and in the spare buffer.

    The more there is of p in m, the better the first is known, and of q likewise.
    """
    logit = math.log(a / (1 - a))
    if a < 0.5:
        q_to_m = torch.add(d, logit, out=spare).neg_().sigmoid_().div_(1 - a).log_()
        return d.add_(q_to_m), q_to_m
    p_to_m = torch.add(d, logit, out=spare).sigmoid_().div_(a).log_()
    return p_to_m, torch.sub(p_to_m, d, out=d)
