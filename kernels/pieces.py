"""What the pieces of a row, of programs or of owners, hand on between launches, or within one."""

from __future__ import annotations

import triton
import triton.language as tl

from fastkd.kernels import phases as P
from fastkd.kernels import records
from fastkd.kernels import rows as R
from fastkd.kernels import words as W

# [pieces, fields, N]: after the sweep of statistics, and after that of sums, whose slopes are taken
# about `anchor`.
STATISTICS_FIELDS = tl.constexpr(len(records.Statistics._fields) + 2)
LABEL_LOGIT = tl.constexpr(STATISTICS_FIELDS.value - 2)  # the student's, and then the teacher's
SUMS_FIELDS = tl.constexpr(len(records.Sums._fields) + 1)
ANCHOR = tl.constexpr(SUMS_FIELDS.value - 1)


@triton.jit
def write_fields(pieces, piece, turn, rows, fields, FIELDS: tl.constexpr, PIECES: tl.constexpr):
    if pieces.dtype.element_ty == tl.int64:
        W.post(pieces, piece, turn, fields, FIELDS, PIECES)
    else:
        pieces += piece.to(tl.int64) * FIELDS * rows + turn
        for i in tl.static_range(FIELDS):
            tl.store(pieces + i * rows, fields[i])


@triton.jit
def read_fields(pieces, turn, rows, neutral, FIELDS: tl.constexpr, PIECES: tl.constexpr):
    """[pieces, 1] each, of a power of two of pieces: those beyond PIECES are neutral."""
    found = ()
    if pieces.dtype.element_ty == tl.int64:
        words = W.take(pieces, turn, FIELDS, PIECES, neutral[0].shape[0])
        for i in tl.static_range(FIELDS):
            x = W.number(words[i], neutral[i], PIECES)
            found = found + (x,)  # type: ignore[assignment]  # one more
    else:
        piece = tl.arange(0, neutral[0].shape[0])[:, None]
        pieces += piece.to(tl.int64) * FIELDS * rows + turn
        for i in tl.static_range(FIELDS):
            x = tl.load(pieces + i * rows, mask=piece < PIECES, other=neutral[i])
            found = found + (x,)  # type: ignore[assignment]  # one more
    return found


@triton.jit
def write_statistics(
    pieces, piece, turn, rows, stats, label_logit, teacher_logit, PIECES: tl.constexpr
):
    fields = stats + (label_logit, teacher_logit)
    write_fields(pieces, piece, turn, rows, fields, STATISTICS_FIELDS, PIECES)


@triton.jit
def read_statistics(pieces, turn, rows, temper, WANT: tl.constexpr, PIECES: tl.constexpr,
                    PADDED: tl.constexpr):  # fmt: skip
    """Of the row, its label's logits, and what of the student's probability each piece has."""
    nothing = R.empty(PADDED)
    neutral = nothing + (nothing.s_sum, nothing.s_sum)
    found = read_fields(pieces, turn, rows, neutral, STATISTICS_FIELDS, PIECES)
    logit, teacher_logit = tl.sum(found[LABEL_LOGIT]), tl.sum(found[LABEL_LOGIT + 1])  # else 0
    each = records.Statistics(*found[:LABEL_LOGIT])
    stats = R.collapse(each, temper, WANT)
    sums = each.s_sum * tl.exp2((each.s_max - stats.s_max) * temper.s_scale)
    return stats, logit, teacher_logit, sums / R.positive(stats.s_sum)


@triton.jit
def write_sums(pieces, piece, turn, rows, sums, anchor, PIECES: tl.constexpr):
    write_fields(pieces, piece, turn, rows, sums + (anchor,), SUMS_FIELDS, PIECES)


@triton.jit
def read_sums(pieces, turn, rows, share, WANT: tl.constexpr, PIECES: tl.constexpr,
              PADDED: tl.constexpr):  # fmt: skip
    """Of the row, and of each piece its slopes and the anchor about which they are taken."""
    nothing = P.no_sums(PADDED)
    found = read_fields(pieces, turn, rows, nothing + (nothing.value,), SUMS_FIELDS, PIECES)
    each, anchor = records.Sums(*found[:ANCHOR]), found[ANCHOR]
    shifted = records.replace(each, slope=each.slope + share * anchor)
    return P.collapse_sums(shifted, WANT), each.slope, anchor


@triton.jit
def rest_of_pieces(slope, share, anchor, row, CONSTANT: tl.constexpr):
    """What c lacks: the slopes of all pieces about c, which a piece that knows it has taken so."""
    if CONSTANT == "slope_sum":
        slope += share * (anchor - row.c)
    return tl.sum(slope)
