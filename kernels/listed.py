"""Loss and gradient beside a teacher that lists some columns of a row: its events are these, and
all others as one.

The student's row is swept once for what is not listed, by bits that mark what is; the listed come
to it as one more piece of the row, so that nothing is subtracted. The events lie in one tile. The
row is swept again for the gradient, as if nothing were listed, and the listed are written over it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastkd.kernels import memory as M
from fastkd.kernels import phases as P
from fastkd.kernels import records
from fastkd.kernels import rows as R
from fastkd.kernels import walk as W
from fastkd.kernels.arguments import Factors, number
from fastkd.kernels.arithmetic import LOG2E, log2
from fastkd.kernels.pieces import read_statistics, write_statistics
from fastkd.kernels.sweep import counts, label_of, write_row

BITS = tl.constexpr(32)  # of a word of marks
BARRED = tl.constexpr(-1e30)  # in fp64, for the logarithm of 0
CERTAIN, LEAST = tl.constexpr(0.9), tl.constexpr(1e-16)
BEYOND = tl.constexpr(1e20)  # of log sum p^a q^(1-a), where one of these was


class List(NamedTuple):
    """Columns [N, count], -1 for none, each once in a row; log p there, and of all others."""

    indices: Any
    log_probs: Any  # fp64
    rest: Any  # fp64, [N]; None: it is left out of the sum
    count: Any  # varying
    marks: Any  # [N, words], a bit for each position, made and read by one program
    words: Any  # varying
    logits: Any  # [N, count], what one launch hands on to the next
    tilt: Any  # where the rest is left out: value - tilt * (p - q) is the textbook's


class Entries(NamedTuple):
    """Of a row's list, tiles [1, EVENTS]."""

    at: Any  # in the lists of all rows
    exists: Any
    column: Any  # -1 for none
    listed: Any  # where it is one of the row
    position: Any
    mine: Any  # whether the program has it
    logit: Any
    last: Any  # the place of all others, which are one event


class Events(NamedTuple):
    """Of a row, tiles [1, EVENTS]."""

    slope: Any  # of the divergence to the tempered logits
    value: Any  # scalars from here on: the sum of its values
    c: Any
    alive: Any
    entropy: Any  # the teacher's
    agreement: Any


# --- marks -----------------------------------------------------------------------------------


