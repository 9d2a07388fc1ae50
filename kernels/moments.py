"""The moments of both sides' rows, for standardised logits: one sweep, before those of the loss.

Pieces of a row are summed up as (count, mean, sum of squares about that mean), which merge without
cancellation: Chan, Golub & LeVeque 1979.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd import moments
from fastkd.kernels import phases as P
from fastkd.kernels.logits import strides_of
from fastkd.kernels.tuning import schedule

EPS = tl.constexpr(moments.EPS)
FLAT = tl.constexpr(moments.FLAT)


@triton.jit
def _merge(count, mean, square, n, m, s):
    """Two pieces as one."""
    total = count + n
    share = n / tl.maximum(total, 1.0)
    delta = m - mean
    return total, mean + delta * share, square + s + delta * delta * (count * share)


@triton.jit
def _add(count, mean, square, least, most, x):
    """The statistics [lanes, 1] with a tile added, of which -inf is no part."""
    kept = x != -float("inf")
    n = tl.sum(kept.to(tl.float32), 1, keep_dims=True)
    m = tl.sum(tl.where(kept, x, 0.0), 1, keep_dims=True) / tl.maximum(n, 1.0)
    centred = tl.where(kept, x - m, 0.0)
    s = tl.sum(centred * centred, 1, keep_dims=True)
    low = tl.min(tl.where(kept, x, float("inf")), 1, keep_dims=True)
    count, mean, square = _merge(count, mean, square, n, m, s)
    high = tl.max(x, 1, keep_dims=True)
    return count, mean, square, tl.minimum(least, low), tl.maximum(most, high)


@triton.jit
def _side(
    logits, outer, inner_stride, inner, counted, out, rows, columns,
    RESIDENT: tl.constexpr, ALIGN: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """RESIDENT: a lane is a row, of up to VECTOR columns; else the lanes share a row."""
    lane, vector = tl.arange(0, LANES)[:, None], tl.arange(0, VECTOR)[None, :]
    zero = tl.zeros([LANES, 1], tl.float32)
    count, mean, square = zero, zero, zero
    least, most = zero + float("inf"), zero - float("inf")
    if RESIDENT:
        index = tl.program_id(0).to(tl.int64) * LANES + lane
        exists = index < rows
        live = exists
        if counted is not None:
            live &= tl.load(counted + index, mask=exists, other=0) != 0
        logits += P.row_at(index, outer, inner_stride, inner, ALIGN)
        x = P.load(logits, vector, live & (vector < P.aligned(columns, ALIGN)), "")
        count, mean, square, least, most = _add(count, mean, square, least, most, x)
    else:
        exists = None
        index = tl.program_id(0).to(tl.int64)
        if counted is not None:
            columns = tl.where(tl.load(counted + index) != 0, columns, 0)
        logits += P.row_at(index, outer, inner_stride, inner, ALIGN)
        BLOCK: tl.constexpr = LANES * VECTOR
        offsets, full = lane * VECTOR + vector, columns // BLOCK
        for i in range(full):
            x = P.load(logits, i * BLOCK + offsets, None, "evict_last")
            count, mean, square, least, most = _add(count, mean, square, least, most, x)
        if full * BLOCK < columns:
            at = full * BLOCK + offsets
            x = P.load(logits, at, at < columns, "evict_last")
            count, mean, square, least, most = _add(count, mean, square, least, most, x)
        total = tl.sum(count)
        whole = tl.sum(count * mean) / tl.maximum(total, 1.0)
        square = tl.sum(square + count * (mean - whole) * (mean - whole))
        count, mean, least, most = total, whole, tl.min(least), tl.max(most)

    spread, free = most > least, tl.maximum(count - 1.0, 1.0)
    std = tl.sqrt(square / free)
    width = tl.where(spread, std + EPS, FLAT)
    pull = tl.where(spread, 1.0 / tl.where(spread, free * std * width, 1.0), 0.0)
    tl.store(out + index, mean, mask=exists)
    tl.store(out + rows + index, width, mask=exists)
    tl.store(out + 2 * rows + index, pull, mask=exists)


@triton.jit(do_not_specialize=("inner", "rows"))
def _moments(
    student, teacher, student_outer, student_inner, teacher_outer, teacher_inner, inner, counted,
    out, rows, columns,
    RESIDENT: tl.constexpr, ALIGN: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    if tl.program_id(1) == 0:
        _side(student, student_outer, student_inner, inner, counted, out, rows, columns,
              RESIDENT, ALIGN, LANES, VECTOR)  # fmt: skip
    else:
        _side(teacher, teacher_outer, teacher_inner, inner, counted, out + 3 * rows, rows, columns,
              RESIDENT, ALIGN, LANES, VECTOR)  # fmt: skip


def fill(
    out: Tensor, student: Tensor, teacher: Tensor, counted: Tensor | None, vocab_size: int
) -> Tensor:
    """Writes the moments [2, 3, N] of `problem.py` to out; 0 is the mean of what does not count."""
    rows, width = student.size(0) * student.size(1), student.size(-1)
    itemsize = min(student.element_size(), teacher.element_size())
    plan = schedule(rows, width, itemsize, student.device, once=True)
    student_outer, student_inner, inner = strides_of(student)
    teacher_outer, teacher_inner, _ = strides_of(teacher)
    align = math.gcd(16, student_outer, student_inner, teacher_outer, teacher_inner)
    resident = plan.kind == "resident"
    if resident:
        align = math.gcd(align, vocab_size)
    if rows:
        with torch.cuda.device_of(student):
            _moments[(triton.cdiv(rows, plan.lanes) if resident else rows, 2)](
                student, teacher, student_outer, student_inner, teacher_outer, teacher_inner, inner,
                counted, out, rows, vocab_size,
                resident, align, plan.lanes, plan.vector, num_warps=plan.warps,
            )  # fmt: skip
    return out
