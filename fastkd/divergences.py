"""Table 1: every divergence in PyTorch, as a textbook value and as a stable value with its slope.

p = teacher and q = student probabilities, lp and lq their logs, d = lp - lq. A divergence is
outer(sum over the vocabulary of value(lp, lq)). Table 2, `kernels/divergences.py`, is the twin for
the device. `kernels/README.md` derives the stable forms.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
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

# What the row constant c of `value_and_slope` is, and with it in which sweep it is found.
NONE = "none"  # unused
REVERSE_KL = "reverse_kl"  # KL(q || p), from the first sweep
LOG_MIXTURE = "log_mixture"  # log sum p^a q^(1-a), from the first sweep
SLOPE_SUM = "slope_sum"  # the sum of the slopes at c = 0, from the second sweep


@dataclass(frozen=True)
class Divergence:
    r"""A divergence between teacher and student rows; subclass it to add one of your own.

    A subclass names itself and gives `value`; the PyTorch backend differentiates that. For speed
    and for small divergences it may give `value_and_slope` too, for the Triton backend `device`,
    and for the teacher's gradient there `dual`.

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
        """The run-time numbers (a, b) that `value`, `value_and_slope` and the device take."""
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
    def value_and_slope(
        cls, lp: Tensor, lq: Tensor, p: Tensor, q: Tensor, d: Tensor, c: Tensor, a: float, b: float
    ) -> tuple[Tensor, Tensor]:
        """Stable value, and gradient of the row's divergence to the student's tempered logits.

        d is finite where p and q are 0, else +-inf where one of them is.
        c is the row constant (`constant` says which), [rows, 1]. With SLOPE_SUM the second result
        is slope - q * c, where slope = d value / d lq and c, once known, its sum over the row.
        """
        with _autograd():
            leaf = lq.detach().requires_grad_()
            value = cls.value(lp.detach(), leaf, a, b)
            (slope,) = torch.autograd.grad(cls.outer(value.sum(-1), a, b).sum(), leaf)
        return value.detach(), slope - q * c

    @classmethod
    def stable_outer(cls, total: Tensor, c: Tensor, a: float, b: float) -> Tensor:
        """What the row sum of the stable values is mapped through."""
        return cls.outer(total, a, b)

    def dual(self) -> tuple[str, tuple[float, float], float]:
        """(name, parameters, factor) with D(p, q) = factor * D'(q, p), for the teacher's gradient."""
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


# --- helpers ---------------------------------------------------------------------------------


def plogr(lp: Tensor, r: Tensor) -> Tensor:
    """exp(lp) * r, and 0 where exp(lp) is 0, in value and in gradient."""
    p = lp.exp()
    return torch.where(p > 0, p * torch.where(p > 0, r, 0.0), 0.0)


def log_mixture(lp: Tensor, lq: Tensor, w: float) -> Tensor:
    """log(w p + (1 - w) q) in the log domain; -inf where both are."""
    if w == 0:
        return lq
    x, y = lp + math.log(w), lq + math.log1p(-w)
    empty = (x == -math.inf) & (y == -math.inf)
    mixed = torch.logaddexp(torch.where(empty, 0.0, x), torch.where(empty, 0.0, y))
    return torch.where(empty, -math.inf, mixed)


def times(p: Tensor, r: Tensor) -> Tensor:
    """p * r, and 0 where p is 0."""
    product = p * r
    if not math.isfinite(product.sum()):  # comparing and selecting cost more than all the rest
        product = torch.where(p > 0, product, 0.0)
    return product