@triton.jit
def mark(marks, entries, begin, end, BLOCK: tl.constexpr):
    """Sets the bits of what is listed, and clears all others from begin to end."""
    M.fill_zero(marks, begin // BITS, end // BITS, BLOCK)
    tl.debug_barrier()
    position = entries.position
    bit = tl.full(position.shape, 1, tl.int32) << (position % BITS).to(tl.int32)
    tl.atomic_or(marks + position // BITS, bit, mask=entries.mine, sem="relaxed", scope="cta")
    tl.debug_barrier()


@triton.jit
def unmarked(marks, tile, VECTOR: tl.constexpr):
    """Which of a tile's positions are not listed; a lane's lie in one word."""
    # Past L1, which has no part in the atomic operations.
    word = tl.load(marks + tile.first // BITS, cache_modifier=".cg") >> (tile.first % BITS)
    return ((word >> tl.arange(0, VECTOR)[None, :]) & 1) == 0


# --- steps of the sweeps ---------------------------------------------------------------------


@triton.jit
def unlisted_step(stats, tile, sides, marks, FACTS: tl.constexpr):
    free = unmarked(marks, tile, tile.at.shape[1])
    z = M.load(sides.student, tile.at, tile.inside, "evict_last")
    z = P.fold(tl.where(free, z, -float("inf")))
    free = P.fold(free if tile.inside is None else free & tile.inside)
    return R.of_one_side(R.add(R.of_one_side(stats), z, z, free, sides.temper, FACTS.WANT))


class Unlisted(NamedTuple):
    """What the gradient's sweep needs of a row; row.t_max is the maximum of what is not listed."""

    marks: Any
    scale: Any  # the gradient of its event
    log_sum: Any  # log2 of its exponentials' sum
    asked: Any


@triton.jit
def gradient_step(scale_grad, tile, sides, unlisted, FACTS: tl.constexpr):
    """Of all columns as if none were listed; the listed are written over it."""
    asked = unlisted.asked
    z = M.load(sides.student, tile.at, tile.inside, "evict_first")
    if FACTS.TEMPERATURE:
        free = unmarked(unlisted.marks, tile, tile.at.shape[1])
        z = tl.where(free, z, -float("inf"))
    # Of the cross-entropy and the entropy, as there is no teacher.
    _, none, q = P.divergence_tile((z, z), tile.at, sides, asked, FACTS)
    g, tempered = P.gradient_tile(z, none, q, tile.at, sides, asked, FACTS)
    own = unlisted.scale * tl.exp2((z - asked.row.t_max) * sides.temper.s_scale - unlisted.log_sum)
    if sides.gradient is not None:
        g = (g + own).to(sides.gradient.dtype.element_ty)
        tl.store(sides.gradient + tile.at, g, mask=tile.inside)
    if FACTS.TEMPERATURE:
        scale_grad += P.temperature_term(tempered + own, z, asked.row)
    return scale_grad


# --- the events ------------------------------------------------------------------------------


@triton.jit
def entries_of(piece, teacher, HANDED_ON: tl.constexpr, EVENTS: tl.constexpr):
    """HANDED_ON: the logits are those that the launch before has left, as another program of this
    one may have written over them.
    """
    count, stretch = number(teacher.count), piece.stretch
    event = tl.arange(0, EVENTS)[None, :]
    at, exists = piece.index * count + event, event < count
    column = tl.load(teacher.indices + at, mask=exists, other=-1)
    listed = (column >= 0) & (column < piece.all_columns)
    position = tl.where(listed, column, 0).to(tl.int32) + stretch.shift
    mine = listed & (position >= stretch.begin) & (position < stretch.end)
    logits = teacher.logits + at if HANDED_ON else piece.sides.student + position
    z = tl.load(logits, mask=listed, other=-float("inf")).to(tl.float32)
    return Entries(at, exists, column, listed, position, mine, logit=z, last=event == count)


@triton.jit
def teacher_log_probs(entries, teacher, index):
    """log p of the events, in fp64."""
    lp = tl.load(teacher.log_probs + entries.at, mask=entries.column >= 0, other=-float("inf"))
    if teacher.rest is not None:
        lp = tl.where(entries.last, tl.load(teacher.rest + index), lp)
    return lp


@triton.jit
def student_log_probs(entries, row, temper):
    """log q of the events, in fp64, and the sum of their exponentials.

    row.t_max and row.gap: the maximum of what is not listed, and the sum of its exponentials.
    """
    rate, s_max = temper.s_rate.to(tl.float64), row.s_max.to(tl.float64)
    rest = (row.t_max.to(tl.float64) - s_max) * rate + tl.log(row.gap.to(tl.float64))
    score = (entries.logit.to(tl.float64) - s_max) * rate
    score = tl.where(entries.listed, score, -float("inf"))
    score = tl.where(entries.last, rest, score)
    total = tl.sum(tl.exp(score))
    return score - tl.log(R.positive(total)), total


@triton.jit
def log_mixture(lp, lq, a):
    """log sum p^a q^(1-a)."""
    low = tl.maximum(lq, BARRED)
    w = low + a * (tl.maximum(lp, BARRED) - low)
    top = tl.max(w)
    c = (top + tl.log(tl.sum(tl.exp(w - top)))).to(tl.float32)
    return tl.where(tl.abs(c) > BEYOND, c * float("inf"), c)


@triton.jit
def of_certain(slope, q):
    """The slopes sum to 0; of an event that is nearly certain those of the others have the digits,
    down to where fp64 has none.
    """
    certain = q > CERTAIN
    others = tl.sum(tl.where(certain, 0.0, slope))
    others = tl.where(tl.abs(others) < LEAST, 0.0, others)
    return tl.where(certain, -others, slope)


@triton.jit
def events_of(entries, lp, tilt, row, temper, a, b, REST: tl.constexpr, DIVERGENCE: tl.constexpr,
              CONSTANT: tl.constexpr):  # fmt: skip
    """In fp64 up to the divergence's terms: there are few, and d is a difference of logarithms."""
    listed = entries.listed
    lq, total = student_log_probs(entries, row, temper)
    alive = row.alive & (total != 0)  # NaN stays
    q64, p64 = tl.exp(lq), tl.exp(lp)
    d64 = lp - lq
    p, q, d = p64.to(tl.float32), q64.to(tl.float32), d64.to(tl.float32)
    lp2, lq2 = (lp * LOG2E).to(tl.float32), (lq * LOG2E).to(tl.float32)
    d2 = (d64 * LOG2E).to(tl.float32)
    c = row.c
    if REST:
        if CONSTANT == "reverse_kl":
            c = -tl.sum(tl.where(q64 > 0, q64 * d64, 0.0)).to(tl.float32)
        if CONSTANT == "log_mixture":
            c = log_mixture(lp, lq, temper.a.to(tl.float64))
        value, slope = DIVERGENCE(lp2, lq2, p, q, d, d2, c, a, b)
        if CONSTANT == "slope_sum":
            c += tl.sum(slope)
            value, slope = DIVERGENCE(lp2, lq2, p, q, d, d2, c, a, b)
        if CONSTANT != "none":
            slope -= q * tl.sum(slope)  # what c lacks
        total = tl.sum(value)
    else:
        value, slope = DIVERGENCE(lp2, lq2, p, q, d, d2, 0.0, a, b)
        slope = tl.where(listed, slope - tilt * q, 0.0)
        slope -= q * tl.sum(slope)
        excess = tl.sum(tl.where(listed, p64 - q64, 0.0)).to(tl.float32)
        total = tl.sum(tl.where(listed, value, 0.0)) + tilt * excess
    slope = of_certain(slope, q)
    # Of an infinite value c may be NaN, as a difference of infinities; other NaN come out.
    defined = tl.where(tl.abs(total) != float("inf"), tl.abs(c) != float("inf"), c - c == 0.0)
    slope = tl.where(alive & defined, slope, 0.0)
    entropy = -tl.sum(tl.where(p64 > 0, p64 * lp, 0.0)).to(tl.float32)
    best = tl.max(tl.where(listed, lp, -float("inf")))
    both = listed & (lp == best) & (entries.logit == row.s_max)
    return Events(slope, total, c, alive, entropy, agreement=tl.max(tl.where(both, 1.0, 0.0)))


# --- the kernel ------------------------------------------------------------------------------


@triton.jit
def listed(
    student, gradient, teacher, extent, temperatures, targets, factors, divergence, outputs, pieces,
    FIRST: tl.constexpr, LAST: tl.constexpr, WANT: tl.constexpr, EVENTS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """`extent.span` columns of a row: the statistics, and all that follows from them.

    In one launch, or where a row has several programs in two, between which stand `pieces`; or all
    that follows from `outputs.state`. EVENTS: a power of two, above the number of listed columns.
    Positions, tiles and `shifted` are as in `sweep`.
    """
    BLOCK: tl.constexpr = TILE.lanes * TILE.vector
    BACKWARD: tl.constexpr = FIRST == P.GRADIENT and pieces.statistics is None
    FACTS: tl.constexpr = records.Facts(
        WANT, P.nothing, True, SUMS=False, TEMPERATURE=outputs.temperature is not None,
        CE=factors.ce is not None, H=factors.entropy is not None,
    )  # fmt: skip
    index, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if not counts(index, targets, factors, BACKWARD):
        if LAST == P.GRADIENT:
            W.blank(index, split, student, student, gradient, extent, TILE)
        return
    a, b, smoothing = P.singles(divergence.a, divergence.b, targets.smoothing)
    rows, columns = number(extent.rows), extent.columns
    student_at, _, gradient_at, shift = W.start(index, student, student, gradient, extent, TILE)
    stretch = W.stretch_of(
        split, extent.span, shift, columns, TILE.lanes, TILE.vector, TILE.shifted
    )
    student, gradient = student.pointer + student_at, gradient.pointer
    if gradient is not None:
        gradient += gradient_at
        if LAST == P.GRADIENT and split == 0:
            M.fill_beyond(gradient, shift, extent, BLOCK)

    temper = P.temper_of(temperatures, index, rows, None, a)
    label, logits = label_of(index, targets, extent, stretch, student, None, None)
    sides = records.Sides(student, None, gradient, temper, a, b)
    piece = records.Piece(
        index, index, rows, split, columns, label, logits, smoothing, stretch, sides
    )
    entries = entries_of(piece, teacher, FIRST == P.GRADIENT and not BACKWARD, EVENTS)
    marks = teacher.marks
    if FIRST == P.STATISTICS or FACTS.TEMPERATURE:
        marks += index * number(teacher.words)
        mark(marks, entries, stretch.begin, stretch.begin + extent.span, BLOCK)

    if BACKWARD:
        row = P.restore(outputs.state, index, rows, None, WANT, None)
    else:
        stats, label_logit = unlisted_statistics(piece, marks, pieces, FIRST, FACTS, TILE)
        if LAST == P.STATISTICS:
            write_statistics(
                pieces.statistics, split, index, rows, stats, label_logit, 0.0, TILE.pieces
            )
            if split == 0:
                tl.store(teacher.logits + entries.at, entries.logit, mask=entries.exists)
            return
        row, stats = whole_row(stats, entries, temper, WANT)
    lp = teacher_log_probs(entries, teacher, index)
    found = events_of(
        entries, lp, teacher.tilt, row, temper, a, b, REST=teacher.rest is not None,
        DIVERGENCE=divergence.evaluate, CONSTANT=divergence.constant,
    )  # fmt: skip
    terms = P.factors_of(factors, index, None)
    if not BACKWARD:
        row = records.replace(row, c=found.c, t_entropy=found.entropy, alive=found.alive)
        if split == 0:
            hard = P.cross_entropy(stats, row, label, label_logit, columns, smoothing, WANT)
            zero = row.c * 0.0
            sums = records.Sums(found.value, zero, found.agreement, zero, zero)
            whole = records.Found(stats, row, sums, hard)
            write_row(piece, whole, terms, divergence, outputs, WANT)
    if gradient is not None or FACTS.TEMPERATURE:
        gradient_phase(piece, entries, found.slope, row, terms, marks, outputs, FACTS, TILE)


@triton.jit
def unlisted_statistics(piece, marks, pieces, FIRST: tl.constexpr, FACTS: tl.constexpr,
                        TILE: tl.constexpr):  # fmt: skip
    """Of what is not listed, be it swept or handed on by the launch before; the label's logit."""
    WANT: tl.constexpr = FACTS.WANT
    temper, logit = piece.sides.temper, piece.logits[0]
    if FIRST == P.STATISTICS:
        stats = R.empty(TILE.lanes * TILE.vector // P.THREAD)
        stats = W.walk(stats, piece.stretch, piece.sides, marks, FACTS, unlisted_step, True)
        stats = R.collapse(R.rebase(stats, temper, WANT), temper, WANT)
    else:
        stats, logit, _, _ = read_statistics(
            pieces.statistics, piece.index, piece.rows, temper, WANT, TILE.pieces, TILE.padded
        )
    return stats, logit


@triton.jit
def whole_row(unlisted, entries, temper, WANT: tl.constexpr):
    """The row and its statistics, with the listed as one more piece."""
    z = entries.logit
    most = R.highest(z, unlisted.s_max)
    moved = R.move(unlisted, most, most, temper, WANT)
    some = R.piece(z, z, entries.listed, most, most, R.FLOOR / 10, temper, WANT)
    stats = R.collapse(R.both(moved, some, WANT), temper, WANT)
    row = R.summarize(stats, temper, "none", WANT)
    # What is not listed is in the place of the teacher: see `problem.py`.
    return records.replace(row, t_max=unlisted.s_max, gap=unlisted.s_sum), stats


@triton.jit
def gradient_phase(piece, entries, slope, row, terms, marks, outputs, FACTS: tl.constexpr,
                   TILE: tl.constexpr):  # fmt: skip
    """Writes the piece's gradient, and its part of the temperature's; slope: of the events."""
    LANES: tl.constexpr = TILE.lanes
    sides, rate, z = piece.sides, piece.sides.temper.s_rate, entries.logit
    slope *= tl.where(terms.kd != 0, terms.kd * rate, 0.0)
    slope = tl.where(terms.kd != 0, slope, 0.0)
    others = Factors(kd=row.s_max * 0.0, ce=terms.ce, entropy=terms.entropy)
    asked = records.Asked(row, piece.label, piece.all_columns, piece.smoothing, others)
    scale = tl.sum(tl.where(entries.last, slope, 0.0))
    unlisted = Unlisted(marks, scale, log2(R.positive(row.gap)), asked)
    # Against the sweep before this one.
    scale_grad = tl.zeros([LANES, 1], tl.float32)
    scale_grad = W.walk(scale_grad, piece.stretch, sides, unlisted, FACTS, gradient_step, False)
    _, none, q = P.divergence_tile((z, z), entries.position, sides, asked, FACTS)
    g, tempered = P.gradient_tile(z, none, q, entries.position, sides, asked, FACTS)
    if sides.gradient is not None:
        tl.debug_barrier()  # over what the sweep has written
        g = (g + slope).to(sides.gradient.dtype.element_ty)
        tl.store(sides.gradient + entries.position, g, mask=entries.mine)
    if FACTS.TEMPERATURE:
        own = P.temperature_term(tl.where(entries.mine, tempered + slope, 0.0), z, row)
        total = tl.sum(scale_grad) + tl.sum(own)
        tl.store(outputs.temperature + piece.index * TILE.splits + piece.split, -rate * total)
