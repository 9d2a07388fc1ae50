"""Loss and gradient of rows that fit the registers of a program: every operand is read once."""

from __future__ import annotations

import triton
import triton.language as tl

from fastkd.kernels import phases as P
from fastkd.kernels import rows as R


@triton.jit(do_not_specialize=P.VARYING)
def resident(
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
    if FIRST == P.GRADIENT:
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

    if FIRST == P.GRADIENT:
        row = P.restore(state, index, rows, live, WANT)
    else:
        stats = R.only(z, y, inside, temper, WANT)
        row = R.summarize(stats, temper, CONSTANT, WANT)
        hard = P.cross_entropy(stats, row, label, label_logit, columns, smoothing, WANT)
        lp, lq, p, q, d, d2 = R.elements(z, y, row, temper, SAME)
        value, slope = DIVERGENCE(lp, lq, p, q, d, d2, row.c, a, b)
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
