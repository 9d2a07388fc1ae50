"""A student or a teacher as the checks look at it, and as a Problem holds it."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from . import checks, tracing
from .forms import Mixture, sources
from .labels import check as check_labels
from .labels import soft as is_soft
from .linear import head_of
from .listing import events_of
from .operands import Ensemble, LinearHead, Sampled, TopK, checked
from .operators import readable
from .problem import per_row
from .settings import Settings
from .sharding import Group, Merge


def classes_last(operand: Any, dim: int) -> Any:
    """Logits [..., V]; of what has no tensor of logits the classes are last."""
    if not isinstance(operand, Tensor) or dim == -1 or dim == operand.dim() - 1:
        return operand
    if not -operand.dim() <= dim < operand.dim():
        raise ValueError(f"dim={dim} is none of the {operand.dim()} dimensions of the logits")
    return operand.movedim(dim, -1)


def own_columns(operand: Any, merge: Merge, student: Any = None) -> Any:
    """This rank's columns of what has those of all ranks; what has fewer is split already.

    student: what has as many as it is split too; with padding they may be as many as all.
    """
    if not isinstance(merge, Group):
        return operand
    if isinstance(operand, Ensemble):
        own = [own_columns(teacher, merge, student) for teacher in operand.teachers]
        return replace(operand, teachers=own)
    if not isinstance(operand, (Tensor, LinearHead)) or not operand.shape:
        return operand
    columns = operand.shape[-1]
    if columns < merge.columns or (student is not None and columns == student.shape[-1]):
        return operand
    mine = slice(merge.first_column, merge.first_column + merge.mine)
    if isinstance(operand, Tensor):
        return operand[..., mine]
    bias = None if operand.bias is None else operand.bias[mine]
    return replace(operand, weight=operand.weight[mine], bias=bias)


def outline(operand: Any, student: Any = None) -> Tensor:
    """Logits, or a tensor of their shape, dtype and device that takes no memory.

    student: whose columns what has none of its own takes, a teacher that lists some entries.
    """
    if isinstance(operand, Tensor):
        return operand
    if isinstance(operand, LinearHead):
        return operand.outline
    if isinstance(operand, (TopK, Sampled)):
        width = student.size(-1) if isinstance(student, Tensor) and student.dim() else 0
        log_probs = operand.log_probs if isinstance(operand, TopK) else operand.counts
        return checked.outline((*operand.shape[:-1], width), torch.float32, [log_probs])
    if isinstance(operand, Ensemble):
        found = [outline(teacher, student) for teacher in operand.teachers]
        dtype = reduce(torch.promote_types, (x.dtype for x in found))
        columns = min(x.size(-1) for x in found)
        return checked.outline((*operand.rows, columns), dtype, found)
    return operand


def in_half(student: Any) -> bool:
    """Whether a gradient of the student's would be held in float16."""
    if not isinstance(student, LinearHead):
        return student.dtype == torch.float16
    sources = (student.hidden, student.weight, student.bias)
    return any(x is not None and x.requires_grad and x.dtype == torch.float16 for x in sources)


def tensors(name: str, operand: Any) -> dict[str, Tensor]:
    """The logits that a side holds, by name: what an in-place gradient must not overwrite."""
    if not isinstance(operand, Ensemble):
        return {name: operand} if isinstance(operand, Tensor) else {}
    return {
        f"teacher {i} of the ensemble": one
        for i, one in enumerate(operand.teachers)
        if isinstance(one, Tensor)
    }


def check(given: Settings, student: Any, teacher: Any, labels: Tensor | None) -> None:
    """Refuses what an operand that is not logits cannot serve."""
    if given.inplace and isinstance(student, LinearHead):
        raise ValueError("inplace=True overwrites logits, and a LinearHead has none: leave it out")
    if isinstance(student, (TopK, Sampled, Ensemble)):
        raise TypeError(
            f"student must be logits or a LinearHead, got a teacher's {type(student).__name__}"
        )
    if isinstance(teacher, Ensemble):
        _ensemble(given, teacher, student, labels)
    elif isinstance(teacher, (TopK, Sampled)):
        _listed(given, teacher, labels)
        label_aware = given.divergence.label_aware
        _needs_logits(
            type(teacher).__name__,
            {"standardize=True": given.standardize, _looks_at_labels(given): label_aware},
        )


def _looks_at_labels(given: Settings) -> str:
    return f"{type(given.divergence).__name__}, which looks at labels,"


def _needs_logits(kind: str, wanted: dict[str, bool]) -> None:
    for name, flag in wanted.items():
        if flag:
            raise ValueError(f"{name} needs the teacher's logits, and a {kind} has none")


def _listed(given: Settings, teacher: TopK | Sampled, labels: Tensor | None) -> None:
    """Refuses what a teacher that lists some entries cannot serve, alone or among others."""
    kind = type(teacher).__name__
    divergence = type(given.divergence).__name__
    _needs_logits(
        kind, {"Bernoulli()": given.sigmoids, divergence: not given.divergence.over_events}
    )
    if given.teacher_grad:
        raise ValueError(f"teacher_grad=True: a {kind} has no logits to train; leave it out")
    if given.backend == "reference":
        raise NotImplementedError(f"backend='reference' has no {kind}: pass backend='torch'")
    if isinstance(teacher, TopK) and teacher.tail == "label":
        if labels is None:
            raise ValueError("TopK(tail='label') gives the rest to the true token: pass labels")
        if is_soft(labels):
            raise ValueError(
                "TopK(tail='label') gives the rest to one true token: pass class indices"
            )
    _one_temperature(kind, getattr(teacher, "tail", ""), *given.of_teacher)


