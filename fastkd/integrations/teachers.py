"""What a teacher is asked, and where it lies: in whole, or in shards over all processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.cache import TeacherCache
from fastkd.checks import several
from fastkd.scalars import number

from .models import ROW, base, freeze, head_of, logits_of, model_inputs

Asked = Callable[[Mapping[str, Any]], Any]


def asked(teacher: Any, device: torch.device, heads: bool, sharded: bool) -> Asked:
    """What a teacher says of a batch, by a function; `sharded`: over all processes, by FSDP2."""
    if isinstance(teacher, TeacherCache):
        cache = teacher.to(device)
        return lambda inputs: cache[_rows(inputs).cpu()]
    sharded = sharded and not stays_whole(teacher)
    freeze(teacher, None if sharded else device)
    here = sharded or all(weight.device == device for weight in teacher.parameters())
    head = head_of(teacher) if heads and here else None
    if sharded:
        shard(teacher, device)

    def ask(inputs: Mapping[str, Any]) -> Any:
        others = model_inputs(inputs, teacher)
        if head is not None:
            return head(teacher, others)
        if not here:
            first = next(teacher.parameters()).device
            others = {k: v.to(first) if isinstance(v, Tensor) else v for k, v in others.items()}
        return logits_of(teacher(**others)).to(device)

    return ask


def _rows(inputs: Mapping[str, Any]) -> Tensor:
    if ROW not in inputs:
        raise ValueError(
            f"the batch does not say which rows of the TeacherCache are its own: give each "
            f"example its number there as `{ROW}`"
        )
    rows = inputs[ROW]
    if rows.is_floating_point():
        raise TypeError(f"`{ROW}` must be whole numbers, got {rows.dtype}")
    return rows


def check_all(teachers: Sequence[Any], weights: Sequence[float] | None, student: Any) -> None:
    """Refuses what could not teach together."""
    if not teachers:
        raise ValueError("teacher must be a model, or a list of some, got an empty list")
    for each in teachers:
        check(each, student)
    if weights is None:
        return
    several("teacher_weights", weights)
    if len(weights) != len(teachers):
        raise ValueError(
            f"teacher_weights must be one for each of {len(teachers)} teachers, got {len(weights)}"
        )
    for weight in weights:
        number("teacher_weights", weight)


def check(teacher: Any, student: Any) -> None:
    """Refuses what is no teacher, or this student's own self, or a part of it."""
    instead = "pass a copy, or teacher=None for a student of peft, which teaches with adapters off"
    if teacher is student:
        raise ValueError(
            f"teacher and student are one model, whose weights would be frozen: {instead}"
        )
    if teacher is None and not hasattr(student, "disable_adapter"):
        raise ValueError(
            "teacher=None takes the student with its adapters off, and this student has none: "
            "pass a teacher, or wrap the student by peft.get_peft_model"
        )
    if not isinstance(teacher, nn.Module | TeacherCache | None):
        raise TypeError(
            f"teacher must be a model or a TeacherCache, got {type(teacher).__name__}: load it "
            "first, as by AutoModelForCausalLM.from_pretrained"
        )
    trained = {id(weight) for weight in student.parameters() if weight.requires_grad}
    if isinstance(teacher, nn.Module) and trained & {id(each) for each in teacher.parameters()}:
        raise ValueError(
            f"the teacher has weights that the student trains, and they would be frozen: {instead}"
        )


def stays_whole(model: Any) -> bool:
    """Whether a model has its place already, or weights that FSDP cannot divide."""
    placed = getattr(model, "hf_device_map", None)
    return bool(placed) or not all(type(weight) is nn.Parameter for weight in model.parameters())


def shard(model: Any, device: torch.device) -> None:
    """Divides the weights over all processes, which gather those of one block at a time.

    What is outside of the blocks, the output head with it, is gathered once and stays.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    blocks = set(getattr(base(model), "_no_split_modules", None) or ())
    for module in reversed(list(model.modules())):  # those inside first
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
