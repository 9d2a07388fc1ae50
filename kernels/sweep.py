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
from fastkd.kernels.pieces import (
    read_statistics,
    read_sums,
    rest_of_pieces,
    write_statistics,
    write_sums,
)


@triton.jit
def refined(
    student, teacher, begin, head, full, tail, end, shift, headed, offsets, row, temper, a, b,
    BLOCK: tl.constexpr, SHIFTED: tl.constexpr, DIVERGENCE: tl.constexpr, SAME: tl.constexpr,
):  # fmt: skip
    """The sum of the slopes about row.c, in a sweep of its own, which few rows need."""
    rest = tl.zeros([offsets.shape[0], 1], tl.float32)
    if SHIFTED:
        if headed:
            at = begin + offsets
            inside = (at >= shift) & (at < end)
            rest = P.rest_step(rest, student, teacher, at, inside, row, temper, a, b,
                               DIVERGENCE, SAME)  # fmt: skip
    for i in range(full):
        at = head + i * BLOCK + offsets
        rest = P.rest_step(rest, student, teacher, at, None, row, temper, a, b,
                           DIVERGENCE, SAME)  # fmt: skip
    if tail < end:
        at = tail + offsets
        rest = P.rest_step(rest, student, teacher, at, at < end, row, temper, a, b,
                           DIVERGENCE, SAME)  # fmt: skip
    return tl.sum(rest)


