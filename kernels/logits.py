"""Loss and gradient from two rows of logits: the kernels and their launchers.

A row is worked off in three phases, each of which ends where a merge may stand: statistics
(`rows.py`), sums of value and slope, gradient. `_resident` does all three on rows that it holds in
registers, `_sweep` on one row or a piece of it, with one sweep over the columns per phase.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.divergences import LOG_MIXTURE, REVERSE_KL, Divergence
from fastkd.kernels import phases as P
from fastkd.kernels import rows as R
from fastkd.kernels.divergences import device_of
from fastkd.kernels.relay import RING, fields, relay
from fastkd.kernels.tuning import Schedule, multiprocessors, power_of_two, schedule
from fastkd.problem import Coefficients, Problem

STATISTICS = tl.constexpr(1)
SUMS = tl.constexpr(2)
GRADIENT = tl.constexpr(3)

# --- the schedules ---------------------------------------------------------------------------


@triton.jit(do_not_specialize=P.VARYING)
def _resident(
    student, teacher, student_outer, student_inner, teacher_outer, teacher_inner, inner,
    s_temperature, s_temperature_stride, t_temperature, t_temperature_stride, moments,
    labels, counted, smoothing, a, b, kd, kd_stride, ce, ce_stride, entropy, entropy_stride,
    state, values, loss, gradient, gradient_outer, gradient_inner, width, temperature,
    rows, columns,
    FIRST: tl.constexpr, WANT: tl.constexpr, DIVERGENCE: tl.constexpr, OUTER: tl.constexpr,
    CONSTANT: tl.constexpr, ALIGN: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """LANES whole rows of up to VECTOR columns: every operand is read once."""
    SAME: tl.constexpr = t_temperature is None
    a, b, smoothing = P.singles(a, b, smoothing)
    index = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)[:, None]
    column = tl.arange(0, VECTOR)[None, :]
    exists = index < rows
    live = exists
    if counted is not None:
        live &= tl.load(counted + index, mask=exists, other=0) != 0
    kd = P.factor(kd, kd_stride, index, live)
    k_ce = P.factor(ce, ce_stride, index, live)
    k_entropy = P.factor(entropy, entropy_stride, index, live)
    if FIRST == GRADIENT:
        live &= (kd != 0) | (k_ce != 0) | (k_entropy != 0)
    temper = P.temper_of(
        s_temperature, s_temperature_stride, t_temperature, t_temperature_stride,
        moments, index, rows, live, a,
    )  # fmt: skip
    columns, width = P.aligned(columns, ALIGN), P.aligned(width, ALIGN)
    inside = live & (column < columns)
    at = P.row_at(index, student_outer, student_inner, inner, ALIGN)
    z = P.load(student + at, column, inside, "")
    label, label_logit = tl.zeros([LANES, 1], tl.int32), tl.zeros([LANES, 1], tl.float32)
    if labels is not None:
        label = P.label_of(tl.load(labels + index, mask=live, other=0), columns)
        label_logit = tl.sum(tl.where(column == label, z, 0.0), 1, keep_dims=True)
    at = P.row_at(index, teacher_outer, teacher_inner, inner, ALIGN)
    y = P.load(teacher + at, column, inside, "")

    if FIRST == GRADIENT:
        row = P.restore(state, index, rows, live, WANT)
    else:
        stats = R.only(z, y, inside, temper, WANT)
        row = R.summarize(stats, temper, CONSTANT, WANT)
        hard = P.cross_entropy(stats, row, label, label_logit, columns, smoothing, WANT)
        lp, lq, p, q, d = R.elements(z, y, row, temper, SAME)
        value, slope = DIVERGENCE(lp, lq, p, q, d, row.c, a, b)
        sums = P.add_sums(P.no_sums(LANES), z, y, value, slope, row, WANT)
        sums = P.add_levers(sums, slope, q, lq, row, WANT)
        row = P.with_sums(row, sums, CONSTANT, WANT)
        P.write_row(
            index, rows, live, stats, row, sums, hard, kd, k_ce, k_entropy, a, b,
            values, state, loss, WANT, OUTER,
        )  # fmt: skip
    if gradient is not None or temperature is not None:
        g, tempered, _, _ = P.gradient_tile(
            z, y, column, row, temper, label, columns, smoothing, kd, k_ce, k_entropy, a, b,
            WANT, ce is not None, entropy is not None, DIVERGENCE, SAME,
        )  # fmt: skip
        if gradient is not None:
            at = P.row_at(index, gradient_outer, gradient_inner, inner, ALIGN)
            g = tl.where(inside, g, 0.0).to(gradient.dtype.element_ty)
            tl.store(gradient + at + column, g, mask=exists & (column < width))
        if temperature is not None:
            slope = -temper.s_rate * P.temperature_term(tempered, z, row)
            P.row_store(temperature, slope, index, live)


@triton.jit(do_not_specialize=P.VARYING)
def _sweep(
    student, teacher, student_outer, student_inner, teacher_outer, teacher_inner, inner,
    s_temperature, s_temperature_stride, t_temperature, t_temperature_stride, moments,
    labels, counted, smoothing, a, b, kd, kd_stride, ce, ce_stride, entropy, entropy_stride,
    state, values, loss, gradient, gradient_outer, gradient_inner, width, temperature,
    rows, columns, scratch, span,
    FIRST: tl.constexpr, LAST: tl.constexpr, WANT: tl.constexpr, DIVERGENCE: tl.constexpr,
    OUTER: tl.constexpr, CONSTANT: tl.constexpr, ALIGN: tl.constexpr, LANES: tl.constexpr,
    VECTOR: tl.constexpr, SPLITS: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """Phases FIRST to LAST of `span` columns of a row, in tiles of LANES * VECTOR.

    Full tiles are not masked, which keeps their loads 128 bits wide; every sweep runs against the
    one before it, so that it begins on what the cache still holds. Between launches the phases
    hand on through `scratch`; FIRST == GRADIENT without it takes the row from `state`.
    SHIFTED: rows may begin anywhere, on all sides alike; positions are then counted from the last
    multiple of VECTOR before the row's first column, which has position `shift`.
    """
    SAME: tl.constexpr = t_temperature is None
    BLOCK: tl.constexpr = LANES * VECTOR
    # One sweep fewer where all that the gradient needs is known from the first.
    LATE: tl.constexpr = (
        FIRST == STATISTICS and CONSTANT != "slope_sum" and R.LEVER & WANT == 0
        and gradient is not None and scratch is None
    )  # fmt: skip
    BACKWARD: tl.constexpr = FIRST == GRADIENT and scratch is None
    a, b, smoothing = P.singles(a, b, smoothing)
    index, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    student_at = P.row_at(index, student_outer, student_inner, inner, ALIGN)
    teacher_at = P.row_at(index, teacher_outer, teacher_inner, inner, ALIGN)
    gradient_at = P.row_at(index, gradient_outer, gradient_inner, inner, ALIGN)
    shift = 0
    if SHIFTED:
        shift = (student_at % VECTOR).to(tl.int32)
        student_at, teacher_at = P.aligned(student_at, VECTOR), P.aligned(teacher_at, VECTOR)
        gradient_at = P.aligned(gradient_at, VECTOR)
    # A masked tile where the row does not begin at position 0, full tiles, and a masked tail.
    begin = split * span
    end = tl.minimum(begin + span, shift + columns)
    head = begin
    if SHIFTED:
        headed = (shift > 0) & (split == 0)
        head += BLOCK * headed.to(tl.int32)
    full = tl.maximum(end - head, 0) // BLOCK
    tail = head + full * BLOCK
    if gradient is not None:
        gradient += gradient_at
        if LAST == GRADIENT and split == 0:
            P.fill_zero(gradient, shift + columns, shift + width, BLOCK)

    live = True
    if BACKWARD:
        live = P.factor(kd, kd_stride, index, None) != 0
        live = live | (P.factor(ce, ce_stride, index, None) != 0)
        live = live | (P.factor(entropy, entropy_stride, index, None) != 0)
    if counted is not None:
        live = live & (tl.load(counted + index) != 0)
    if not live:
        if gradient is not None:
            P.fill_zero(gradient, tl.maximum(begin, shift), end, BLOCK)
        return

    temper = P.temper_of(
        s_temperature, s_temperature_stride, t_temperature, t_temperature_stride,
        moments, index, rows, None, a,
    )  # fmt: skip
    student += student_at
    teacher += teacher_at
    offsets = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    label, label_logit = -1, 0.0
    if labels is not None:
        label = P.label_of(tl.load(labels + index), columns)
        label += tl.where(label >= 0, shift, 0)
        label_logit = tl.load(student + label, mask=label >= 0, other=0.0).to(tl.float32)
    if scratch is not None:
        scratch += index * (P.FIELDS * SPLITS)

    if FIRST == STATISTICS:
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
        stats = R.collapse(stats, temper, WANT)
        if LAST == STATISTICS:
            P.write_statistics(scratch + split, stats, label_logit, SPLITS)
    elif not BACKWARD:
        stats, label_logit = P.read_statistics(scratch, temper, WANT, SPLITS)

    if BACKWARD:
        row = P.restore(state, index, rows, None, WANT)
    else:
        row = R.summarize(stats, temper, CONSTANT, WANT)
        hard = P.cross_entropy(stats, row, label, label_logit, columns, smoothing, WANT)

    if FIRST <= SUMS and LAST >= SUMS and not LATE:
        EVICT: tl.constexpr = "evict_last" if gradient is not None else "evict_first"
        sums = P.no_sums(LANES)
        # Loss alone: one sweep is enough where the value is not small.
        rounds, last = full, end
        if R.KL & WANT:
            known = R.kl_of(stats, row, WANT)
            clear = known > R.CLEAR
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
        if R.KL & WANT:
            sums = P.with_value(sums, tl.where(clear, known, sums.value))
        if LAST == SUMS:
            P.write_sums(scratch + split, sums, WANT, SPLITS)
    elif FIRST == GRADIENT and not BACKWARD:
        sums = P.read_sums(scratch, WANT, SPLITS)

    # Only now: scalars that lived through the sweeps above would be spilled.
    k_kd = P.factor(kd, kd_stride, index, None)
    k_ce = P.factor(ce, ce_stride, index, None)
    k_entropy = P.factor(entropy, entropy_stride, index, None)
    if LAST == GRADIENT and not BACKWARD and not LATE:
        row = P.with_sums(row, sums, CONSTANT, WANT)
        if split == 0:
            P.write_row(
                index, rows, None, stats, row, sums, hard,
                k_kd, k_ce, k_entropy, a, b, values, state, loss, WANT, OUTER,
            )  # fmt: skip

    if LAST == GRADIENT and (gradient is not None or temperature is not None):
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
                sums, heat, student, teacher, gradient, at, at < end, row, temper, label, columns,
                smoothing, k_kd, k_ce, k_entropy, a, b, LATE, HEAT, WANT, CE, H, DIVERGENCE, SAME,
            )  # fmt: skip
        for i in range(full):
            at = first + i * step + offsets
            sums, heat = P.gradient_step(
                sums, heat, student, teacher, gradient, at, None, row, temper, label, columns,
                smoothing, k_kd, k_ce, k_entropy, a, b, LATE, HEAT, WANT, CE, H, DIVERGENCE, SAME,
            )  # fmt: skip
        if SHIFTED:
            if headed:
                at = begin + offsets
                inside = (at >= shift) & (at < end)
                sums, heat = P.gradient_step(
                    sums, heat, student, teacher, gradient, at, inside, row, temper, label,
                    columns, smoothing, k_kd, k_ce, k_entropy, a, b, LATE, HEAT, WANT, CE, H,
                    DIVERGENCE, SAME,
                )  # fmt: skip
        if HEAT:
            tl.store(temperature + index * SPLITS + split, -temper.s_rate * tl.sum(heat))
        if LATE:
            P.write_row(
                index, rows, None, stats, row, P.collapse_sums(sums, WANT), hard,
                k_kd, k_ce, k_entropy, a, b, values, state, loss, WANT, OUTER,
            )  # fmt: skip


@triton.jit
def _scale(gradient, upstream, outer_stride, inner_stride, inner, pieces, width, tiles,
           BLOCK: tl.constexpr):  # fmt: skip
    by = tl.load(upstream).to(tl.float32)
    if by == 1.0:
        return
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        index = (tile // pieces).to(tl.int64)
        at = (tile % pieces) * BLOCK + tl.arange(0, BLOCK)
        row = gradient + (index // inner) * outer_stride + (index % inner) * inner_stride
        x = tl.load(row + at, mask=at < width).to(tl.float32) * by
        tl.store(row + at, x.to(gradient.dtype.element_ty), mask=at < width)


# --- launchers -------------------------------------------------------------------------------


def forward(problem: Problem, entropy: bool, metrics: bool) -> tuple[Tensor, Tensor]:
    """(values, state) of `problem.py`."""
    long = problem.labels is not None or entropy or metrics
    values = _per_row(problem, 5 if metrics else 3 if long else 1)
    state = _per_row(problem, 9 if problem.moments is not None else 7 if long else 5)
    _run(problem, STATISTICS, entropy, metrics, state=state, values=values)
    return values, state


def backward(
    problem: Problem, state: Tensor, upstream: Coefficients, gradient: bool, temperature: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The student's gradient [N, width] and the temperatures' [N], as far as they are wanted."""
    grad = _gradient(problem) if gradient else None
    heat = _run(
        problem, GRADIENT, upstream.entropy is not None, False, upstream, state=state,
        gradient=grad, heat=temperature,
    )  # fmt: skip
    return grad, heat


