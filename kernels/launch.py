"""What the launchers have in common: how rows of operands lie in memory, and buffers for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.divergences import Divergence
from fastkd.kernels import records
from fastkd.kernels.arguments import (
    Extent,
    Factors,
    Formula,
    Operand,
    PerRow,
    Targets,
    Temperatures,
    Tiling,
    varying,
)
from fastkd.kernels.divergences import Device, device_of
from fastkd.kernels.phases import nothing
from fastkd.kernels.tuning import Schedule, power_of_two
from fastkd.problem import Coefficients, Problem


class Rows(NamedTuple):
    """How the rows of operands lie, and what a kernel is compiled for of that."""

    student: Operand
    teacher: Operand
    gradient: Operand
    inner: int | None  # of Extent
    align: int
    shifted: int  # of `sweep`


def rows_in_memory(
    student: Tensor, teacher: Tensor | None, gradient: Tensor | None = None,
    counts: Sequence[int] = (), vector: int = 1,
) -> Rows:  # fmt: skip
    """Of [O, I, columns]; the gradient may be [N, columns].

    counts: numbers of columns that a kernel has to know for multiples of `align` too.
    vector: pointers are to lie at the multiple of it before an operand's first entry, if its
    storage does not begin later, which one that PyTorch allocated does not.
    """
    outer_size, inner_size = (max(size, 1) for size in student.shape[:2])
    tensors = student, teacher, gradient
    strides = [_strides(x, outer_size, inner_size) for x in tensors]
    outers, inners = zip(*strides, strict=True)
    entries = [0 if x is None else x.data_ptr() // x.element_size() for x in tensors]
    align = math.gcd(16, *entries, *outers, *inners, *counts)
    firsts = [
        0 if x is None or entry % vector > x.storage_offset() else entry % vector
        for x, entry in zip(tensors, entries, strict=True)
    ]
    shifted = 0
    if align % vector:
        places = {
            1 << i: (firsts[i], outers[i] % vector, inners[i] % vector)
            for i, x in enumerate(tensors)
            if x is not None
        }
        sides = [place for bit, place in places.items() if bit < 4]
        lead = max(sides, key=list(places.values()).count)
        shifted = sum(bit for bit, place in places.items() if place == lead)
    one_stride = outer_size == 1 or all(o == inner_size * i for o, i in strides)

    def operand(i: int) -> Operand:
        x, first = tensors[i], firsts[i]
        if x is not None and first:
            x = x.as_strided(x.size(), x.stride(), x.storage_offset() - first)
        return Operand() if x is None else Operand(
            x, None if one_stride else varying(outers[i]), varying(inners[i]),
            None if vector == 1 else varying(first),
        )  # fmt: skip

    inner = None if one_stride else varying(inner_size)
    return Rows(operand(0), operand(1), operand(2), inner, align, shifted)


def _strides(x: Tensor | None, outer_size: int, inner_size: int) -> tuple[int, int]:
    if x is None:
        return 0, 0
    inner = x.stride(-2)
    outer = inner_size * inner if x.dim() == 2 else x.stride(0)
    return outer if outer_size > 1 else 0, inner


def extent_of(problem: Problem, operands: Rows) -> Extent:
    columns, width = problem.vocab_size, problem.student.size(-1)
    beyond = width if width > columns else None
    return Extent(varying(problem.rows), columns, beyond, operands.inner)


def laid_out(extent: Extent, operands: Rows, plan: Schedule, pieces: int) -> tuple[Extent, Tiling]:
    """A sweep's launch: the columns of each program are a multiple of a tile's."""
    block = plan.lanes * plan.vector
    reach = extent.columns + (plan.vector - 1 if operands.shifted else 0)
    span = triton.cdiv(triton.cdiv(reach, plan.splits), block) * block
    tile = Tiling(
        operands.align, plan.lanes, plan.vector, plan.splits, pieces, power_of_two(pieces),
        operands.shifted,
    )  # fmt: skip
    return extent._replace(span=span), tile


def wanted(problem: Problem, entropy: bool, metrics: bool) -> int:
    """Bits of records.py for all but the divergence."""
    labels = problem.labels is not None
    want = records.UNIT.value * labels
    want |= records.MEAN.value * (labels and problem.label_smoothing != 0)
    want |= records.ENTROPY.value * (entropy or metrics)
    return want | records.TEACHER_ENTROPY.value * metrics


def per_row(x: Tensor | None) -> PerRow | None:
    """A tensor [N], of any stride."""
    return None if x is None else PerRow(x, varying(x.stride(0)))


def of_rows(problem: Problem, coefficients: Coefficients | None) -> dict[str, Any]:
    """The arguments that are numbers of rows, by their names; coefficients [N], of any stride."""
    kd, ce, entropy = coefficients or (None, None, None)
    t_temperature = problem.teacher_temperature
    if problem.teacher is None:
        kd = t_temperature = None
    elif t_temperature is None and problem.moments is not None:  # the widths make two of one
        t_temperature = problem.student_temperature
    return {
        "temperatures": Temperatures(
            per_row(problem.student_temperature), per_row(t_temperature), problem.moments
        ),
        "targets": Targets(problem.labels, problem.counted, float(problem.label_smoothing)),
        "factors": Factors(per_row(kd), per_row(ce), per_row(entropy)),
    }


def formula_of(problem: Problem) -> Formula:
    """Of its divergence; `slope` is left to who has use for it."""
    device, constant = Device(nothing), None
    if problem.teacher is not None:
        device = device_of(problem.divergence, problem.a, problem.b)
        constant = device.constant or Divergence.of_name(problem.divergence).constant
    return Formula(
        device.evaluate, device.outer, device.at_label, None, tl.constexpr(constant),
        float(problem.a), float(problem.b),
    )  # fmt: skip


def new_rows(problem: Problem, count: int) -> Tensor:
    """fp32 [count, N]; rows that do not count are not written, hence begin as 0."""
    new = torch.empty if problem.counted is None else torch.zeros
    return new((count, problem.rows), dtype=torch.float32, device=problem.student.device)


def new_gradient(problem: Problem) -> Tensor:
    """[N, width], of the student's logits."""
    student = problem.student
    shape = (problem.rows, student.size(-1))
    return torch.empty(shape, dtype=student.dtype, device=student.device)
