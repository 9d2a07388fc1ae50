"""The keywords of distillation_loss that stay from batch to batch, checked before logits come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from . import checks, tracing
from .divergences import Divergence
from .operators import readable
from .sharding import Group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# The check of each keyword that is not as by default; it gives back what a Settings holds.
CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "temperature": checks.temperature,
    "teacher_temperature": checks.temperature,
    "scale_by_temperature": checks.flag,
    "standardize": checks.flag,
    "alpha": checks.unit,
    "label_smoothing": checks.unit,
    "entropy_weight": checks.finite,
    "ignore_index": checks.whole,
    "reduction": partial(checks.choice, options=checks.REDUCTIONS),
    "vocab_size": checks.at_least,
    "teacher_grad": checks.flag,
    "gradient": partial(checks.choice, options=checks.GRADIENTS),
    "inplace": checks.flag,
    "backend": partial(checks.choice, options=checks.BACKENDS),
    "return_metrics": checks.flag,
    "dim": checks.whole,
    "group": checks.group,
    "chunk_bytes": checks.at_least,
}


class Keywords(TypedDict, total=False):
    """The keywords of distillation_loss that stay from batch to batch, as a type checker sees them.

    But for return_metrics, by which overloads tell what is returned.
    """

    divergence: str | Divergence
    temperature: float | Tensor
    teacher_temperature: float | Tensor | None
    scale_by_temperature: bool
    standardize: bool
    alpha: float
    label_smoothing: float
    entropy_weight: float
    ignore_index: int
    reduction: str
    vocab_size: int | None
    teacher_grad: bool
    gradient: str
    inplace: bool
    backend: str
    dim: int
    group: ProcessGroup | Group | None
    chunk_bytes: int | None


class Settings(NamedTuple):
    """See distillation_loss; numbers are Python's own."""

    divergence: Divergence
    temperature: float | Tensor = 1.0
    teacher_temperature: float | Tensor | None = None
    scale_by_temperature: bool = True
    standardize: bool = False
    alpha: float = 1.0
    label_smoothing: float = 0.0
    entropy_weight: float = 0.0
    ignore_index: int = -100
    reduction: str = "mean"
    vocab_size: int | None = None
    teacher_grad: bool = False
    gradient: str = "auto"
    inplace: bool = False
    backend: str = "auto"
    return_metrics: bool = False
    dim: int = -1
    group: ProcessGroup | Group | None = None
    chunk_bytes: int | None = None

    @staticmethod
    def of(divergence: str | Divergence = "forward_kl", **values: Any) -> Settings:
        """All that can be refused by the settings alone is refused here."""
        for name, value in values.items():
            if value is not DEFAULTS[name]:
                values[name] = CHECKS[name](name, value)
        given = Settings(checks.divergence(divergence), **values)
        if given.group is not None and given.backend == "reference":
            raise NotImplementedError("backend='reference' has no group: pass backend='torch'")
        if given.sigmoids:
            checks.multi_label(given.standardize, given.label_smoothing, given.ignore_index)
        if given.inplace and given.dim != -1:
            raise ValueError(
                f"inplace=True needs the classes last, got dim={given.dim}: leave it out"
            )
        checks.held_gradient(given.reduction, given.inplace, given.gradient)
        if given.holds_gradient:
            checks.student_alone(tracing.trained_of(given.temperatures))
        return given

    def readable(self, dtype: torch.dtype) -> Settings:
        """The same with temperatures that a kernel may read and autograd may save, in the
        arithmetic's dtype: what they enter adds to their gradient before it is rounded.
        """
        found = {
            name: readable(value).to(dtype)
            for name, value in self.temperatures.items()
            if isinstance(value, Tensor)
        }
        return self._replace(**found) if found else self

    @property
    def sigmoids(self) -> bool:
        """Whether each class has a sigmoid of its own, in place of one softmax for all."""
        return self.divergence.rows == "bernoulli"

    @property
    def holds_gradient(self) -> bool:
        """Whether the gradient has to be computed together with the loss."""
        return self.gradient == "forward" or self.inplace

    @property
    def temperatures(self) -> dict[str, Any]:
        names = ("temperature", "teacher_temperature")
        return {name: getattr(self, name) for name in names}

    @property
    def of_teacher(self) -> tuple[str, Any]:
        """The teacher's temperature, by the name of what was given."""
        if self.teacher_temperature is None:
            return "temperature", self.temperature
        return "teacher_temperature", self.teacher_temperature

    def holds(self, trains: bool, half: bool, trained: Sequence[str]) -> bool:
        """Whether the student's gradient, if it trains, is computed together with the loss.

        half: whether it would be held in float16. trained: other operands that train.
        """
        if self.holds_gradient:
            checks.not_half(half)
            checks.student_alone(trained)
            return trains
        scalar = self.gradient == "auto" and self.reduction != "none"
        return scalar and trains and not half and not trained


DEFAULTS = Settings._field_defaults
