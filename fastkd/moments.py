"""Standardised logits: a row's mean and width, which make a temperature of its own of each row.

A softmax does not see what its logits are shifted by, so that of (z - mean) / width at temperature
T is that of z at T * width: the backends standardise by multiplying temperatures, and add to the
gradient what goes through the width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .operators import operator
from .problem import WIDTH, Problem

EPS = 1e-7  # added to the standard deviation
# The width of a row without spread: the softmax is uniform over its entries, the gradient gone.
FLAT = 1e30
BLOCK_ELEMENTS = 1 << 18  # of rows that are worked off at once, and stay in the cache


def standardized(problem: Problem, backend: str) -> Problem:
    """The same problem with its moments, and with the widths in its temperatures.

    The moments carry no graph: their share of the gradient is added by the backends.
    """
    moments = _moments(
        problem.student.detach(), problem.teacher.detach(), problem.counted, problem.vocab_size,
        backend,
    )  # fmt: skip
    teacher_temperature = problem.teacher_temperature
    if teacher_temperature is None:
        teacher_temperature = problem.student_temperature
    return problem._replace(
        student_temperature=problem.student_temperature * moments[0, WIDTH],
        teacher_temperature=teacher_temperature * moments[1, WIDTH],
        moments=moments,
    )


@operator(
    "fastkd::moments",
    "(Tensor student, Tensor teacher, Tensor? counted, SymInt vocab_size, str backend) -> Tensor",
)
def _moments(
    student: Tensor, teacher: Tensor, counted: Tensor | None, vocab_size: int, backend: str
) -> Tensor:
    if backend == "torch":
        out = _new(student, teacher)
        for logits, rows in zip((student, teacher), out, strict=True):
            _fill(rows, logits[..., :vocab_size])
        if counted is not None:  # what does not count may hold NaN
            out[:, :, ~counted] = out.new_tensor([0.0, FLAT, 0.0])[:, None]
        return out
    from .kernels import moments

    return moments.fill(_new(student, teacher), student, teacher, counted, vocab_size)


@_moments.register_fake
def _(student, teacher, counted, vocab_size, backend):
    return _new(student, teacher)


def _new(student: Tensor, teacher: Tensor) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.new_empty(2, 3, student.size(0) * student.size(1), dtype=dtype)


def _fill(out: Tensor, logits: Tensor) -> None:
    """The moments [3, N] of logits [O, I, V], block by block."""
    step = max(1, BLOCK_ELEMENTS // logits.size(-1))
    for rows, matrix in zip(out.view(3, *logits.shape[:2]).unbind(1), logits, strict=True):
        for part, block in zip(rows.split(step, 1), matrix.split(step), strict=True):
            torch.stack(_of_block(block.to(out.dtype)), out=part)


def _of_block(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, width and pull, [R], of rows [R, V]."""
    count: int | Tensor = x.size(-1)
    mean = x.mean(-1, keepdim=True)
    least, most = x.aminmax(dim=-1)
    centred = x - mean
    if not mean.isfinite().all():
        kept = x != -math.inf
        count = kept.sum(-1)
        mean = torch.where(kept, x, 0.0).sum(-1, keepdim=True) / count.clamp_min(1)[:, None]
        least = torch.where(kept, x, math.inf).amin(-1)
        centred = torch.where(kept, x - mean, 0.0)
        count = count.clamp_min(2)
    spread = most > least
    std = (centred.square_().sum(-1) / (count - 1)).sqrt()
    width = torch.where(spread, std + EPS, FLAT)
    return mean[:, 0], width, torch.where(spread, 1 / ((count - 1) * std * width), 0.0)