@triton.jit(do_not_specialize=M.VARYING)
def sweep(
    student, teacher, student_outer, student_inner, teacher_outer, teacher_inner, inner,
    student_first, teacher_first, gradient_first,
    s_temperature, s_temperature_stride, t_temperature, t_temperature_stride, moments,
    labels, counted, smoothing, a, b, kd, kd_stride, ce, ce_stride, entropy, entropy_stride,
    state, values, loss, gradient, gradient_outer, gradient_inner, width, temperature,
    rows, columns, first_column, all_columns, statistics, sums_of_pieces, span,
    FIRST: tl.constexpr, LAST: tl.constexpr, WANT: tl.constexpr, DIVERGENCE: tl.constexpr,
    SLOPE: tl.constexpr, OUTER: tl.constexpr, AT_LABEL: tl.constexpr, CONSTANT: tl.constexpr,
    ALIGN: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, SPLITS: tl.constexpr,
    PIECES: tl.constexpr, PADDED: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """Phases FIRST to LAST of `span` columns of a row, in tiles of LANES * VECTOR.

    Full tiles are not masked, which keeps their loads 128 bits wide; every sweep runs against the
    one before it, so that it begins on what the cache still holds. Between launches the phases
    hand on through `statistics` and `sums_of_pieces`: every program of a row writes one piece, and
    PIECES are read, PADDED to a power of two. They may be those of several owners, who together
    have `all_columns`; these begin at `first_column`. None: there is no other owner.
    FIRST == P.GRADIENT without `statistics` takes the row from `state`.
    An operand's first entry lies `first` entries beyond its pointer. SHIFTED: 0, or rows may begin
    anywhere, alike on those of student (1), teacher (2) and gradient (4) that it is the sum of.
    Positions are then counted from the multiple of VECTOR before these rows' first column, which
    has position `shift`; what is not alike moves in smaller pieces.
    """
    SAME: tl.constexpr = t_temperature is None
    BLOCK: tl.constexpr = LANES * VECTOR
    # One sweep fewer where all that the gradient needs is known from the first.
    LATE: tl.constexpr = (
        FIRST == P.STATISTICS and CONSTANT != "slope_sum" and records.LEVER & WANT == 0
        and gradient is not None and statistics is None
    )  # fmt: skip
    SUMMED: tl.constexpr = (
        teacher is not None or (records.LEVER + records.TEACHER_ENTROPY) & WANT != 0
    )
    BACKWARD: tl.constexpr = FIRST == P.GRADIENT and statistics is None
    a, b, smoothing = P.singles(a, b, smoothing)
    index, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    student_at = M.row_at(index, student_outer, student_inner, inner, ALIGN) + student_first
    teacher_at = M.row_at(index, teacher_outer, teacher_inner, inner, ALIGN) + teacher_first
    gradient_at = M.row_at(index, gradient_outer, gradient_inner, inner, ALIGN) + gradient_first
    shift = 0
    if SHIFTED:
        shift = ((student_at if SHIFTED & 1 else teacher_at) % VECTOR).to(tl.int32)
    student_at = M.aligned(student_at - shift, VECTOR if SHIFTED & 1 else ALIGN)
    teacher_at = M.aligned(teacher_at - shift, VECTOR if SHIFTED & 2 else ALIGN)
    gradient_at = M.aligned(gradient_at - shift, VECTOR if SHIFTED & 4 else ALIGN)
    # A masked tile where the row does not begin at position 0, full tiles, and a masked tail.
    begin = split * span
    end = tl.minimum(begin + span, shift + columns)
    head, headed = begin, False
    if SHIFTED:
        headed = (shift > 0) & (split == 0)
        head += BLOCK * headed.to(tl.int32)
    full = tl.maximum(end - head, 0) // BLOCK
    tail = head + full * BLOCK
    if gradient is not None:
        gradient += gradient_at
        if LAST == P.GRADIENT and split == 0:
            M.fill_zero(gradient, shift + columns, shift + width, BLOCK)

    live = True
    if BACKWARD:
        live = P.factor(kd, kd_stride, index, None) != 0
        live = live | (P.factor(ce, ce_stride, index, None) != 0)
        live = live | (P.factor(entropy, entropy_stride, index, None) != 0)
    if counted is not None:
        live = live & (tl.load(counted + index) != 0)
    if not live:
        if gradient is not None:
            M.fill_zero(gradient, tl.maximum(begin, shift), end, BLOCK)
        return

    temper = P.temper_of(
        s_temperature, s_temperature_stride, t_temperature, t_temperature_stride,
        moments, index, rows, None, a,
    )  # fmt: skip
    student += student_at
    if teacher is not None:
        teacher += teacher_at
    offsets = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    label, label_logit, teacher_logit = -1, 0.0, 0.0
    if labels is not None:
        label = L.label_of(tl.load(labels + index), columns, first_column, all_columns)
        label += tl.where(label >= 0, shift, 0)
        label_logit = tl.load(student + label, mask=label >= 0, other=0.0).to(tl.float32)
        temper = L.leave_out(temper, label, AT_LABEL)
        if AT_LABEL is not None:
            teacher_logit = tl.load(teacher + label, mask=label >= 0, other=0.0).to(tl.float32)
    if all_columns is None:
        all_columns = columns

    if FIRST == P.STATISTICS:
        stats = R.empty(BLOCK // P.THREAD)
        if SHIFTED:
            if headed:
                at = begin + offsets
                inside = (at >= shift) & (at < end)
                stats = P.statistics_step(stats, student, teacher, at, inside, temper, WANT)
        for i in range(full):
            at = head + i * BLOCK + offsets
            stats = P.statistics_step(stats, student, teacher, at, None, temper, WANT)
        if tail < end:
            at = tail + offsets
            stats = P.statistics_step(stats, student, teacher, at, at < end, temper, WANT)
        stats = R.collapse(R.settle(stats, temper, WANT), temper, WANT)
        rise, lift = D.by_sums(stats, WANT)
        if teacher is not None:
            if D.close(stats, lift, temper, WANT):
                rise, lift = D.swept(
                    student, teacher, begin, head, full, tail, end, shift, headed, offsets, stats,
                    temper, BLOCK, SHIFTED, SAME, WANT,
                )  # fmt: skip
        stats = R.with_differences(stats, rise, lift)
        if LAST == P.STATISTICS:
            label_logit = tl.where(split == 0, label_logit, 0.0)
            teacher_logit = tl.where(split == 0, teacher_logit, 0.0)
            write_statistics(statistics, split, index, rows, stats, label_logit, teacher_logit)
    elif not BACKWARD:
        stats, label_logit, teacher_logit, share = read_statistics(
            statistics, index, rows, temper, WANT, PIECES, PADDED
        )

    if BACKWARD:
        row = P.restore(state, index, rows, None, WANT, AT_LABEL)
    else:
        row = R.summarize(stats, temper, CONSTANT, WANT)
        row = L.join(row, stats, label, label_logit, teacher_logit, temper, SAME, WANT, AT_LABEL)
        hard = P.cross_entropy(stats, row, label, label_logit, all_columns, smoothing, WANT)
    if records.KL & WANT:
        known = R.kl_of(stats, row, WANT)
        clear = R.clear(known, stats, temper)

    if not SUMMED:
        sums = P.collapse_sums(P.no_sums(LANES), WANT)
    elif FIRST <= P.SUMS and LAST >= P.SUMS and not LATE:
        EVICT: tl.constexpr = "evict_last" if gradient is not None else "evict_first"
        sums = P.no_sums(LANES)
        # Loss alone: one sweep is enough where the value is not small.
        rounds, last = full, end
        if records.KL & WANT:
            rounds, last = tl.where(clear, 0, full), tl.where(clear, tail, end)
        if tail < last:
            at = tail + offsets
            sums = P.sum_step(sums, student, teacher, at, at < end, row, temper, a, b,
                            WANT, DIVERGENCE, SAME, EVICT)  # fmt: skip
        for i in range(rounds):
            at = tail - (i + 1) * BLOCK + offsets
            sums = P.sum_step(sums, student, teacher, at, None, row, temper, a, b,
                            WANT, DIVERGENCE, SAME, EVICT)  # fmt: skip
        if SHIFTED:
            if headed:
                at = begin + offsets
                inside = (at >= shift) & (at < end)
                sums = P.sum_step(sums, student, teacher, at, inside, row, temper, a, b,
                                WANT, DIVERGENCE, SAME, EVICT)  # fmt: skip
        sums = P.collapse_sums(sums, WANT)
        if records.KL & WANT:
            sums = P.with_value(sums, tl.where(clear, known, sums.value))
        if LAST == P.SUMS:
            anchor = 0.0
            if CONSTANT == "slope_sum":
                # The piece's own mean slope, if it were the whole row, in the place of c.
                about = P.with_constant(row, sums.slope + row.c)
                if P.lacking(about, R.saturated(stats) | R.huge(stats, temper)):
                    anchor = about.c
                    slope = refined(
                        student, teacher, begin, head, full, tail, end, shift, headed, offsets,
                        about, temper, a, b, BLOCK, SHIFTED, DIVERGENCE, SAME,
                    )  # fmt: skip
                    sums = P.with_slope(sums, slope)
            write_sums(sums_of_pieces, split, index, rows, sums, anchor)
    elif FIRST > P.SUMS and not BACKWARD:
        sums, slopes, anchors = read_sums(sums_of_pieces, index, rows, share, WANT, PIECES, PADDED)

    if LAST > P.SUMS and not BACKWARD:
        if LATE:
            row = L.with_slopes(row, float("nan"), a, b, WANT, AT_LABEL)
        else:
            row = P.with_sums(row, sums, CONSTANT, WANT)
            row = L.with_slopes(row, sums.value, a, b, WANT, AT_LABEL)
        if records.REST & WANT:
            rest = 0.0
            if FIRST == P.GRADIENT:
                lacking = rest_of_pieces(slopes, share, anchors, row, CONSTANT)
                rest = tl.where(
                    P.lacking(row, R.saturated(stats) | R.huge(stats, temper)), lacking, 0.0
                )
            elif P.lacking(row, R.saturated(stats) | R.huge(stats, temper)):
                rest = refined(
                    student, teacher, begin, head, full, tail, end, shift, headed, offsets,
                    row, temper, a, b, BLOCK, SHIFTED, DIVERGENCE, SAME,
                )  # fmt: skip
            row = P.with_rest(row, rest)

    # Only now: scalars that lived through the sweeps above would be spilled.
    k_kd = P.factor(kd, kd_stride, index, None)
    k_ce = P.factor(ce, ce_stride, index, None)
    k_entropy = P.factor(entropy, entropy_stride, index, None)
    if LAST == P.GRADIENT and not BACKWARD and not LATE:
        if split == 0:
            P.write_row(
                index, rows, None, stats, row, sums, hard,
                k_kd, k_ce, k_entropy, a, b, values, state, loss, WANT, OUTER,
            )  # fmt: skip

    if LAST == P.GRADIENT and (gradient is not None or temperature is not None):
        HEAT: tl.constexpr = temperature is not None
        CE: tl.constexpr = ce is not None
        H: tl.constexpr = entropy is not None
        sums, heat = P.no_sums(LANES), tl.zeros([LANES, 1], tl.float32)
        # Against the sweep before this one.
        if LATE:
            first, step = tail - BLOCK, -BLOCK
        else:
            first, step = head, BLOCK
        if tail < end:
            at = tail + offsets
            sums, heat = P.gradient_step(
                sums, heat, student, teacher, gradient, at, at < end, row, temper, label,
                all_columns, smoothing, k_kd, k_ce, k_entropy, a, b, LATE, HEAT, WANT, CE, H,
                DIVERGENCE, SAME,
            )  # fmt: skip
        rounds = full
        if LATE and records.KL & WANT:
            # Where the value is known, a loop of its own makes the gradient alone.
            plain = clear & R.plain(stats, WANT)
            rounds = tl.where(plain, 0, full)
            for i in range(full - rounds):
                at = first + i * step + offsets
                P.gradient_step(
                    sums, heat, student, teacher, gradient, at, None, row, temper, label,
                    all_columns, smoothing, k_kd, k_ce, k_entropy, a, b, False, HEAT,
                    ~records.REST & WANT, CE, H, SLOPE, SAME,
                )  # fmt: skip
        for i in range(rounds):
            at = first + i * step + offsets
            sums, heat = P.gradient_step(
                sums, heat, student, teacher, gradient, at, None, row, temper, label,
                all_columns, smoothing, k_kd, k_ce, k_entropy, a, b, LATE, HEAT, WANT, CE, H,
                DIVERGENCE, SAME,
            )  # fmt: skip
        if SHIFTED:
            if headed:
                at = begin + offsets
                inside = (at >= shift) & (at < end)
                sums, heat = P.gradient_step(
                    sums, heat, student, teacher, gradient, at, inside, row, temper, label,
                    all_columns, smoothing, k_kd, k_ce, k_entropy, a, b, LATE, HEAT, WANT, CE, H,
                    DIVERGENCE, SAME,
                )  # fmt: skip
        if HEAT:
            tl.store(temperature + index * SPLITS + split, -temper.s_rate * tl.sum(heat))
        if LATE:
            sums = P.collapse_sums(sums, WANT)
            if records.KL & WANT:
                sums = P.with_value(sums, tl.where(plain, known, sums.value))
            P.write_row(
                index, rows, None, stats, row, sums, hard,
                k_kd, k_ce, k_entropy, a, b, values, state, loss, WANT, OUTER,
            )  # fmt: skip