def _ensemble(given: Settings, teacher: Ensemble, student: Any, labels: Tensor | None) -> None:
    if given.teacher_grad:
        raise NotImplementedError(
            "teacher_grad=True: an Ensemble gives its teachers no gradient; leave it out"
        )
    if given.backend == "reference":
        raise NotImplementedError("backend='reference' has no Ensemble: pass backend='torch'")
    name, value = given.of_teacher
    if teacher.combine == "probs" and tracing.trains(value):
        raise NotImplementedError(
            f"{name} trains, and a mixture of probabilities gives the teachers' no gradient: pass "
            "a teacher_temperature that does not train, or combine='logits'"
        )
    first = outline(student)
    widths = set()
    for i, one in enumerate(teacher.teachers):
        if isinstance(one, (TopK, Sampled)):
            _listed(given, one, labels)
            _needs_logits(type(one).__name__, {"standardize=True": given.standardize})
            if isinstance(one, TopK) and one.tail in ("bucket", "drop"):
                raise ValueError(
                    f"TopK(tail={one.tail!r}) says nothing of single entries that it does not "
                    "list, which other teachers know: in an Ensemble pass tail='renormalize' or "
                    "'label'"
                )
        else:
            widths.add(one.shape[-1])
        checks.beside(f"teacher {i} of the ensemble", outline(one, first), first)
    if len(widths) > 1 and given.vocab_size is None and given.group is None:
        raise ValueError(
            f"the ensemble's teachers have {sorted(widths)} columns: if the wider are padded, pass "
            "vocab_size, the tokenizer's true size"
        )
    for weight in teacher.weights or ():
        if isinstance(weight, Tensor) and weight.dim():
            checks.beside("a weight of the ensemble", weight, first)


def _one_temperature(kind: str, tail: str, name: str, value: Any) -> None:
    """Refuses temperatures that train, or at which the mass of what is not listed is unknown."""
    if tail == "renormalize":
        if tracing.trains(value):
            raise NotImplementedError(
                f"{name} trains, and a TopK gives the teacher's no gradient: pass a "
                "teacher_temperature that does not train"
            )
        return
    if isinstance(value, Tensor) or value != 1:
        other = "" if kind == "Sampled" else ", or TopK(tail='renormalize')"
        shown = f"tensor of {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(
            f"{name}={shown} is the teacher's too, and what a {kind} does not list has no known "
            f"mass but at 1: pass teacher_temperature=1.0{other}"
        )


def columns(
    given: Settings,
    merge: Merge,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    weight: Tensor | None,
) -> int:
    """Refuses operands that do not go together; the number of columns that are vocabulary."""
    sharded = isinstance(merge, Group)
    wanted = merge.mine if isinstance(merge, Group) else given.vocab_size
    columns = checks.logits(student, teacher, wanted, sharded)
    for name, value in given.temperatures.items():
        checks.temperature_rows(name, value, student)
    check_labels(labels, given, student, columns, merge.columns)
    if weight is not None:
        checks.weight(weight, student)
    checks.teacher_gradient(teacher, given.teacher_grad)
    return columns


def side_of(
    operand: Any,
    given: Settings,
    labels: Tensor | None,
    columns: int,
    dtype: torch.dtype,
) -> Any:
    """Logits, a Head, Events or a Mixture; dtype: of the arithmetic."""
    if isinstance(operand, LinearHead):
        return head_of(operand, dtype)
    if isinstance(operand, (TopK, Sampled)):
        return events_of(operand, given, labels, columns)
    if isinstance(operand, Ensemble):
        return _mixture_of(operand, given, labels, columns, dtype)
    return readable(operand)


def _mixture_of(
    operand: Ensemble,
    given: Settings,
    labels: Tensor | None,
    columns: int,
    dtype: torch.dtype,
) -> Mixture:
    """The mixture of an ensemble, without the teachers whose weight is the number 0."""
    weights = [1.0] * len(operand.teachers) if operand.weights is None else operand.weights
    weights = [weight if isinstance(weight, Tensor) else float(weight) for weight in weights]
    kept = [
        (side_of(teacher, given, labels, columns, dtype), weight)
        for teacher, weight in zip(operand.teachers, weights, strict=True)
        if isinstance(weight, Tensor) or weight > 0
    ]
    device = sources(kept[0][0])[0].device
    rows = math.prod(operand.rows)
    stacked = torch.stack([per_row(weight, rows, dtype, device).detach() for _, weight in kept])
    stacked = stacked / stacked.sum(0)
    routed = tuple(isinstance(weight, Tensor) for _, weight in kept)
    return Mixture(operand.combine, tuple(side for side, _ in kept), stacked, routed)
