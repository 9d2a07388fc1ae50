"""The arguments of distillation_loss that stand in a Trainer's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from fastkd.functional import distillation_loss

Settings = Callable[[int, int], Mapping[str, Any]]

KEYWORDS = set(inspect.signature(distillation_loss).parameters)
OF_THE_TRAINER = {
    "student", "teacher", "labels", "num_items", "reduction", "return_metrics", "ignore_index",
    "dim", "group",
}  # fmt: skip


def by_step(loss: Settings | Mapping[str, Any] | None) -> Settings:
    """Of (step, steps of the run): what was given, checked as soon as it is known."""
    if callable(loss) and not isinstance(loss, nn.Module):
        return lambda step, steps: checked(loss(step, steps))
    fixed = checked({} if loss is None else loss)
    return lambda step, steps: fixed


def checked(loss: Any) -> Mapping[str, Any]:
    """Refuses what is no dictionary of arguments, or has some that others give."""
    if not isinstance(loss, Mapping):
        instead = ": pass its `settings`" if hasattr(loss, "settings") else ""
        raise TypeError(
            "loss must be a dictionary of arguments of distillation_loss, or a function of (step, "
            f"steps) that returns one, got {type(loss).__name__}{instead}"
        )
    if "vocab_size" in loss:
        raise ValueError("vocab_size is an argument of DistillationTrainer: pass it there")
    known(loss)
    return loss


def known(settings: Mapping[str, Any]) -> None:
    """Refuses names that distillation_loss does not take, or not from here."""
    for name in settings:
        if name in OF_THE_TRAINER:
            raise ValueError(f"{name} is the Trainer's to give: leave it out of loss")
        if name not in KEYWORDS:
            raise ValueError(f"loss: distillation_loss takes no {name!r}")