def kl_terms(p: Tensor, m: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """(p phi, m - p) where m = p e^x, phi = e^x - 1 - x >= 0; exact to rounding for small x too.

    As m - p sums to 0, p phi sums to KL(p || m) without cancellation.
    """
    if x.dtype == torch.float32 and x.abs().amax() < 0.25:
        phi = x * (1 / 720) + 1 / 120
        for coefficient in (1 / 24, 1 / 6, 1 / 2):
            phi = phi.mul_(x).add_(coefficient)
        phi = phi.mul_(x).mul_(x)
        return p * phi, phi.add_(x).mul_(p)
    growth = torch.expm1(x)
    rise, term = p * growth, p * (growth - x)
    if not math.isfinite(term.sum()):  # p or m is 0 or nearly so somewhere
        small = x.abs() < 1
        rise = torch.where(small, rise, m - p)
        term = torch.where(small, term, rise - torch.where(p > 0, p * x, 0.0))
    return term.clamp_min_(0.0), rise


def log_mixture_ratio(x: Tensor, w: float) -> Tensor:
    """log(w + (1 - w) e^x), which is log m - log p for m = w p + (1 - w) q, x = log q - log p."""
    if w == 0:
        return x
    x = x.clamp_min(-80.0)
    return x + torch.log1p(w * torch.expm1(-x))


def log_escort(lp: Tensor, lq: Tensor, a: float) -> Tensor:
    """log(p^a q^(1-a)); -inf where p and q are 0."""
    log_w = a * lp + (1 - a) * lq
    return torch.where(log_w.isnan(), -math.inf, log_w) if log_w.isnan().any() else log_w


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
    def value_and_slope(cls, lp, lq, p, q, d, c, a, b):
        return kl_terms(p, q, -d)

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
    def value_and_slope(cls, lp, lq, p, q, d, c, a, b):
        term, _ = kl_terms(q, p, d)
        return term, -times(q, d + c)

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
    def value_and_slope(cls, lp, lq, p, q, d, c, a, b):
        forward, rise = kl_terms(p, q, -d)
        reverse, _ = kl_terms(q, p, d)
        return a * forward + b * reverse, a * rise - b * times(q, d + c)

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
    def value_and_slope(cls, lp, lq, p, q, d, c, a, b):
        m = a * p + (1 - a) * q
        from_p, from_q = log_mixture_ratio(-d, a), log_mixture_ratio(d, 1 - a)
        value = a * kl_terms(p, m, from_p)[0] + (1 - a) * kl_terms(q, m, from_q)[0]
        return value, -times(q, (1 - a) * from_q + c)

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
    def value_and_slope(cls, lp, lq, p, q, d, c, a, b):
        m = a * p + (1 - a) * q
        ratio = log_mixture_ratio(-d, a)
        share = 1 / (1 - a + a * d.clamp_max(80.0).exp())  # q / m
        value, rise = kl_terms(p, m, ratio)
        return value, (1 - a) * share * rise - q * c

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
    def value_and_slope(cls, lp, lq, p, q, d, c, a, b):
        m = (1 - a) * p + a * q
        ratio = log_mixture_ratio(d, a)
        return kl_terms(q, m, ratio)[0], -times(q, ratio + c + a * torch.expm1(-ratio))

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
    def value_and_slope(cls, lp, lq, p, q, d, c, a, b):
        _, rise = kl_terms(p, q, -d)
        return 0.5 * rise.abs(), -times(q, 0.5 * torch.sign(d) + c)

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
    def value_and_slope(cls, lp, lq, p, q, d, c, a, b):
        value, slope = _alpha_terms(lp, lq, p, q, d, c, a)
        return value, slope * (c.exp() / a)

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
    def value_and_slope(cls, lp, lq, p, q, d, c, a, b):
        return _alpha_terms(lp, lq, p, q, d, c, a)

    @classmethod
    def stable_outer(cls, total, c, a, b):
        excess = a * (a - 1) * total  # sum p^a q^(1-a) - 1
        return torch.where(excess.abs() < 0.5, torch.log1p(excess), c) / (a - 1)

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


def _alpha_terms(
    lp: Tensor, lq: Tensor, p: Tensor, q: Tensor, d: Tensor, c: Tensor, a: float
) -> tuple[Tensor, Tensor]:
    """Terms of the alpha divergence, and q - w / sum w with w = p^a q^(1-a), c = log sum w."""
    log_w = log_escort(lp, lq, a)
    w = log_w.exp()
    # Where d is finite: q (phi(a d) - a phi(d)), which does not cancel.
    value = kl_terms(q, w, a * d)[0] - a * kl_terms(q, p, d)[0]
    slope = -kl_terms(q, (log_w - c).exp(), a * d - c)[1]
    if not math.isfinite(value.sum()):
        value = torch.where(d.isfinite(), value, w - a * p - (1 - a) * q)
    return (value / (a * (a - 1))).clamp_min(0.0), slope
