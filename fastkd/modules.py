"""The functions as modules: settings held, nothing else."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .checks import REDUCTIONS, choice
from .elementwise import kl_div
from .functional import distillation_loss
from .operands import Student, Teacher
from .settings import Keywords, Settings

if TYPE_CHECKING:
    from typing_extensions import Unpack

_SETTINGS = {
    name: parameter
    for name, parameter in inspect.signature(distillation_loss).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name not in ("weight", "num_items")
}


class DistillationLoss(nn.Module):
    """`distillation_loss` with its settings held: loss = module(student, teacher, labels).

    Takes every keyword of `distillation_loss`, and checks it at once; `weight` and `num_items`,
    which change from batch to batch, are arguments of the call.

    Args:
        temperature, teacher_temperature: an `nn.Parameter` is a parameter of the module: trained by
            an optimizer of `module.parameters()`, saved, moved with it. Any other tensor is a
            buffer, saved and moved likewise.

    Example:
        >>> import torch, fastkd
        >>> criterion = fastkd.DistillationLoss(temperature=2.0, alpha=0.5)
        >>> criterion
        DistillationLoss(temperature=2.0, alpha=0.5)
        >>> loss = criterion(torch.randn(4, 10), torch.randn(4, 10), torch.randint(10, (4,)))
    """

    def __init__(self, *, return_metrics: bool = False, **keywords: Unpack[Keywords]) -> None:
        super().__init__()
        for name in keywords:
            if name not in _SETTINGS:
                raise TypeError(
                    f"DistillationLoss has no setting {name!r}; it takes {', '.join(_SETTINGS)}"
                )
        settings: dict[str, Any] = dict(keywords)
        if return_metrics is not False:
            settings["return_metrics"] = return_metrics
        Settings.of(**settings)
        for name, value in settings.items():
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            elif isinstance(value, Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that were given, when the module was made or since."""
        return {name: getattr(self, name) for name in _SETTINGS if hasattr(self, name)}

    def forward(
        self,
        student: Student,
        teacher: Teacher,
        labels: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Any:
        return distillation_loss(
            student, teacher, labels, weight=weight, num_items=num_items, **self.settings
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={_shown(value)}" for name, value in self.settings.items())


# What help() and a notebook show: each keyword, with its type and default.
_SELF = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
DistillationLoss.__init__.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [_SELF, *_SETTINGS.values()]
)


def _shown(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return f"{type(value).__name__}{list(value.shape)}"


class KLDivLoss(nn.Module):
    """`kl_div` with its reduction held; takes the place of torch.nn.KLDivLoss.

    Example:
        >>> import torch, fastkd
        >>> criterion = fastkd.KLDivLoss(reduction="batchmean", log_target=True)
        >>> criterion
        KLDivLoss(reduction='batchmean', log_target=True)
        >>> q, p = torch.randn(4, 10).log_softmax(-1), torch.randn(4, 10).log_softmax(-1)
        >>> loss = criterion(q, p)
    """

    def __init__(
        self,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        log_target: bool = False,
    ) -> None:
        super().__init__()
        choice("reduction", reduction, REDUCTIONS)
        self.size_average, self.reduce = size_average, reduce
        self.reduction, self.log_target = reduction, log_target

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return kl_div(
            input, target, self.size_average, self.reduce, self.reduction, self.log_target
        )

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}, log_target={self.log_target}"
