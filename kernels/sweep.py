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
def refined(sides, row, stretch, LANES: tl.constexpr, FACTS: tl.constexpr):
    """The sum of the slopes about row.c, in a sweep of its own, which few rows need."""
    zero = tl.zeros([LANES, 1], tl.float32)
    rest = W.walk(zero, stretch, sides, row, FACTS, P.rest_step, True)
    return tl.sum(rest)


@triton.jit
def start(index, student, teacher, gradient, extent, TILE: tl.constexpr):
    """Where the sides' position 0 lies, and the row's first column."""
    ALIGN: tl.constexpr = TILE.align
    VECTOR: tl.constexpr = TILE.vector
    SHIFTED: tl.constexpr = TILE.shifted
    student_at = M.row_at(index, student, extent.inner, ALIGN)
    teacher_at = M.row_at(index, teacher, extent.inner, ALIGN)
    gradient_at = M.row_at(index, gradient, extent.inner, ALIGN)
    shift = 0
    if SHIFTED:
        shift = ((student_at if SHIFTED & 1 else teacher_at) % VECTOR).to(tl.int32)
    student_at = M.aligned(student_at - shift, VECTOR if SHIFTED & 1 else ALIGN)
    teacher_at = M.aligned(teacher_at - shift, VECTOR if SHIFTED & 2 else ALIGN)
    gradient_at = M.aligned(gradient_at - shift, VECTOR if SHIFTED & 4 else ALIGN)
    return student_at, teacher_at, gradient_at, shift


