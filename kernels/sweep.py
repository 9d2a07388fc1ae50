"""Loss and gradient of long rows: one sweep over the columns for each phase."""

from __future__ import annotations

import triton
import triton.language as tl

from fastkd.kernels import differences as D
from fastkd.kernels import labels as L
from fastkd.kernels import memory as M
from fastkd.kernels import phases as P
from fastkd.kernels import records
from fastkd.kernels import rows as R
from fastkd.kernels import walk as W
from fastkd.kernels.arguments import number
from fastkd.kernels.pieces import (
    read_statistics,
    read_sums,
    rest_of_pieces,
    write_statistics,
    write_sums,
)


@triton.jit
def counts(index, targets, factors, BACKWARD: tl.constexpr):
    """Whether a row counts, and where there is an upstream gradient, whether that is not 0."""
    live = True
    if BACKWARD:
        live = P.any_of(P.factors_of(factors, index, None))
    if targets.counted is not None:
        live = live & (tl.load(targets.counted + index) != 0)
    return live


@triton.jit
def sweep(
    student, teacher, gradient, extent, temperatures, targets, factors, divergence, outputs, pieces,
    FIRST: tl.constexpr, LAST: tl.constexpr, WANT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Phases FIRST to LAST of a piece of a row for each program."""
    index, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    BACKWARD: tl.constexpr = FIRST == P.GRADIENT and pieces.statistics is None
    if not counts(index, targets, factors, BACKWARD):
        if LAST == P.GRADIENT:
            W.blank(index, split, student, teacher, gradient, extent, TILE)
        return
    phases(
        index, split, student, teacher, gradient, extent, temperatures, targets, factors,
        divergence, outputs, pieces, FIRST, LAST, WANT, TILE,
    )  # fmt: skip


@triton.jit
def phases(
    index, split, student, teacher, gradient, extent, temperatures, targets, factors, divergence,
    outputs, pieces, FIRST: tl.constexpr, LAST: tl.constexpr, WANT: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Phases FIRST to LAST of `extent.span` columns of a row, in tiles; see `arguments.py`.

    Full tiles are not masked, which keeps their loads 128 bits wide; every sweep runs against the
    one before it, so that it begins on what the cache still holds. Between launches the phases
    hand on through `pieces`: every program of a row writes one, and those of all owners are read.
    FIRST == P.GRADIENT without `pieces` takes the row from `outputs.state`.
    SHIFTED: 0, or rows may begin anywhere, alike on those of student (1), teacher (2) and
    gradient (4) that it is the sum of. Positions are then counted from the multiple of VECTOR
    before these rows' first column, which has position `shift`; what is not alike moves in
    smaller pieces.
    """
    AT_LABEL: tl.constexpr = divergence.at_label
    FACTS: tl.constexpr = records.Facts(
        WANT, divergence.evaluate, temperatures.teacher is None,
        # The gradient's sweep makes the sums, as it needs none of them.
        SUMS=records.LATE & WANT != 0 and LAST == P.GRADIENT,
        TEMPERATURE=outputs.temperature is not None,
        CE=factors.ce is not None, H=factors.entropy is not None,
        BLANKED=factors.ce is None and factors.entropy is None and records.STANDARDIZED & WANT == 0,
    )  # fmt: skip
    a, b, smoothing = P.singles(divergence.a, divergence.b, targets.smoothing)
    rows, columns = number(extent.rows), extent.columns
    turn = index
    if pieces.turn is not None:
        turn = pieces.turn
    student_at, teacher_at, gradient_at, shift = W.start(
        index, student, teacher, gradient, extent, TILE
    )
    stretch = W.stretch_of(
        split, extent.span, shift, columns, TILE.lanes, TILE.vector, TILE.shifted
    )
    student, teacher, gradient = student.pointer, teacher.pointer, gradient.pointer
    student += student_at
    if teacher is not None:
        teacher += teacher_at
    if gradient is not None:
        gradient += gradient_at
        if LAST == P.GRADIENT and split == 0:
            M.fill_beyond(gradient, shift, extent, TILE.lanes * TILE.vector)

    temper = P.temper_of(temperatures, index, rows, None, a)
    label, logits = label_of(index, targets, extent, stretch, student, teacher, AT_LABEL)
    temper = L.leave_out(temper, label, AT_LABEL)
    all_columns = columns if extent.owner is None else number(extent.owner.all_columns)
    sides = records.Sides(student, teacher, gradient, temper, a, b)
    piece = records.Piece(
        index, turn, rows, split, all_columns, label, logits, smoothing, stretch, sides
    )
    if FIRST == P.GRADIENT and pieces.statistics is None:
        row = P.restore(outputs.state, index, rows, None, WANT, AT_LABEL)
        terms = P.factors_of(factors, index, None)
        gradient_sweep(piece, row, False, terms, divergence, outputs, FACTS, TILE)
    else:
        stats, logits, share = statistics(piece, pieces, FIRST, LAST, FACTS, TILE)
        if LAST > P.STATISTICS:
            sums_and_gradient(
                piece, stats, logits, share, factors, divergence, outputs, pieces, FIRST, LAST,
                FACTS, TILE,
            )  # fmt: skip


@triton.jit
def label_of(index, targets, extent, stretch, student, teacher, AT_LABEL: tl.constexpr):
    """The position of a row's label, and both sides' logits of it, as far as they are needed."""
    label, student_logit, teacher_logit = -1, 0.0, 0.0
    if targets.labels is not None:
        label = L.label_of(tl.load(targets.labels + index), extent.columns, extent.owner)
        label += tl.where(label >= 0, stretch.shift, 0)
        # Of the piece that has it: in another, a gradient may take its place meanwhile.
        mine = (label >= stretch.begin) & (label < stretch.end)
        student_logit = tl.load(student + label, mask=mine, other=0.0).to(tl.float32)
        if AT_LABEL is not None:
            teacher_logit = tl.load(teacher + label, mask=mine, other=0.0).to(tl.float32)
    return label, (student_logit, teacher_logit)


# --- statistics ------------------------------------------------------------------------------


@triton.jit
def statistics(
    piece, pieces, FIRST: tl.constexpr, LAST: tl.constexpr, FACTS: tl.constexpr, TILE: tl.constexpr
):
    """Of the row, its label's logits, and each piece's share: by a sweep, or from all pieces."""
    if FIRST == P.STATISTICS:
        stats = statistics_sweep(piece, FACTS, TILE)
        if LAST == P.STATISTICS:
            write_statistics(
                pieces.statistics, piece.split, piece.turn, piece.rows, stats, piece.logits[0],
                piece.logits[1], TILE.pieces,
            )  # fmt: skip
        return stats, piece.logits, 1.0
    else:
        stats, student_logit, teacher_logit, share = read_statistics(
            pieces.statistics, piece.turn, piece.rows, piece.sides.temper, FACTS.WANT,
            TILE.pieces, TILE.padded,
        )  # fmt: skip
        return stats, (student_logit, teacher_logit), share


@triton.jit
def statistics_sweep(piece, FACTS: tl.constexpr, TILE: tl.constexpr):
    """Of the piece; once more for what the sums of both sides lack where they are close."""
    WANT: tl.constexpr = FACTS.WANT
    LANES: tl.constexpr = TILE.lanes
    BLOCK: tl.constexpr = LANES * TILE.vector
    sides, temper = piece.sides, piece.sides.temper
    stats = R.empty(BLOCK // P.THREAD)
    stats = W.walk(stats, piece.stretch, sides, None, FACTS, P.statistics_step, True)
    stats = R.collapse(R.rebase(stats, temper, WANT), temper, WANT)
    rise, lift = D.by_sums(stats, WANT)
    if sides.teacher is not None:
        if D.close(stats, lift, temper, WANT):
            rise, lift = D.swept(sides, stats, piece.stretch, LANES, FACTS)
    return records.replace(stats, rise=rise, lift=lift)


# --- sums ------------------------------------------------------------------------------------


@triton.jit
def value_of(piece, stats, row, WANT: tl.constexpr):
    """Where it is known, full tiles need no sums, and cheaper slopes."""
    if records.KL & WANT:
        kl = R.kl_of(stats, row, WANT)
        known = R.value_is_right(kl, stats, piece.sides.temper)
        if piece.sides.gradient is not None:
            known = known & R.slopes_are_right(stats, WANT)
        return records.Value(
            tl.where(piece.split == 0, kl, 0.0), known
        )  # of a row's pieces one has it
    else:
        return records.Value(0.0, False)


@triton.jit
def with_value(sums, value, WANT: tl.constexpr):
    if records.KL & WANT:
        sums = records.replace(sums, value=tl.where(value.known, value.kl, sums.value))
    return sums


@triton.jit
def sums_sweep(piece, row, value, FACTS: tl.constexpr, TILE: tl.constexpr):
    WANT: tl.constexpr = FACTS.WANT
    LANES: tl.constexpr = TILE.lanes
    left = piece.stretch
    if records.KL & WANT:
        last = tl.where(value.known, left.tail, left.end)
        left = records.replace(left, full=tl.where(value.known, 0, left.full), end=last)
    sums = W.walk(P.no_sums(LANES), left, piece.sides, row, FACTS, P.sum_step, False)
    return with_value(P.collapse_sums(sums, WANT), value, WANT)


@triton.jit
def refined(piece, row, FACTS: tl.constexpr, TILE: tl.constexpr):
    """The sum of the slopes about row.c, in a sweep of its own, which few rows need."""
    LANES: tl.constexpr = TILE.lanes
    zero = tl.zeros([LANES, 1], tl.float32)
    return tl.sum(W.walk(zero, piece.stretch, piece.sides, row, FACTS, P.rest_step, True))


@triton.jit
def lacks(piece, stats, row):
    """Whether c may lack digits that the gradient needs."""
    return P.lacking(row, R.saturated(stats) | R.huge(stats, piece.sides.temper))


@triton.jit
def about_anchor(
    piece, stats, row, sums, CONSTANT: tl.constexpr, FACTS: tl.constexpr, TILE: tl.constexpr
):
    """The sums that a piece hands on, and what its slopes are taken about."""
    anchor = 0.0
    if CONSTANT == "slope_sum":
        # The piece's own mean slope, if it were the whole row, in the place of c.
        about = records.replace(row, c=sums.slope + row.c)
        if lacks(piece, stats, about):
            anchor = about.c
            sums = records.replace(sums, slope=refined(piece, about, FACTS, TILE))
    return sums, anchor


@triton.jit
def sums_and_gradient(
    piece, stats, logits, share, factors, divergence, outputs, pieces, FIRST: tl.constexpr,
    LAST: tl.constexpr, FACTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The phases after the statistics, which are the whole row's now."""
    CONSTANT: tl.constexpr = divergence.constant
    AT_LABEL: tl.constexpr = divergence.at_label
    WANT: tl.constexpr = FACTS.WANT
    LANES: tl.constexpr = TILE.lanes
    # Something is wanted of the sums.
    SUMMED: tl.constexpr = (
        piece.sides.teacher is not None
        or (records.SCALE_SLOPE + records.TEACHER_ENTROPY) & WANT != 0
    )
    temper, label = piece.sides.temper, piece.label
    row = R.summarize(stats, temper, CONSTANT, WANT)
    row = L.join(row, stats, label, logits[0], logits[1], temper, FACTS.SAME, WANT, AT_LABEL)
    hard = P.cross_entropy(stats, row, label, logits[0], piece.all_columns, piece.smoothing, WANT)
    value = value_of(piece, stats, row, WANT)
    slopes, anchors = 0.0, 0.0
    if not SUMMED or FACTS.SUMS:
        sums = P.collapse_sums(P.no_sums(LANES), WANT)
    elif FIRST <= P.SUMS:
        sums = sums_sweep(piece, row, value, FACTS, TILE)
    else:
        sums, slopes, anchors = read_sums(
            pieces.sums, piece.turn, piece.rows, share, WANT, TILE.pieces, TILE.padded
        )
    if LAST == P.GRADIENT:
        handed_on = (share, slopes, anchors)
        found = records.Found(stats, row, sums, hard)
        gradient_phase(
            piece, found, value, handed_on, factors, divergence, outputs, pieces, FIRST, FACTS, TILE
        )
    elif SUMMED:
        sums, anchor = about_anchor(piece, stats, row, sums, CONSTANT, FACTS, TILE)
        write_sums(pieces.sums, piece.split, piece.turn, piece.rows, sums, anchor, TILE.pieces)


# --- the gradient ----------------------------------------------------------------------------


@triton.jit
def gradient_phase(
    piece, found, value, handed_on, factors, divergence, outputs, pieces, FIRST: tl.constexpr,
    FACTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The row's values, which its first piece writes, and its gradient.

    handed_on: each piece's share of the student's probability, slopes, and what these are about.
    """
    WANT: tl.constexpr = FACTS.WANT
    a, b = piece.sides.a, piece.sides.b
    row, total = found.row, found.sums.value
    if FACTS.SUMS:
        total = float("nan")
    else:
        row = P.with_sums(row, found.sums, divergence.constant, WANT)
    row = L.with_slopes(row, total, a, b, WANT, divergence.at_label)
    lacking = False
    if records.REST & WANT:
        lacking = lacks(piece, found.stats, row)
        rest = rest_of(
            piece, row, lacking, handed_on, pieces, FIRST, divergence.constant, FACTS, TILE
        )
        row = records.replace(row, rest=rest)
    found = records.replace(found, row=row)
    # Only now: scalars that lived through the sweeps above would be spilled.
    terms = P.factors_of(factors, piece.index, None)
    if not FACTS.SUMS:
        if piece.split == 0:
            write_row(piece, found, terms, divergence, outputs, WANT)
    sums = gradient_sweep(piece, row, value.known, terms, divergence, outputs, FACTS, TILE)
    if FACTS.SUMS:
        sums = with_value(P.collapse_sums(sums, WANT), value, WANT)
        if FIRST == P.GRADIENT:
            anchor = 0.0
            if not lacking:  # else a sweep of their own has made them, before this one
                write_sums(
                    pieces.sums, piece.split, piece.turn, piece.rows, sums, anchor, TILE.pieces
                )
        if piece.split == 0:
            if FIRST == P.GRADIENT:
                sums, _, _ = read_sums(
                    pieces.sums, piece.turn, piece.rows, handed_on[0], WANT, TILE.pieces,
                    TILE.padded,
                )  # fmt: skip
            found = records.replace(found, sums=sums)
            write_row(piece, found, terms, divergence, outputs, WANT)


@triton.jit
def rest_of(
    piece, row, lacking, handed_on, pieces, FIRST: tl.constexpr, CONSTANT: tl.constexpr,
    FACTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """What c lacks: from what the pieces have handed on, or by a sweep of the row."""
    share, slopes, anchors = handed_on
    rest = 0.0
    if FIRST == P.GRADIENT and not FACTS.SUMS:
        rest = tl.where(lacking, rest_of_pieces(slopes, share, anchors, row, CONSTANT), 0.0)
    elif lacking:
        if FIRST == P.GRADIENT:  # the sums of such a row were made before
            _, made, about = read_sums(
                pieces.sums, piece.turn, piece.rows, share, FACTS.WANT, TILE.pieces, TILE.padded
            )
            rest = rest_of_pieces(made, share, about, row, CONSTANT)
        else:
            rest = refined(piece, row, FACTS, TILE)
    return rest


@triton.jit
def gradient_sweep(
    piece, row, known, terms, divergence, outputs, FACTS: tl.constexpr, TILE: tl.constexpr
):
    """Writes the piece's gradient, and its part of the temperature's; the sums that it makes."""
    LANES: tl.constexpr = TILE.lanes
    sides, stretch = piece.sides, piece.stretch
    gathered = records.Gathered(P.no_sums(LANES), tl.zeros([LANES, 1], tl.float32))
    if sides.gradient is not None or FACTS.TEMPERATURE:
        asked = records.Asked(row, piece.label, piece.all_columns, piece.smoothing, terms)
        # Against the sweep before this one.
        FORWARD: tl.constexpr = not FACTS.SUMS
        left = stretch
        if records.KL & FACTS.WANT:
            # Where the value is known, a loop of its own makes the gradient alone.
            ALONE: tl.constexpr = records.Facts(
                ~records.REST & FACTS.WANT, divergence.slope, FACTS.SAME,
                SUMS=False, TEMPERATURE=FACTS.TEMPERATURE, CE=FACTS.CE, H=FACTS.H,
                BLANKED=FACTS.BLANKED,
            )  # fmt: skip
            alone = records.replace(stretch, full=tl.where(known, stretch.full, 0))
            W.full_tiles(gathered, alone, sides, asked, ALONE, P.gradient_step, FORWARD)
            left = records.replace(stretch, full=tl.where(known, 0, stretch.full))
        gathered = W.walk(gathered, left, sides, asked, FACTS, P.gradient_step, FORWARD)
        kd = P.kd_factor(row, terms, sides.temper)
        if FACTS.BLANKED and sides.gradient is not None:
            if kd == 0:
                tl.debug_barrier()  # after what other threads have written there
                begin = tl.maximum(stretch.begin, stretch.shift)
                M.fill_zero(sides.gradient, begin, stretch.end, LANES * TILE.vector)
        if FACTS.TEMPERATURE:
            slope = -sides.temper.s_rate * tl.sum(gathered.temperature)
            if FACTS.BLANKED:
                slope = tl.where(kd != 0, slope, 0.0)
            tl.store(outputs.temperature + piece.index * TILE.splits + piece.split, slope)
    return gathered.sums


@triton.jit
def write_row(piece, found, terms, divergence, outputs, WANT: tl.constexpr):
    P.write_row(
        outputs, found, terms, index=piece.index, rows=piece.rows, live=None,
        a=piece.sides.a, b=piece.sides.b, WANT=WANT, OUTER=divergence.outer,
    )  # fmt: skip
