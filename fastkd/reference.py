"""The naive path: table 1's textbook values, differentiated by autograd. Never optimised."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .divergences import Divergence, plogr
from .problem import Problem


def losses(problem: Problem, entropy: bool, metrics: bool) -> list[Tensor | None]:
    """The rows of `values` (see problem.py), each [N] or None, differentiable."""
    z = problem.student[..., : problem.vocab_size].flatten(0, 1).to(problem.dtype)
    y = problem.teacher[..., : problem.vocab_size].flatten(0, 1).to(problem.dtype)

    counts = ~((z == -math.inf).all(-1) | (y == -math.inf).all(-1))
    if problem.counted is not None:
        counts = counts & problem.counted
    z = torch.where(counts[:, None], z, 0.0)
    y = torch.where(counts[:, None], y, 0.0)

    temperature = problem.student_temperature[:, None]
    lq = torch.log_softmax(z / temperature, -1)
    if problem.teacher_temperature is not None:
        temperature = problem.teacher_temperature[:, None]
    lp = torch.log_softmax(y / temperature, -1)

    divergence = Divergence.of_name(problem.divergence)
    value = divergence.value(lp, lq, problem.a, problem.b)
    rows: list[Tensor | None] = [
        divergence.outer(value.sum(-1), problem.a, problem.b),
        None,
        -plogr(lq, lq).sum(-1) if entropy or metrics else None,
        -plogr(lp, lp).sum(-1) if metrics else None,
        _agreement(z, y) if metrics else None,
    ]
    if problem.labels is not None:
        labels = torch.where(counts, problem.labels, 0)
        rows[1] = F.cross_entropy(
            z, labels, reduction="none", label_smoothing=problem.label_smoothing
        )
    return [None if row is None else torch.where(counts, row, 0.0) for row in rows]


def _agreement(z: Tensor, y: Tensor) -> Tensor:
    shared = (z == z.amax(-1, keepdim=True)) & (y == y.amax(-1, keepdim=True))
    return shared.any(-1).to(z.dtype)