@triton.jit
def blank(index, split, student, teacher, gradient, extent, TILE: tl.constexpr):
    """A gradient of 0 of a piece of a row that does not count, and what is beyond the row."""
    if gradient.pointer is not None:
        _, _, at, shift = start(index, student, teacher, gradient, extent, TILE)
        stretch = W.stretch_of(
            split, extent.span, shift, extent.columns, TILE.lanes, TILE.vector, TILE.shifted
        )
        BLOCK: tl.constexpr = TILE.lanes * TILE.vector
        pointer = gradient.pointer + at
        M.fill_zero(pointer, tl.maximum(stretch.begin, shift), stretch.end, BLOCK)
        if split == 0:
            M.fill_beyond(pointer, shift, extent, BLOCK)


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
            blank(index, split, student, teacher, gradient, extent, TILE)
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
    CONSTANT: tl.constexpr = divergence.constant
    SAME: tl.constexpr = temperatures.teacher is None
    LANES: tl.constexpr = TILE.lanes
    VECTOR: tl.constexpr = TILE.vector
    SHIFTED: tl.constexpr = TILE.shifted
    BLOCK: tl.constexpr = LANES * VECTOR
    # The gradient's sweep makes the sums, as it needs none of them.
    LATE: tl.constexpr = records.LATE & WANT != 0 and LAST == P.GRADIENT
    # Something is wanted of the sums.
    SUMMED: tl.constexpr = (
        teacher.pointer is not None or (records.SCALE_SLOPE + records.TEACHER_ENTROPY) & WANT != 0
    )
    # The gradient alone, of a row whose sums are in `outputs.state`.
    BACKWARD: tl.constexpr = FIRST == P.GRADIENT and pieces.statistics is None
    a, b, smoothing = P.singles(divergence.a, divergence.b, targets.smoothing)
    rows, columns = number(extent.rows), extent.columns
    turn = index
    if pieces.turn is not None:
        turn = pieces.turn
    student_at, teacher_at, gradient_at, shift = start(
        index, student, teacher, gradient, extent, TILE
    )
    stretch = W.stretch_of(split, extent.span, shift, columns, LANES, VECTOR, SHIFTED)
    student, teacher, gradient = student.pointer, teacher.pointer, gradient.pointer
    student += student_at
    if teacher is not None:
        teacher += teacher_at
    if gradient is not None:
        gradient += gradient_at
        if LAST == P.GRADIENT and split == 0:
            M.fill_beyond(gradient, shift, extent, BLOCK)

    temper = P.temper_of(temperatures, index, rows, None, a)
    label, label_logit, teacher_logit = -1, 0.0, 0.0
    if targets.labels is not None:
        label = L.label_of(tl.load(targets.labels + index), columns, extent.owner)
        label += tl.where(label >= 0, shift, 0)
        # Of the piece that has it: in another, a gradient may take its place meanwhile.
        mine = (label >= stretch.begin) & (label < stretch.end)
        label_logit = tl.load(student + label, mask=mine, other=0.0).to(tl.float32)
        temper = L.leave_out(temper, label, AT_LABEL)
        if AT_LABEL is not None:
            teacher_logit = tl.load(teacher + label, mask=mine, other=0.0).to(tl.float32)
    all_columns = columns if extent.owner is None else number(extent.owner.all_columns)

    sides = records.Sides(student, teacher, gradient, temper, a, b)
    FACTS: tl.constexpr = records.Facts(WANT, divergence.evaluate, SAME)

    if FIRST == P.STATISTICS:
        stats = R.empty(BLOCK // P.THREAD)
        stats = W.walk(stats, stretch, sides, None, FACTS, P.statistics_step, True)
        stats = R.collapse(R.rebase(stats, temper, WANT), temper, WANT)
        rise, lift = D.by_sums(stats, WANT)
        if teacher is not None:
            if D.close(stats, lift, temper, WANT):
                rise, lift = D.swept(sides, stats, stretch, LANES, FACTS)
        stats = records.replace(stats, rise=rise, lift=lift)
        if LAST == P.STATISTICS:
            write_statistics(
                pieces.statistics, split, turn, rows, stats, label_logit, teacher_logit, TILE.pieces
            )
    elif not BACKWARD:
        stats, label_logit, teacher_logit, share = read_statistics(
            pieces.statistics, turn, rows, temper, WANT, TILE.pieces, TILE.padded
        )

    if BACKWARD:
        row = P.restore(outputs.state, index, rows, None, WANT, AT_LABEL)
    else:
        row = R.summarize(stats, temper, CONSTANT, WANT)
        row = L.join(row, stats, label, label_logit, teacher_logit, temper, SAME, WANT, AT_LABEL)
        hard = P.cross_entropy(stats, row, label, label_logit, all_columns, smoothing, WANT)
    if records.KL & WANT:
        # Where the first sweep gives the value, full tiles need no sums, and cheaper slopes.
        kl = R.kl_of(stats, row, WANT)
        known = R.value_is_right(kl, stats, temper)
        if gradient is not None:
            known = known & R.slopes_are_right(stats, WANT)
        kl = tl.where(split == 0, kl, 0.0)  # of a row's pieces one has it

    if not SUMMED:
        sums = P.collapse_sums(P.no_sums(LANES), WANT)
    elif FIRST <= P.SUMS and LAST >= P.SUMS and not LATE:
        left = stretch
        if records.KL & WANT:
            last = tl.where(known, stretch.tail, stretch.end)
            left = records.replace(stretch, full=tl.where(known, 0, stretch.full), end=last)
        sums = W.walk(P.no_sums(LANES), left, sides, row, FACTS, P.sum_step, False)
        sums = P.collapse_sums(sums, WANT)
        if records.KL & WANT:
            sums = records.replace(sums, value=tl.where(known, kl, sums.value))
        if LAST == P.SUMS:
            anchor = 0.0
            if CONSTANT == "slope_sum":
                # The piece's own mean slope, if it were the whole row, in the place of c.
                about = records.replace(row, c=sums.slope + row.c)
                if P.lacking(about, R.saturated(stats) | R.huge(stats, temper)):
                    anchor = about.c
                    slope = refined(sides, about, stretch, LANES, FACTS)
                    sums = records.replace(sums, slope=slope)
            write_sums(pieces.sums, split, turn, rows, sums, anchor, TILE.pieces)
    elif FIRST > P.SUMS and not BACKWARD and not LATE:
        sums, slopes, anchors = read_sums(
            pieces.sums, turn, rows, share, WANT, TILE.pieces, TILE.padded
        )

    if LAST > P.SUMS and not BACKWARD:
        if LATE:
            row = L.with_slopes(row, float("nan"), a, b, WANT, AT_LABEL)
        else:
            row = P.with_sums(row, sums, CONSTANT, WANT)
            row = L.with_slopes(row, sums.value, a, b, WANT, AT_LABEL)
        if records.REST & WANT:
            rest = 0.0
            lacking = P.lacking(row, R.saturated(stats) | R.huge(stats, temper))
            if FIRST == P.GRADIENT and not LATE:
                rest = tl.where(lacking, rest_of_pieces(slopes, share, anchors, row, CONSTANT), 0.0)
            elif lacking:
                if FIRST == P.GRADIENT:  # the sums of such a row were made before
                    _, slopes, anchors = read_sums(
                        pieces.sums, turn, rows, share, WANT, TILE.pieces, TILE.padded
                    )
                    rest = rest_of_pieces(slopes, share, anchors, row, CONSTANT)
                else:
                    rest = refined(sides, row, stretch, LANES, FACTS)
            row = records.replace(row, rest=rest)

    # Only now: scalars that lived through the sweeps above would be spilled.
    terms = P.factors_of(factors, index, None)
    if LAST == P.GRADIENT and not BACKWARD and not LATE:
        if split == 0:
            P.write_row(
                outputs, records.Found(stats, row, sums, hard), terms,
                index=index, rows=rows, live=None, a=a, b=b, WANT=WANT, OUTER=divergence.outer,
            )  # fmt: skip

    if LAST == P.GRADIENT and (gradient is not None or outputs.temperature is not None):
        TEMPERATURE: tl.constexpr = outputs.temperature is not None
        CE: tl.constexpr = factors.ce is not None
        H: tl.constexpr = factors.entropy is not None
        gathered = records.Gathered(P.no_sums(LANES), tl.zeros([LANES, 1], tl.float32))
        asked = records.Asked(row, label, all_columns, smoothing, terms)
        left = stretch
        if records.KL & WANT:
            # Where the value is known, a loop of its own makes the gradient alone.
            ALONE: tl.constexpr = records.Facts(
                ~records.REST & WANT, divergence.slope, SAME,
                SUMS=False, TEMPERATURE=TEMPERATURE, CE=CE, H=H,
            )  # fmt: skip
            W.full_tiles(
                gathered, records.replace(stretch, full=tl.where(known, stretch.full, 0)),
                sides, asked, ALONE, P.gradient_step, not LATE,
            )  # fmt: skip
            left = records.replace(stretch, full=tl.where(known, 0, stretch.full))
        WHOLE: tl.constexpr = records.Facts(
            WANT, divergence.evaluate, SAME, SUMS=LATE, TEMPERATURE=TEMPERATURE, CE=CE, H=H
        )
        # Against the sweep before this one.
        gathered = W.walk(gathered, left, sides, asked, WHOLE, P.gradient_step, not LATE)
        if TEMPERATURE:
            at = index * TILE.splits + split
            tl.store(outputs.temperature + at, -temper.s_rate * tl.sum(gathered.temperature))
        if LATE:
            sums = P.collapse_sums(gathered.sums, WANT)
            if records.KL & WANT:
                sums = records.replace(sums, value=tl.where(known, kl, sums.value))
            if FIRST == P.GRADIENT:
                made, anchor = False, 0.0  # made by a sweep of their own, before this one
                if records.REST & WANT:
                    made = lacking
                if not made:
                    write_sums(pieces.sums, split, turn, rows, sums, anchor, TILE.pieces)
            if split == 0:
                if FIRST == P.GRADIENT:
                    sums, _, _ = read_sums(
                        pieces.sums, turn, rows, share, WANT, TILE.pieces, TILE.padded
                    )
                P.write_row(
                    outputs, records.Found(stats, row, sums, hard), terms,
                    index=index, rows=rows, live=None, a=a, b=b, WANT=WANT, OUTER=divergence.outer,
                )  # fmt: skip
