"""Loss and gradient of rows that fit the registers of a program: every operand is read once.

A row is held in parts, [lanes, columns] each, which share its maxima; their sums add up.
A part is loaded as [pieces, lanes, piece]: the threads of a row load a piece between them, then the
next one, hence the length of a piece says how many threads hold a row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastkd.kernels import differences as D
from fastkd.kernels import labels as L
from fastkd.kernels import memory as M
from fastkd.kernels import phases as P
from fastkd.kernels import records
from fastkd.kernels import rows as R
from fastkd.kernels.arguments import number

MANY = tl.constexpr(1 << 16)  # more rows than a program has


@triton.jit
def columns_of(PARTS: tl.constexpr, PART: tl.constexpr):
    """The columns [1, columns] of a part."""
    return PARTS[PART][0] + tl.arange(0, PARTS[PART][1])[None, :]


@triton.jit
def pieces_of(PARTS: tl.constexpr, PART: tl.constexpr, PIECE: tl.constexpr):
    """The same as [pieces, 1, piece]."""
    begin = PARTS[PART][0] + tl.arange(0, PARTS[PART][1] // PIECE)[:, None, None] * PIECE
    return begin + tl.arange(0, PIECE)[None, None, :]


@triton.jit
def load_parts(pointer, live, columns, PARTS: tl.constexpr, PIECE: tl.constexpr):
    """Of the rows that begin at pointer [lanes, 1]; from pieces to rows nothing moves."""
    parts = ()
    for i in tl.static_range(len(PARTS)):
        column = pieces_of(PARTS, i, PIECE)
        x = M.load(pointer[None], column, live[None] & (column < columns), "")
        x = tl.reshape(tl.permute(x, [1, 0, 2]), [pointer.shape[0], PARTS[i][1]])
        parts = parts + (x,)  # type: ignore[assignment]  # each of another shape
    return parts


@triton.jit
def store_part(
    pointer, x, exists, columns, PARTS: tl.constexpr, PART: tl.constexpr, MOST: tl.constexpr
):
    """x [lanes, columns] to such rows, in pieces of at most MOST columns."""
    PIECE: tl.constexpr = MOST if MOST < x.shape[1] else x.shape[1]
    column = pieces_of(PARTS, PART, PIECE)
    x = tl.permute(tl.reshape(x, [x.shape[0], x.shape[1] // PIECE, PIECE]), [1, 0, 2])
    tl.store(pointer[None] + column, x, mask=exists[None] & (column < columns))


@triton.jit
def resident(
    student, teacher, gradient, extent, temperatures, targets, factors, divergence, outputs,
    FIRST: tl.constexpr, WANT: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """Whole rows, in parts, by pieces of columns; see `arguments.py`."""
    AT_LABEL: tl.constexpr = divergence.at_label
    CONSTANT: tl.constexpr = divergence.constant
    SAME: tl.constexpr = temperatures.teacher is None
    LATE: tl.constexpr = records.LATE & WANT != 0
    ALIGN: tl.constexpr = HELD.align
    LANES: tl.constexpr = HELD.lanes
    PARTS: tl.constexpr = HELD.parts
    FACTS: tl.constexpr = records.Facts(
        WANT, divergence.evaluate, SAME, SUMS=LATE, TEMPERATURE=outputs.temperature is not None,
        CE=factors.ce is not None, H=factors.entropy is not None,
    )  # fmt: skip
    a, b, smoothing = P.singles(divergence.a, divergence.b, targets.smoothing)
    rows = number(extent.rows)
    index = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)[:, None]
    exists = index < rows
    live = exists
    if targets.counted is not None:
        live &= tl.load(targets.counted + index, mask=exists, other=0) != 0
    terms = P.factors_of(factors, index, live)
    if FIRST == P.GRADIENT:
        live &= P.any_of(terms)
    temper = P.temper_of(temperatures, index, rows, live, a)
    columns = M.aligned(extent.columns, ALIGN)
    width = columns if extent.width is None else M.aligned(extent.width, ALIGN)
    student_row = student.pointer + M.row_at(index, student, extent.inner, ALIGN)
    zs = load_parts(student_row, live, columns, PARTS, HELD.piece)
    ys = zs
    if teacher.pointer is not None:
        teacher_row = teacher.pointer + M.row_at(index, teacher, extent.inner, ALIGN)
        ys = load_parts(teacher_row, live, columns, PARTS, HELD.piece)
    label, label_logit = tl.zeros([LANES, 1], tl.int32), tl.zeros([LANES, 1], tl.float32)
    teacher_logit = label_logit
    if targets.labels is not None:
        label = L.label_of(tl.load(targets.labels + index, mask=live, other=0), columns, None)
        for i in tl.static_range(len(PARTS)):
            hit = columns_of(PARTS, i) == label
            label_logit += tl.sum(tl.where(hit, zs[i], 0.0), 1, keep_dims=True)
            if AT_LABEL is not None:
                teacher_logit += tl.sum(tl.where(hit, ys[i], 0.0), 1, keep_dims=True)
        temper = L.leave_out(temper, label, AT_LABEL)
    sides = records.Sides(temper=temper, a=a, b=b)

    if FIRST == P.GRADIENT:
        row = P.restore(outputs.state, index, rows, live, WANT, AT_LABEL)
    else:
        s_max, t_max, mixture_max = R.FLOOR, R.FLOOR, R.FLOOR / 10
        for i in tl.static_range(len(PARTS)):
            z, y = L.others(zs[i], ys[i], columns_of(PARTS, i), temper)
            s_max, t_max = R.highest(z, s_max), R.highest(y, t_max)
        for i in tl.static_range(len(PARTS)):
            z, y = L.others(zs[i], ys[i], columns_of(PARTS, i), temper)
            inside = live & (columns_of(PARTS, i) < columns)
            if AT_LABEL is not None:
                inside = L.inside_others(inside, columns_of(PARTS, i), temper)
            new = R.piece(z, y, inside, s_max, t_max, mixture_max, temper, WANT)
            if i == 0:
                stats = new
            else:
                stats = R.both(stats, new, WANT)
            mixture_max = stats.mixture_max
        rise, lift = D.by_sums(stats, WANT)
        saturated = R.saturated(stats)
        if teacher.pointer is not None:
            close = D.close(stats, lift, temper, WANT)
            # How many rows are either, by one sum over the program.
            found = tl.sum(close.to(tl.int32) + saturated.to(tl.int32) * MANY)
            if found % MANY > 0:
                zero = tl.zeros([LANES, 1], tl.float32)
                rises, lifts = zero, zero
                for i in tl.static_range(len(PARTS)):
                    z, y = L.others(zs[i], ys[i], columns_of(PARTS, i), temper)
                    more = D.of_tile(z, y, stats, temper, SAME, WANT)
                    rises, lifts = rises + more[0], lifts + more[1]
                rise, lift = tl.where(close, rises, rise), tl.where(close, lifts, lift)
        stats = records.replace(stats, rise=rise, lift=lift)
        row = R.summarize(stats, temper, CONSTANT, WANT)
        row = L.join(row, stats, label, label_logit, teacher_logit, temper, SAME, WANT, AT_LABEL)
        hard = P.cross_entropy(stats, row, label, label_logit, columns, smoothing, WANT)
        sums = P.no_sums(LANES)
        if LATE:
            row = L.with_slopes(row, float("nan"), a, b, WANT, AT_LABEL)
        else:
            for i in tl.static_range(len(PARTS)):
                sums = P.sum_tile(sums, zs[i], ys[i], columns_of(PARTS, i), row, sides, FACTS)
            row = P.with_sums(row, sums, CONSTANT, WANT)
            row = L.with_slopes(row, sums.value, a, b, WANT, AT_LABEL)
        if records.REST & WANT:
            rest = tl.zeros([LANES, 1], tl.float32)
            if found >= MANY:
                for i in tl.static_range(len(PARTS)):
                    rest += P.rest_of(zs[i], ys[i], columns_of(PARTS, i), row, sides, FACTS)
                rest = tl.where(P.lacking(row, saturated), rest, 0.0)
            row = records.replace(row, rest=rest)
    if gradient.pointer is not None or outputs.temperature is not None:
        if gradient.pointer is not None:
            gradient_row = gradient.pointer + M.row_at(index, gradient, extent.inner, ALIGN)
        asked = records.Asked(row, label, columns, smoothing, terms)
        scale_grad = tl.zeros([LANES, 1], tl.float32)
        for i in tl.static_range(len(PARTS)):
            column = columns_of(PARTS, i)
            pair = L.others(zs[i], ys[i], column, temper)
            g, tempered, value, slope = P.gradient_tile(zs[i], pair, column, sides, asked, FACTS)
            if gradient.pointer is not None:
                # Of a row that does not count, whose factors are 0, it is 0 already.
                if extent.width is not None:
                    g = tl.where(column < columns, g, 0.0)
                g = g.to(gradient_row.dtype.element_ty)
                store_part(gradient_row, g, exists, width, PARTS, i, HELD.stored)
            if LATE:
                sums = P.add_sums(sums, zs[i], ys[i], value, slope, row, WANT)
            if outputs.temperature is not None:
                scale_grad += P.temperature_term(tempered, zs[i], row)
        if outputs.temperature is not None:
            M.row_store(outputs.temperature, -temper.s_rate * scale_grad, index, live)
    if FIRST != P.GRADIENT:
        P.write_row(
            outputs, records.Found(stats, row, sums, hard), terms,
            index=index, rows=rows, live=live, a=a, b=b, WANT=WANT, OUTER=divergence.outer,
        )  # fmt: skip
