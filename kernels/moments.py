"""The moments of both sides' rows, for standardised logits: one sweep, before those of the loss.

Pieces of a row are summed up as (count, mean, sum of squares about that mean), which merge without
cancellation: Chan, Golub & LeVeque 1979. The mean is in two parts, an origin that a piece keeps and
the rest: else the merge would square a difference of two large means, each of them rounded.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd import problem
from fastkd.kernels import memory as M
from fastkd.kernels import records
from fastkd.kernels import walk as W
from fastkd.kernels.arguments import Extent, number, varying
from fastkd.kernels.launch import rows_in_memory
from fastkd.kernels.pieces import read_fields, write_fields
from fastkd.kernels.tuning import power_of_two, schedule
from fastkd.sharding import LOCAL, Merge

EPS = tl.constexpr(problem.EPS)
FLAT = tl.constexpr(problem.FLAT)
LARGEST = tl.constexpr(3e38)
FIELDS = tl.constexpr(7)  # of a piece


class Piece(NamedTuple):
    """Of a piece of a row, without its -inf: count, mean, sum of squares about it, bounds.

    Mean and squares are those of the logits over 2^exponent, which is above all of them: so that
    the squares of the largest numbers do not overflow, nor those of the smallest vanish.
    """

    count: Any
    origin: Any
    mean: Any  # less the origin
    square: Any
    least: Any
    most: Any
    exponent: Any


@triton.jit
def _empty(LANES: tl.constexpr):
    zero = tl.zeros([LANES, 1], tl.float32)
    return Piece(zero, zero, zero, zero, zero + float("inf"), zero - float("inf"), zero - 126.0)


@triton.jit
def _exponent(least, most):
    """Of the power of two above -least and most, as far as it and its inverse are normal; the
    least one where all is masked, so that lanes that have entries decide."""
    size = tl.where(least <= most, tl.maximum(tl.abs(least), tl.abs(most)), 0.0)
    bits = size.to(tl.int32, bitcast=True)
    return tl.minimum(tl.maximum((bits >> 23) - 126, -126), 126).to(tl.float32)


@triton.jit
def _over(piece, exponent):
    by = tl.exp2(piece.exponent - exponent)
    return records.replace(
        piece, origin=piece.origin * by, mean=piece.mean * by, square=piece.square * (by * by),
        exponent=exponent,
    )  # fmt: skip


@triton.jit
def _add(piece, x):
    """The pieces [lanes, 1] with a tile added."""
    kept = x != -float("inf")
    least = tl.min(tl.where(kept, x, float("inf")), 1, keep_dims=True)
    most = tl.maximum(piece.most, tl.max(x, 1, keep_dims=True))
    least = tl.minimum(piece.least, least)
    piece = _over(piece, tl.maximum(piece.exponent, _exponent(least, most)))
    x *= tl.exp2(-piece.exponent)
    n = tl.sum(kept.to(tl.float32), 1, keep_dims=True)
    each = 1.0 / tl.maximum(n, 1.0)
    m = tl.sum(tl.where(kept, x, 0.0), 1, keep_dims=True) * each
    centred = tl.where(kept, x - m, 0.0)
    rest = tl.sum(centred, 1, keep_dims=True) * each  # that m lacks
    origin = tl.where(piece.count > 0, piece.origin, m)
    count = piece.count + n
    share = n / tl.maximum(count, 1.0)
    delta = m - origin + rest - piece.mean
    spread = tl.sum(centred * centred, 1, keep_dims=True) - n * rest * rest
    spread += delta * delta * (piece.count * share)
    return Piece(
        count, origin, piece.mean + delta * share, piece.square + spread,
        least, most, piece.exponent,
    )  # fmt: skip


@triton.jit
def _step(pieces, tile, sides, known, FACTS: tl.constexpr):
    s = _add(pieces[0], M.load(sides.student, tile.at, tile.inside, "evict_last"))
    t = _add(pieces[1], M.load(sides.teacher, tile.at, tile.inside, "evict_last"))
    return s, t


@triton.jit
def _collapse(piece):
    """The whole from its lanes: scalars."""
    piece = _over(piece, tl.max(piece.exponent))
    count = tl.sum(piece.count)
    n = tl.maximum(count, 1.0)
    origin = tl.sum(piece.count * piece.origin) / n
    means = tl.where(piece.count > 0, piece.origin - origin, 0.0) + piece.mean
    mean = tl.sum(piece.count * means) / n
    off = means - mean
    square = tl.sum(piece.square + piece.count * off * off)
    return Piece(
        count, origin, mean, square, tl.min(piece.least), tl.max(piece.most), piece.exponent
    )


@triton.jit
def _write(out, index, rows, piece, exists):
    spread, free = piece.most > piece.least, tl.maximum(piece.count - 1.0, 1.0)
    unit, scaled = tl.exp2(piece.exponent), tl.sqrt(piece.square / free)
    std = scaled * unit
    width = tl.where(spread, std + EPS, FLAT)
    width_slope = tl.exp2(-piece.exponent) * (1.0 / tl.where(spread, free * scaled, 1.0))
    width_slope = tl.where(spread, tl.minimum(width_slope, LARGEST), 0.0)
    tl.store(out + index, (piece.origin + piece.mean) * unit, mask=exists)
    tl.store(out + rows + index, width, mask=exists)
    tl.store(out + 2 * rows + index, width_slope, mask=exists)


@triton.jit
def _moments(
    student, teacher, extent, counted, out, pieces,
    RESIDENT: tl.constexpr, ALIGN: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """RESIDENT: a lane is a row, of up to VECTOR columns; else the lanes share a row.

    pieces: in place of `out`, where other owners have columns of these rows.
    """
    rows, columns = number(extent.rows), extent.columns
    # A row that does not count has no columns.
    if RESIDENT:
        index, exists, live = M.rows_of(rows, counted, LANES)
    else:
        index, exists = tl.program_id(0).to(tl.int64), None
        if counted is not None:
            columns = tl.where(tl.load(counted + index) != 0, columns, 0)
    student = student.pointer + M.row_at(index, student, extent.inner, ALIGN)
    teacher = teacher.pointer + M.row_at(index, teacher, extent.inner, ALIGN)
    s, t = _empty(LANES), _empty(LANES)
    if RESIDENT:
        at = tl.arange(0, VECTOR)[None, :]
        inside = live & (at < M.aligned(columns, ALIGN))
        s = _add(s, M.load(student, at, inside, ""))
        t = _add(t, M.load(teacher, at, inside, ""))
    else:
        stretch = W.stretch_of(0, columns, 0, columns, LANES, VECTOR, 0)
        s, t = W.walk((s, t), stretch, records.Sides(student, teacher), None, None, _step, True)
        s, t = _collapse(s), _collapse(t)
    if pieces is None:
        _write(out, index, rows, s, exists)
        _write(out + 3 * rows, index, rows, t, exists)
    else:
        write_fields(pieces, tl.program_id(0) * 0, index, rows, s + t, 2 * FIELDS, 1)


@triton.jit(do_not_specialize=("rows",))
def _join(out, pieces, rows, PIECES: tl.constexpr, PADDED: tl.constexpr):
    """The moments of a row from its pieces, [pieces, fields, N]."""
    index = tl.program_id(0).to(tl.int64)
    nothing = _empty(PADDED)
    found = read_fields(pieces, index, rows, nothing + nothing, 2 * FIELDS, PIECES)
    _write(out, index, rows, _collapse(Piece(*found[:FIELDS])), None)
    _write(out + 3 * rows, index, rows, _collapse(Piece(*found[FIELDS:])), None)


def fill(
    out: Tensor, student: Tensor, teacher: Tensor, counted: Tensor | None, vocab_size: int,
    merge: Merge = LOCAL,
) -> Tensor:  # fmt: skip
    """Writes the moments [2, 3, N] of `problem.py` to out; 0 is the mean of what does not count.

    merge: of the rows' owners, which gathers once.
    """
    rows, width = student.size(0) * student.size(1), student.size(-1)
    itemsize = min(student.element_size(), teacher.element_size())
    plan = schedule(rows, width, itemsize, student.device, once=True, swept=merge is not LOCAL)
    resident = plan.kind == "resident"
    counts = (vocab_size,) if resident else ()
    operands = rows_in_memory(student, teacher, counts=counts)
    pieces = None if merge is LOCAL else out.new_empty(1, 2 * FIELDS.value, rows)
    if not rows:
        return out
    with torch.cuda.device_of(student):
        _moments[(triton.cdiv(rows, plan.lanes) if resident else rows,)](
            operands.student, operands.teacher,
            Extent(varying(rows), vocab_size, inner=operands.inner), counted, out, pieces,
            RESIDENT=resident, ALIGN=operands.align, LANES=plan.lanes, VECTOR=plan.vector,
            num_warps=plan.warps, enable_fp_fusion=True,
        )  # fmt: skip
        if pieces is not None:
            pieces = merge.gather(pieces).contiguous()
            _join[(rows,)](
                out, pieces, rows, PIECES=merge.size, PADDED=power_of_two(merge.size), num_warps=1,
                enable_fp_fusion=True,
            )  # fmt: skip
    return out
