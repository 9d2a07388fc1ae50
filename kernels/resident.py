"""Loss and gradient of rows that fit the registers of a program: every operand is read once.

A row is held in parts, [lanes, columns] each, which share its maxima; their sums add up.
A part is loaded as [pieces, lanes, piece]: the threads of a row load a piece between them, then the
next one, hence the length of a piece says how many threads hold a row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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


class Rows(NamedTuple):
    """The rows of a program, [lanes, 1], and what every phase knows of them."""

    index: Any
    exists: Any
    live: Any  # those that count
    columns: Any
    label: Any  # its column
    logits: Any  # the label's, of student and teacher
    smoothing: Any
    zs: Any  # the parts of the student's rows
    ys: Any
    sides: Any  # Sides, without pointers


# --- parts in memory -------------------------------------------------------------------------


@triton.jit
def columns_of(HELD: tl.constexpr, PART: tl.constexpr):
    """The columns [1, columns] of a part."""
    return HELD.parts[PART][0] + tl.arange(0, HELD.parts[PART][1])[None, :]


@triton.jit
def pieces_of(HELD: tl.constexpr, PART: tl.constexpr, PIECE: tl.constexpr):
    """The same as [pieces, 1, piece]."""
    PIECES: tl.constexpr = HELD.parts[PART][1] // PIECE
    begin = HELD.parts[PART][0] + tl.arange(0, PIECES)[:, None, None] * PIECE
    return begin + tl.arange(0, PIECE)[None, None, :]


@triton.jit
def load_parts(operand, index, live, columns, inner, HELD: tl.constexpr):
    """Of the rows of an Operand; from pieces to rows nothing moves."""
    pointer = operand.pointer + M.row_at(index, operand, inner, HELD.align)
    parts = ()
    for i in tl.static_range(len(HELD.parts)):
        column = pieces_of(HELD, i, HELD.piece)
        x = M.load(pointer[None], column, live[None] & (column < columns), "")
        x = tl.reshape(tl.permute(x, [1, 0, 2]), [HELD.lanes, HELD.parts[i][1]])
        parts = parts + (x,)  # type: ignore[assignment]  # each of another shape
    return parts


@triton.jit
def store_part(pointer, x, exists, columns, HELD: tl.constexpr, PART: tl.constexpr):
    """x [lanes, columns] to the rows that begin at pointer [lanes, 1]."""
    PIECE: tl.constexpr = HELD.stored if HELD.stored < x.shape[1] else x.shape[1]
    column = pieces_of(HELD, PART, PIECE)
    x = tl.permute(tl.reshape(x, [x.shape[0], x.shape[1] // PIECE, PIECE]), [1, 0, 2])
    tl.store(pointer[None] + column, x, mask=exists[None] & (column < columns))


# --- the kernel ------------------------------------------------------------------------------


@triton.jit
def resident(
    student, teacher, gradient, extent, temperatures, targets, factors, divergence, outputs,
    FIRST: tl.constexpr, WANT: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """Whole rows, in parts, by pieces of columns; see `arguments.py`."""
    AT_LABEL: tl.constexpr = divergence.at_label
    FACTS: tl.constexpr = records.Facts(
        WANT, divergence.evaluate, temperatures.teacher is None, SUMS=records.LATE & WANT != 0,
        TEMPERATURE=outputs.temperature is not None,
        CE=factors.ce is not None, H=factors.entropy is not None,
    )  # fmt: skip
    a, b, smoothing = P.singles(divergence.a, divergence.b, targets.smoothing)
    rows = number(extent.rows)
    index, exists, live = M.rows_of(rows, targets.counted, HELD.lanes)
    terms = P.factors_of(factors, index, live)
    if FIRST == P.GRADIENT:
        live &= P.any_of(terms)
    temper = P.temper_of(temperatures, index, rows, live, a)
    columns = M.aligned(extent.columns, HELD.align)
    zs = load_parts(student, index, live, columns, extent.inner, HELD)
    ys = zs
    if teacher.pointer is not None:
        ys = load_parts(teacher, index, live, columns, extent.inner, HELD)
    label, logits = label_of(index, live, columns, targets, zs, ys, AT_LABEL, HELD)
    sides = records.Sides(temper=L.leave_out(temper, label, AT_LABEL), a=a, b=b)
    held = Rows(index, exists, live, columns, label, logits, smoothing, zs, ys, sides)
    if FIRST == P.GRADIENT:
        row = P.restore(outputs.state, index, rows, live, WANT, AT_LABEL)
        sums = P.no_sums(HELD.lanes)
        gradient_phase(held, row, sums, terms, gradient, extent, outputs, FACTS, HELD)
    else:
        stats, suspects = statistics(held, teacher.pointer is not None, FACTS, HELD)
        row, hard, sums = sums_phase(held, stats, suspects, divergence, FACTS, HELD)
        sums = gradient_phase(held, row, sums, terms, gradient, extent, outputs, FACTS, HELD)
        P.write_row(
            outputs, records.Found(stats, row, sums, hard), terms,
            index=index, rows=rows, live=live, a=a, b=b, WANT=WANT, OUTER=divergence.outer,
        )  # fmt: skip


@triton.jit
def label_of(index, live, columns, targets, zs, ys, AT_LABEL: tl.constexpr, HELD: tl.constexpr):
    """The column of the rows' labels, and both sides' logits of it, as far as they are needed."""
    label, logit = tl.zeros_like(index).to(tl.int32), tl.zeros_like(index).to(tl.float32)
    teacher_logit = logit
    if targets.labels is not None:
        label = L.label_of(tl.load(targets.labels + index, mask=live, other=0), columns, None)
        for i in tl.static_range(len(HELD.parts)):
            hit = columns_of(HELD, i) == label
            logit += tl.sum(tl.where(hit, zs[i], 0.0), 1, keep_dims=True)
            if AT_LABEL is not None:
                teacher_logit += tl.sum(tl.where(hit, ys[i], 0.0), 1, keep_dims=True)
    return label, (logit, teacher_logit)


@triton.jit
def pair(held, HELD: tl.constexpr, PART: tl.constexpr):
    """A part of both sides as the divergence takes it, be it with or without the label."""
    return L.others(held.zs[PART], held.ys[PART], columns_of(HELD, PART), held.sides.temper)


# --- statistics ------------------------------------------------------------------------------


@triton.jit
def statistics(held, BESIDE: tl.constexpr, FACTS: tl.constexpr, HELD: tl.constexpr):
    """Of the rows; and how many are suspects, whose differences or whose c may lack digits.

    BESIDE: there is a teacher.
    """
    WANT: tl.constexpr = FACTS.WANT
    stats = about_maxima(held, WANT, HELD)
    rise, lift = D.by_sums(stats, WANT)
    suspects = 0
    if BESIDE:
        close = D.close(stats, lift, held.sides.temper, WANT)
        # How many rows are close and how many saturated, by one sum over the program.
        suspects = tl.sum(close.to(tl.int32) + R.saturated(stats).to(tl.int32) * MANY)
        if suspects % MANY > 0:
            rises, lifts = tl.zeros_like(rise), tl.zeros_like(rise)
            for i in tl.static_range(len(HELD.parts)):
                z, y = pair(held, HELD, i)
                more = D.of_tile(z, y, stats, held.sides.temper, FACTS.SAME, WANT)
                rises, lifts = rises + more[0], lifts + more[1]
            rise, lift = tl.where(close, rises, rise), tl.where(close, lifts, lift)
    return records.replace(stats, rise=rise, lift=lift), suspects


@triton.jit
def about_maxima(held, WANT: tl.constexpr, HELD: tl.constexpr):
    """Relative to the maxima of whole rows, which all parts have in common."""
    temper = held.sides.temper
    s_max, t_max, mixture_max = R.FLOOR, R.FLOOR, R.FLOOR / 10
    for i in tl.static_range(len(HELD.parts)):
        z, y = pair(held, HELD, i)
        s_max, t_max = R.highest(z, s_max), R.highest(y, t_max)
    for i in tl.static_range(len(HELD.parts)):
        z, y = pair(held, HELD, i)
        inside = held.live & (columns_of(HELD, i) < held.columns)
        if len(temper.label) != 0:
            inside = L.inside_others(inside, columns_of(HELD, i), temper)
        new = R.piece(z, y, inside, s_max, t_max, mixture_max, temper, WANT)
        if i == 0:
            stats = new
        else:
            stats = R.both(stats, new, WANT)
        mixture_max = stats.mixture_max
    return stats


# --- sums ------------------------------------------------------------------------------------


@triton.jit
def sums_phase(held, stats, suspects, divergence, FACTS: tl.constexpr, HELD: tl.constexpr):
    """The rows, their cross-entropy, and the sums, which the gradient makes where it needs none."""
    AT_LABEL: tl.constexpr = divergence.at_label
    CONSTANT: tl.constexpr = divergence.constant
    WANT: tl.constexpr = FACTS.WANT
    sides, label, logits = held.sides, held.label, held.logits
    row = R.summarize(stats, sides.temper, CONSTANT, WANT)
    row = L.join(row, stats, label, logits[0], logits[1], sides.temper, FACTS.SAME, WANT, AT_LABEL)
    hard = P.cross_entropy(stats, row, label, logits[0], held.columns, held.smoothing, WANT)
    sums, total = P.no_sums(HELD.lanes), float("nan")
    if not FACTS.SUMS:
        for i in tl.static_range(len(HELD.parts)):
            sums = P.sum_tile(sums, held.zs[i], held.ys[i], columns_of(HELD, i), row, sides, FACTS)
        row, total = P.with_sums(row, sums, CONSTANT, WANT), sums.value
    row = L.with_slopes(row, total, sides.a, sides.b, WANT, AT_LABEL)
    if records.REST & WANT:
        rest = tl.zeros_like(row.s_max)
        if suspects >= MANY:
            for i in tl.static_range(len(HELD.parts)):
                rest += P.rest_of(held.zs[i], held.ys[i], columns_of(HELD, i), row, sides, FACTS)
            rest = tl.where(P.lacking(row, R.saturated(stats)), rest, 0.0)
        row = records.replace(row, rest=rest)
    return row, hard, sums


# --- the gradient ----------------------------------------------------------------------------


@triton.jit
def gradient_phase(
    held, row, sums, terms, gradient, extent, outputs, FACTS: tl.constexpr, HELD: tl.constexpr
):
    """Writes the rows' gradient and that of the temperature; the sums, with those that it makes."""
    WRITES: tl.constexpr = gradient.pointer is not None
    if WRITES:
        pointer = gradient.pointer + M.row_at(held.index, gradient, extent.inner, HELD.align)
        width = held.columns if extent.width is None else M.aligned(extent.width, HELD.align)
    if WRITES or FACTS.TEMPERATURE:
        asked = records.Asked(row, held.label, held.columns, held.smoothing, terms)
        scale_grad = tl.zeros_like(row.s_max)
        for i in tl.static_range(len(HELD.parts)):
            z, both, column = held.zs[i], pair(held, HELD, i), columns_of(HELD, i)
            value, slope, q = P.divergence_tile(both, column, held.sides, asked, FACTS)
            g, tempered = P.gradient_tile(z, slope, q, column, held.sides, asked, FACTS)
            if WRITES:
                # Of a row that does not count, whose factors are 0, it is 0 already.
                if extent.width is not None:
                    g = tl.where(column < held.columns, g, 0.0)
                g = g.to(pointer.dtype.element_ty)
                store_part(pointer, g, held.exists, width, HELD, i)
            if FACTS.SUMS:
                sums = P.add_sums(sums, z, held.ys[i], value, slope, row, FACTS.WANT)
            if FACTS.TEMPERATURE:
                scale_grad += P.temperature_term(tempered, z, row)
        if FACTS.TEMPERATURE:
            slope = -held.sides.temper.s_rate * scale_grad
            M.row_store(outputs.temperature, slope, held.index, held.live)
    return sums
