"""What all ranks of a group find together, and the oracle on the whole vocabulary."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import fastkd
from fastkd import sharding
from tests import running, sharded


def whole(pieces: Tensor) -> Tensor:
    """The columns of all ranks."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, pieces)
    return torch.cat(found, -1)


def alike(tensor: Tensor) -> None:
    """All ranks have the same bits."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, tensor.detach())
    for other in found:
        assert torch.equal(other.nan_to_num(nan=0.5), found[0].nan_to_num(nan=0.5))


def everything(
    student: Tensor, teacher: Any, labels: Any, more: int = 0, **settings: Any
) -> dict[str, Tensor]:
    """What running.everything gives, of this rank's columns; and no gathers but those of the
    forward, one or two, and `more`.
    """
    mine = sharded.columns(student.size(-1))
    group: Any = dist.group.WORLD
    if "vocab_size" in settings:  # of columns that are split with the padding
        group = sharding.Group(group, mine.start, student.size(-1))
    settings = {"vocab_size": student.size(-1)} | settings
    given = {"student": student[..., mine], "teacher": teacher[..., mine]} | settings
    leaves = {
        name: value.detach().float().clone().requires_grad_()
        for name, value in given.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    given |= leaves
    with sharded.Counted() as gathers:
        loss, metrics = fastkd.distillation_loss(
            given.pop("student"), given.pop("teacher"), labels, group=group,
            teacher_grad=True, return_metrics=True, **given,
        )  # fmt: skip
    assert more < gathers.count <= more + (3 if settings.get("standardize") else 2)
    upstream = -torch.linspace(0.3, 2.0, max(loss.numel(), 1))
    with sharded.Counted() as gathers:
        found = torch.autograd.grad(
            loss, list(leaves.values()), upstream.view(loss.shape), materialize_grads=True
        )
    assert gathers.count == 0
    values = {"loss": loss.detach(), **metrics._asdict()}
    for value in values.values():
        alike(value) if value is not None else None
    gradients = {f"to {name}": g for name, g in zip(leaves, found, strict=True)}
    for name, gradient in gradients.items():
        if name in ("to student", "to teacher"):
            gradients[name] = whole(gradient)
        else:
            alike(gradient)
    return {name: x for name, x in (values | gradients).items() if x is not None}


def agree(
    student: Tensor, teacher: Tensor, labels: Any = None, more: int = 0, **settings: Any
) -> None:
    ours = everything(student, teacher, labels, more, **settings)
    true = running.everything(student, teacher, labels, **settings | {"backend": None})
    running.assert_everything_close(ours, true)