def fused(
    problem: Problem, coefficients: Coefficients, metrics: bool, out: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(loss rows [N], values or None, gradient of their sum); out may be the student's logits."""
    gradient = _gradient(problem) if out is None else out
    loss = _per_row(problem, 1)[0]
    values = _per_row(problem, 5) if metrics else None
    _run(
        problem, STATISTICS, coefficients.entropy is not None, metrics, coefficients,
        values=values, loss=loss, gradient=gradient,
    )  # fmt: skip
    return loss, values, gradient


def scale_(gradient: Tensor, upstream: Tensor) -> None:
    """Multiplies the rows of gradient by a 0-d tensor, in place; no traffic where that is 1."""
    outer, inner, size = strides_of(gradient)
    width, pieces = gradient.size(-1), triton.cdiv(gradient.size(-1), 2048)
    tiles = gradient.numel() // max(width, 1) * pieces
    if tiles:
        cuda = gradient.device.type == "cuda"
        programs = 8 * multiprocessors(gradient.device) if cuda else 2
        with torch.cuda.device_of(gradient):
            _scale[(min(tiles, programs),)](
                gradient, upstream, outer, inner, size, pieces, width, tiles, 2048
            )


def _per_row(problem: Problem, count: int) -> Tensor:
    """fp32 [count, N]; rows that do not count are not written, hence begin as 0."""
    new = torch.empty if problem.counted is None else torch.zeros
    return new((count, problem.rows), dtype=torch.float32, device=problem.student.device)


def _gradient(problem: Problem) -> Tensor:
    student = problem.student
    shape = (problem.rows, student.size(-1))
    return torch.empty(shape, dtype=student.dtype, device=student.device)


def strides_of(x: Tensor) -> tuple[int, int, int]:
    """(outer stride, inner stride, inner size) of the rows of [O, I, V] or [N, V]."""
    if x.dim() == 2:
        return 0, x.stride(0), max(x.size(0), 1)
    outer = 0 if x.size(0) == 1 else x.stride(0)
    return outer, x.stride(1), max(x.size(1), 1)


def _run(
    problem: Problem, first: tl.constexpr, entropy: bool, metrics: bool,
    factors: Coefficients | None = None, state: Tensor | None = None,
    values: Tensor | None = None, loss: Tensor | None = None, gradient: Tensor | None = None,
    heat: bool = False,
) -> Tensor | None:  # fmt: skip
    """Launches the phases from `first` on; the temperatures' gradient where heat is wanted."""
    student, teacher, rows = problem.student, problem.teacher, problem.rows
    width, device = student.size(-1), student.device
    kind, (evaluate, outer) = Divergence.of_name(problem.divergence), device_of(problem.divergence)
    itemsize = min(student.element_size(), teacher.element_size())
    plan = schedule(rows, width, itemsize, device, once=first.value == GRADIENT.value)
    # Zero for the rows that the kernel skips.
    temperature = (
        torch.zeros(rows, plan.splits, dtype=torch.float32, device=device) if heat else None
    )
    if rows == 0:
        return None if temperature is None else temperature.sum(1)
    student_outer, student_inner, inner = strides_of(student)
    teacher_outer, teacher_inner, _ = strides_of(teacher)
    gradient_outer = gradient_inner = 0
    if gradient is not None:
        gradient_outer, gradient_inner, _ = strides_of(gradient)
        if gradient.dim() == 2 and student.size(0) > 1:
            gradient_outer = inner * gradient_inner
    align = math.gcd(16, student_outer, student_inner, teacher_outer, teacher_inner)
    align = math.gcd(align, gradient_outer, gradient_inner)
    if plan.kind != "sweep":
        align = math.gcd(align, width, problem.vocab_size)
    kd, ce, h = factors or (None, None, None)
    want = R.GAP.value * (kind.constant == REVERSE_KL)
    want |= R.MIXTURE.value * (kind.constant == LOG_MIXTURE)
    want |= R.UNIT.value * (problem.labels is not None)
    want |= R.MEAN.value * (problem.labels is not None and problem.label_smoothing != 0)
    want |= R.ENTROPY.value * (entropy or metrics)
    want |= R.TEACHER_ENTROPY.value * metrics
    want |= R.LEVER.value * (problem.moments is not None)
    alone = first.value == STATISTICS.value and gradient is None and not metrics
    swept = plan.kind == "sweep" and plan.splits == 1 and problem.moments is None
    want |= R.KL.value * (alone and swept and problem.divergence in ("forward_kl", "reverse_kl"))
    arguments = dict(  # noqa: C408
        student=student, teacher=teacher, student_outer=student_outer, student_inner=student_inner,
        teacher_outer=teacher_outer, teacher_inner=teacher_inner, inner=inner,
        s_temperature=problem.student_temperature,
        s_temperature_stride=problem.student_temperature.stride(0),
        t_temperature=problem.teacher_temperature,
        t_temperature_stride=_stride(problem.teacher_temperature), moments=problem.moments,
        labels=problem.labels, counted=problem.counted, smoothing=float(problem.label_smoothing),
        a=float(problem.a), b=float(problem.b), kd=kd, kd_stride=_stride(kd), ce=ce,
        ce_stride=_stride(ce), entropy=h, entropy_stride=_stride(h), state=state, values=values,
        loss=loss, gradient=gradient, gradient_outer=gradient_outer, gradient_inner=gradient_inner,
        width=width, rows=rows, columns=problem.vocab_size,
        WANT=want, DIVERGENCE=evaluate, OUTER=outer, CONSTANT=kind.constant, ALIGN=align,
        LANES=plan.lanes, VECTOR=plan.vector, num_warps=plan.warps, enable_fp_fusion=True,
    )  # fmt: skip
    with torch.cuda.device_of(student):
        if plan.kind == "resident":
            _resident[(triton.cdiv(rows, plan.lanes),)](
                FIRST=first, temperature=temperature, num_ctas=plan.blocks, **arguments
            )
        elif plan.kind == "relay":
            _run_relay(plan, arguments)
        else:
            scratch, phases = None, [(first, GRADIENT)]
            block = plan.lanes * plan.vector
            # Rows that begin anywhere, but on all sides alike.
            sides = [(student_outer, student_inner), (teacher_outer, teacher_inner)]
            sides += [] if gradient is None else [(gradient_outer, gradient_inner)]
            begins = {(outer % plan.vector, inner % plan.vector) for outer, inner in sides}
            shifted = align % plan.vector != 0 and len(begins) == 1
            reach = problem.vocab_size + (plan.vector - 1) * shifted
            span = triton.cdiv(triton.cdiv(reach, plan.splits), block) * block
            if plan.splits > 1 and first.value == STATISTICS.value:
                shape = (rows, P.FIELDS.value, plan.splits)
                scratch = torch.empty(shape, dtype=torch.float32, device=device)
                phases = [(phase, phase) for phase in (STATISTICS, SUMS, GRADIENT)]
            for begin, end in phases:
                _sweep[(rows, plan.splits)](
                    FIRST=begin, LAST=end, SPLITS=plan.splits, SHIFTED=shifted, scratch=scratch,
                    span=span, temperature=temperature, **arguments,
                )  # fmt: skip
    return None if temperature is None else temperature.sum(1)


def _run_relay(plan: Schedule, arguments: dict[str, Any]) -> None:
    """All programs at once: a group of them to a row, as many groups as there is room for."""
    splits = triton.cdiv(arguments["columns"], plan.lanes * plan.vector)
    size, groups = power_of_two(splits), min(arguments["rows"], plan.programs // splits)
    shape = (groups, RING.value, P.FIELDS.value, size)
    mailbox = torch.zeros(shape, dtype=torch.int64, device=arguments["student"].device)
    relay[(groups * splits,)](
        mailbox=mailbox, SPLITS=splits, SIZE=size, launch_cooperative_grid=True, maxnreg=255,
        SENT=fields(arguments["WANT"], arguments["labels"] is not None, arguments["CONSTANT"]),
        **arguments,
    )  # fmt: skip


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)
