"""What a Trainer is given: arguments of distillation_loss, and its own that mean nothing here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from fastkd.functional import distillation_loss
from fastkd.settings import Settings as Checked

Settings = Callable[[int, int], Mapping[str, Any]]

KEYWORDS = set(inspect.signature(distillation_loss).parameters)
OF_THE_TRAINER = {
    "student", "teacher", "labels", "num_items", "reduction", "return_metrics", "ignore_index",
    "dim", "group",
}  # fmt: skip


def by_step(loss: Settings | Mapping[str, Any] | None) -> Settings:
    """Settings by (step, steps of the run), checked as soon as they are known."""
    if callable(loss) and not isinstance(loss, nn.Module):
        return lambda step, steps: checked(loss(step, steps))
    always = checked({} if loss is None else loss)
    fixed(always)
    return lambda step, steps: always


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


def fixed(settings: Mapping[str, Any]) -> None:
    """Refuses what could not stand in the loss of every step, of names that are known."""
    Checked.of(**{name: value for name, value in settings.items() if name != "weight"})
    for name, value in settings.items():
        if isinstance(value, Tensor) and value.requires_grad and not value.is_leaf:
            raise ValueError(
                f"loss: {name} was computed from what trains, once for all steps: pass to "
                "DistillationTrainer a function of (step, steps) that computes it anew"
            )


def refuse_without_meaning(trainer: Any) -> None:
    """Refuses what a Trainer has been given that a DistillationTrainer would not read."""
    if trainer.compute_loss_func is not None:
        raise ValueError("DistillationTrainer computes its own loss: drop compute_loss_func")
    if trainer.compute_metrics is not None:
        raise ValueError(
            "DistillationTrainer.evaluate gives the loss, the KL to the teacher and the agreement, "
            "and calls no compute_metrics: drop it"
        )
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"DistillationTrainer needs one process for each of the {trainer.args.n_gpu} GPUs: "
            "start it by torchrun, or show it one by CUDA_VISIBLE_DEVICES"
        )
