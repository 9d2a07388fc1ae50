"""Which rows count, what they and their terms are multiplied by, and the figures of each row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .problem import CE, ENTROPY, KD, scalar
from .settings import Settings
from .sharding import Merge


class Metrics(NamedTuple):
    """Per-row figures, fp32, detached, of the shape of the rows; 0 in rows that do not count.

    Attributes:
        kd: the divergence, before alpha, temperature scaling and weights.
        ce: cross-entropy with the labels, smoothing included; None without labels.
        student_entropy: in nats, at the student's temperature.
        teacher_entropy: in nats, at the teacher's temperature.
        agreement: 1 where some entry is a maximum of both rows, else 0.

    Example:
        >>> import torch, fastkd
        >>> _, metrics = fastkd.distillation_loss(
        ...     torch.randn(4, 10), torch.randn(4, 10), return_metrics=True)
        >>> metrics.agreement.shape
        torch.Size([4])
    """

    kd: Tensor
    ce: Tensor | None
    student_entropy: Tensor
    teacher_entropy: Tensor
    agreement: Tensor

    @staticmethod
    def of(values: Any, shape: torch.Size, labels: Tensor | None) -> Metrics:
        """From the rows of `values` (see problem.py)."""
        rows: list[Any] = [None if row is None else row.detach().view(shape) for row in values]
        if labels is None:
            rows[CE] = None
        return Metrics(*rows)


def rows_that_count(
    labels: Tensor | None, weight: Tensor | None, ignore_index: int, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Which rows count, bool [N], and their weights [N]; None where all do, or weigh 1."""
    counted = None if labels is None else (labels != ignore_index).flatten()
    if weight is None:
        return counted, None
    weight = weight.flatten()
    weighed = weight if weight.dtype == torch.bool else weight != 0
    counted = weighed if counted is None else counted & weighed
    if weight.dtype == torch.bool:
        return counted, None
    return counted, torch.where(counted, weight.to(dtype), 0.0)


def factor_of_rows(
    reduction: str,
    num_items: int | Tensor | None,
    counted: Tensor | None,
    row_weight: Tensor | None,
    student: Tensor,
    dtype: torch.dtype,
    merge: Merge,
) -> float | Tensor:
    """merge: of the ranks that share the student's columns, of which a single row is a batch."""
    counts = counted if row_weight is None else row_weight
    factor: float | Tensor
    if reduction in ("none", "sum"):
        factor = 1.0
    elif reduction == "batchmean":
        batch = merge.columns if merge.columns and student.dim() == 1 else student.size(0)
        factor = 1 / max(batch, 1)
    elif isinstance(num_items, Tensor):
        factor = 1 / divisor(num_items, counted, student, dtype)
    elif num_items is not None:
        factor = 1 / num_items
    elif counts is None:
        factor = 1 / max(math.prod(student.shape[:-1]), 1)
    else:
        total = counts.sum(dtype=dtype)
        factor = torch.where(total == 0, 1.0, total).reciprocal()
    if torch.compiler.is_compiling():  # which would compile again for each number
        return scalar(factor, dtype, student.device)
    return factor


def divisor(
    num_items: Tensor, counted: Tensor | None, student: Tensor, dtype: torch.dtype
) -> Tensor:
    """num_items; NaN where it is not positive, but for 0 items where no row counts, which is 1."""
    items = scalar(num_items, dtype, student.device)
    divisor = torch.where(items > 0, items, math.nan)
    if counted is None:
        return divisor
    return torch.where((items == 0) & ~counted.any(), 1.0, divisor)


def factors_of_terms(
    given: Settings,
    row_weight: Tensor | None,
    factor: float | Tensor,
    divergence: Tensor | None = None,
) -> list[float | Tensor | None]:
    """What the divergence, cross-entropy and entropy of a row are multiplied by; None: absent.

    factor: of the rows. divergence: theirs, where temperatures may train: the scale of an infinite
        one would give them a gradient that is infinite too, and gives none.
    """
    scale: float | Tensor = 1.0
    if given.scale_by_temperature:
        student, (_, teacher) = given.temperature, given.of_teacher
        scale = student if isinstance(student, Tensor) else float(student)
        scale = scale * teacher
        power = given.divergence.temperature_power
        scale = scale if power == 2 else scale ** (power / 2)
        if isinstance(scale, Tensor):
            scale = scale.flatten() if scale.dim() else scale
            if divergence is not None and scale.requires_grad:
                scale = torch.where(divergence.detach().isinf(), scale.detach(), scale)
    weight = factor if row_weight is None else factor * row_weight
    alpha, entropy_weight = given.alpha, given.entropy_weight
    return [
        alpha * scale * weight if alpha > 0 else 0.0,
        (1 - alpha) * weight if alpha < 1 else None,
        entropy_weight * weight if entropy_weight != 0 else None,
    ]


def weighted(values: Any, factors: Sequence[float | Tensor | None]) -> Tensor:
    """The weighted rows: a term whose factor is the number 0 is left out, were it infinite."""
    terms = [
        factor * values[kind]
        for kind, factor in zip((KD, CE, ENTROPY), factors, strict=True)
        if isinstance(factor, Tensor) or factor
    ]
    return sum(terms[1:], terms[0]) if terms else values[KD] * 0
