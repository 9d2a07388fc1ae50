"""A student or a teacher as the checks look at it, and as a Problem holds it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .events import events_of
from .linear import head_of
from .operands import LinearHead, Sampled, TopK
from .operators import readable
from .settings import Settings


def classes_last(operand: Any, dim: int) -> Any:
    """Logits [..., V]; of what has no tensor of logits the classes are last."""
    if not isinstance(operand, Tensor) or dim == -1 or dim == operand.dim() - 1:
        return operand
    if not -operand.dim() <= dim < operand.dim():
        raise ValueError(f"dim={dim} is none of the {operand.dim()} dimensions of the logits")
    return operand.movedim(dim, -1)


def outline(operand: Any, student: Any = None) -> Tensor:
    """Logits, or a tensor of their shape, dtype and device that takes no memory.

    student: whose columns what has none of its own takes, a teacher that lists some entries.
    """
    if isinstance(operand, LinearHead):
        dtype = torch.promote_types(operand.hidden.dtype, operand.weight.dtype)
        sources = [operand.hidden, operand.weight, operand.bias]
        shape = operand.shape
    elif isinstance(operand, (TopK, Sampled)):
        width = student.size(-1) if isinstance(student, Tensor) and student.dim() else 0
        dtype, shape = torch.float32, torch.Size((*operand.shape[:-1], width))
        sources = [operand.log_probs] if isinstance(operand, TopK) else []
        sources = [operand.indices, *sources]
    else:
        return operand
    trains = any(x is not None and x.requires_grad for x in sources)
    first: Any = sources[0]
    outline: Tensor = first.detach().new_empty((), dtype=dtype).expand(shape)
    return outline.requires_grad_(trains)


def outlines(student: Any, teacher: Any) -> tuple[Tensor, Tensor]:
    first = outline(student)
    return first, outline(teacher, first)


def in_half(student: Any) -> bool:
    """Whether a gradient of the student's would be held in float16."""
    if not isinstance(student, LinearHead):
        return student.dtype == torch.float16
    sources = (student.hidden, student.weight, student.bias)
    return any(x is not None and x.requires_grad and x.dtype == torch.float16 for x in sources)


def check(given: Settings, student: Any, teacher: Any, labels: Tensor | None) -> None:
    """Refuses what an operand that is not logits cannot serve."""
    if given.inplace and isinstance(student, LinearHead):
        raise ValueError("inplace=True overwrites logits, and a LinearHead has none: leave it out")
    if isinstance(student, (TopK, Sampled)):
        raise TypeError("student must be logits or a LinearHead, got a TopK or Sampled teacher")
    if not isinstance(teacher, (TopK, Sampled)):
        return
    kind = type(teacher).__name__
    for name, wanted in (
        ("standardize=True", given.standardize),
        ("Bernoulli()", given.sigmoids),
        (
            f"{type(given.divergence).__name__}, which looks at labels,",
            given.divergence.label_aware,
        ),
    ):
        if wanted:
            raise ValueError(f"{name} needs the teacher's logits, and a {kind} has none")
    if given.teacher_grad:
        raise ValueError(f"teacher_grad=True: a {kind} has no logits to train; leave it out")
    if given.backend == "reference":
        raise NotImplementedError(f"backend='reference' has no {kind}: pass backend='torch'")
    if isinstance(teacher, TopK) and teacher.tail == "label" and labels is None:
        raise ValueError("TopK(tail='label') gives the rest to the true token: pass labels")
    _one_temperature(kind, getattr(teacher, "tail", ""), given.temperatures)


def _one_temperature(kind: str, tail: str, temperatures: dict[str, Any]) -> None:
    """Refuses a temperature at which the mass of what the teacher does not list is unknown."""
    if tail == "renormalize":
        return
    name = "temperature" if temperatures["teacher_temperature"] is None else "teacher_temperature"
    value = temperatures[name]
    if isinstance(value, Tensor) or value != 1:
        other = "" if kind == "Sampled" else ", or TopK(tail='renormalize')"
        raise ValueError(
            f"{name}={value!r} is the teacher's too, and what a {kind} does not list has no known "
            f"mass but at 1: pass teacher_temperature=1.0{other}"
        )


def side_of(operand: Any, given: Settings, labels: Tensor | None, columns: int, engine: str) -> Any:
    """Logits, a Head or Events."""
    if isinstance(operand, LinearHead):
        return operand.logits() if engine == "reference" else head_of(operand)
    if isinstance(operand, (TopK, Sampled)):
        return events_of(operand, given, labels, columns)
    return readable(operand)
