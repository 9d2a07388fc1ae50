"""The functions as modules: settings held, nothing else."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from .functional import distillation_loss

_SETTINGS = {
    name: parameter.default
    for name, parameter in inspect.signature(distillation_loss).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name not in ("weight", "num_items")
}


class DistillationLoss(nn.Module):
    """`distillation_loss` with its settings held: loss = module(student, teacher, labels).

    Takes every keyword of `distillation_loss`; `weight` and `num_items`, which change from batch
    to batch, are arguments of the call.

    Example:
        >>> import torch, fastkd
        >>> criterion = fastkd.DistillationLoss(temperature=2.0, alpha=0.5)
        >>> criterion
        DistillationLoss(temperature=2.0, alpha=0.5)
        >>> loss = criterion(torch.randn(4, 10), torch.randn(4, 10), torch.randint(10, (4,)))
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        for name in settings:
            if name not in _SETTINGS:
                raise TypeError(
                    f"DistillationLoss has no setting {name!r}; it takes {', '.join(_SETTINGS)}"
                )
        self.settings = settings

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Any:
        return distillation_loss(
            student, teacher, labels, weight=weight, num_items=num_items, **self.settings
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
