"""What a divergence is."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastkd import tracing
from fastkd.scalars import own_numbers

from .pair import Descent, Pair

# What the row constant c of a device function is, and with it in which sweep it is found.
NONE = "none"  # unused
REVERSE_KL = "reverse_kl"  # KL(q || p), from the first sweep
LOG_MIXTURE = "log_mixture"  # log sum p^a q^(1-a), from the first sweep
SLOPE_SUM = "slope_sum"  # the sum of the slopes at c = 0, from the second sweep


@dataclass(frozen=True)
class Divergence:
    r"""A divergence between teacher and student rows; subclass it to add one of your own.

    A subclass names itself and gives `value`; the PyTorch backend differentiates that. For speed
    it may give `value_and_descent` too, for the Triton backend `device`, and for the teacher's
    gradient there `dual`. A name that another class has is refused; the same class defined again
    replaces itself, and objects of the old one are refused from then on.

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
    # The PyTorch backend computes smaller values in fp64: in fp32 one may be off by 1e-4 of itself.
    least_in_fp32: ClassVar[float] = 1 / 32
    # Whether the gradient may be a small difference, as it is where the student is nearly certain.
    # The PyTorch backend computes such rows in fp64.
    cancels: ClassVar[bool] = True
    # A fastkd.kernels.divergences.Device, for the Triton backend.
    device: ClassVar[Any] = None

    # Whether its name stands for the object without arguments.
    by_name: ClassVar[bool] = False
    # Whether it looks at the label of a row, which it then needs: `outer` is then given, besides,
    # the log-probabilities that teacher and student give it. Its `device` has an `at_label`.
    label_aware: ClassVar[bool] = False
    # Whether all sums of `value_and_descent` are the pair's: columns may be spread over processes.
    sharded: ClassVar[bool] = True
    # Whether it has a meaning where several entries are one event, as beside a teacher's top k.
    over_events: ClassVar[bool] = True
    # The modules of a backend that compute it: "logits", rows of a softmax, or "bernoulli".
    rows: ClassVar[str] = "logits"
    # Whether the Triton backend has it, by table 2 or `device`, and with the roles exchanged.
    has_device_function: ClassVar[bool] = False
    dual_on_device: ClassVar[bool] = False

    _classes: ClassVar[dict[str, type[Divergence]]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        name = cls.__dict__.get("name")
        if not isinstance(name, str):
            raise TypeError(f"{cls.__qualname__} needs a class attribute `name`, a string")
        holder = Divergence._classes.get(name, cls)
        if (holder.__module__, holder.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"{cls.__qualname__}: the name {name!r} belongs to "
                f"{holder.__module__}.{holder.__qualname__} already; give it another"
            )
        try:
            inspect.signature(cls.value).bind(*range(4))
        except TypeError:
            raise TypeError(
                f"{cls.__qualname__}.value must be a staticmethod of (lp, lq, a, b)"
            ) from None
        if {"value_and_descent", "of_rows"} & vars(cls).keys():
            cls.sharded = vars(cls).get("sharded", False)
        built_in = cls.__module__.startswith(f"{__package__}.") and cls.__module__ != __name__
        own = vars(cls).get("has_device_function", built_in)
        cls.has_device_function = own or cls.device is not None
        # The same class once more replaces itself, as when a cell of a notebook runs again.
        Divergence._classes[name] = cls
        Divergence._classes.pop(exchanged(name), None)

    @property
    def parameters(self) -> tuple[float, float]:
        """The run-time numbers (a, b) that `value`, `value_and_descent` and the device take: the
        fields that are numbers, and 0 where there are fewer.
        """
        own = (getattr(self, field.name) for field in fields(self))
        a, b, *_ = (*(float(x) for x in own if isinstance(x, Real)), 0.0, 0.0)
        return a, b

    @staticmethod
    def value(lp: Tensor, lq: Tensor, a: float, b: float) -> Tensor:
        """The textbook term of each vocabulary entry, differentiable in lp and lq.

        -inf on either side must not give NaN: see `plogr`.
        """
        raise NotImplementedError("your divergence needs a staticmethod value(lp, lq, a, b)")

    @staticmethod
    def outer(total: Tensor, a: float, b: float, *label: Tensor) -> Tensor:
        """What the sum of the textbook values is mapped through; increasing."""
        return total

    @classmethod
    def of_rows(
        cls, lp: Tensor, lq: Tensor, a: float, b: float, labels: Tensor | None = None
    ) -> Tensor:
        """The divergence of rows [R, V] by its textbook values, [R].

        A class may define it where a sum of `value` will not do; its rows then stay in one piece.
        """
        sums = cls.value(lp, lq, a, b).sum(-1)
        if not cls.label_aware or labels is None:
            return cls.outer(sums, a, b)
        at = labels.long()[:, None]
        return cls.outer(sums, a, b, lp.gather(-1, at)[:, 0], lq.gather(-1, at)[:, 0])

    @staticmethod
    def most(a: float, b: float) -> float:
        """A bound of -d divergence / d lq, summed over a row as `Descent.total`, to which it tends
        where the student's mass is where the teacher has none: the gradient is a small difference.
        """
        return math.inf

    @staticmethod
    def curvature(a: float, b: float) -> float | None:
        """k where D tends to k / 2 times the variance of d under q, as d to 0; None: unknown."""
        return None

    @classmethod
    def least_of(cls, a: float, b: float) -> float:
        """`least_in_fp32` at these parameters: at some a large value may have few digits too."""
        return cls.least_in_fp32

    @classmethod
    def value_and_descent(cls, pair: Pair, a: float, b: float) -> tuple[Tensor, Descent]:
        """The divergence of each row, [R, 1], and the descent.

        Plain formulas serve: a row where they lose digits, or meet -inf, comes again in fp64, with
        -1e300 for -inf. Nothing of the pair's may be changed, but the teacher's log2_exp.
        Sums over a row are the pair's, `pair.total`, since its columns may be spread over
        processes; a class that defines this and takes no other says so by `sharded = True`.
        """
        if not cls.sharded:
            return cls._by_rows(pair, a, b)
        label = pair.label_logs() if cls.label_aware else ()
        rows = pair.logs()
        with tracing.autograd():
            lp, leaf = (_differentiable(side) for side in rows)
            terms = cls.value(lp, leaf.requires_grad_(), a, b)
            (slope,) = torch.autograd.grad(terms.sum(), leaf)
            sums, slopes = pair.total(terms.detach()), pair.total(slope)
            leaves = [_differentiable(x) for x in (sums[:, 0], *label)]
            leaves[0].requires_grad_()
            leaves[-1].requires_grad_()  # lq of the label, or the sum once more
            value = cls.outer(leaves[0], a, b, *leaves[1:])
            factor, *at_label = torch.autograd.grad(
                value.sum(), [leaves[0], *leaves[2:]], materialize_grads=True
            )
        slope, slopes = slope * factor[:, None], slopes * factor[:, None]
        for own in at_label:
            pair.add_at_labels(slope, own)
            slopes = slopes + own[:, None]
        return value.detach()[:, None], Descent(slope, -1.0, -slopes)

    @classmethod
    def _by_rows(cls, pair: Pair, a: float, b: float) -> tuple[Tensor, Descent]:
        """The same of a class whose `of_rows` is its own."""
        rows = pair.logs()
        with tracing.autograd():
            lp, leaf = (_differentiable(side) for side in rows)
            labels = None if pair.labels is None else _differentiable(pair.labels)
            value = cls.of_rows(lp, leaf.requires_grad_(), a, b, labels)[:, None]
            (slope,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), Descent(slope, -1.0, -pair.total(slope))

    def dual(self) -> tuple[str, tuple[float, float], float]:
        """(name, parameters, factor): D(p, q) = factor * D'(q, p); for the teacher's gradient."""
        kind, name = type(self), exchanged(self.name)
        if name not in Divergence._classes:
            value = staticmethod(lambda lp, lq, a, b: kind.value(lq, lp, a, b))
            outer = staticmethod(lambda sums, a, b, *label: kind.outer(sums, a, b, *label[::-1]))
            members = {"name": name, "value": value, "outer": outer}
            members |= {"label_aware": kind.label_aware, "__module__": kind.__module__}
            members |= {"has_device_function": kind.dual_on_device}
            if vars(kind).get("of_rows"):
                members["of_rows"] = classmethod(
                    lambda cls, lp, lq, a, b, labels=None: kind.of_rows(lq, lp, a, b, labels)
                )
            type(f"{kind.__name__}Dual", (Divergence,), members)
        return name, self.parameters, 1.0

    @staticmethod
    def names() -> list[str]:
        """The names that stand for an object."""
        return [name for name, kind in Divergence._classes.items() if kind.by_name]

    @staticmethod
    def of_name(name: str) -> type[Divergence]:
        return Divergence._classes[name]


def exchanged(name: str) -> str:
    """The name of the divergence with teacher and student exchanged."""
    return f"{name} with roles exchanged"


def _differentiable(rows: Tensor) -> Tensor:
    """The same without a graph; autograd saves no tensor from inference mode."""
    return rows.clone() if rows.is_inference() else rows.detach()


def check_weights(divergence: Divergence) -> None:
    """Refuses fields that are no weights of two terms."""
    own_numbers(divergence)
    kind, weights = type(divergence).__name__, vars(divergence)
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"{kind}: {name} must be a finite weight >= 0, got {weight!r}")
    if not any(weights.values()):
        names = " and ".join(weights)
        raise ValueError(f"{kind}: {names} are both 0; give one a positive weight")
