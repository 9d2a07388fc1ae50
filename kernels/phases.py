"""What the schedules do to a tile or a row, whichever it is."""

from __future__ import annotations

import triton
import triton.language as tl

from fastkd.kernels import arithmetic as A
from fastkd.kernels import labels as L
from fastkd.kernels import memory as M
from fastkd.kernels import records
from fastkd.kernels import rows as R
from fastkd.kernels.arguments import Factors, number

THREAD = tl.constexpr(16)  # entries of a tile per thread, as tuning.py has them
# The phases of a row, in their order.
STATISTICS, SUMS, GRADIENT = map(tl.constexpr, (1, 2, 3))

# --- numbers of a row ------------------------------------------------------------------------


@triton.jit
def singles(a, b, c):
    """In fp32: some compilers pass a Python float in fp64."""
    return tl.cast(a, tl.float32), tl.cast(b, tl.float32), tl.cast(c, tl.float32)


@triton.jit
def per_row(given, index, live, other):
    """A number of each row; `other` for all where none is given."""
    if given is None:
        return (index * 0).to(tl.float32) + other
    else:
        return M.row_load(given.pointer, index * number(given.stride), live, other)


@triton.jit
def factors_of(factors, index, live):
    """The coefficients of a row's terms; 0 where a term is absent."""
    return Factors(
        kd=per_row(factors.kd, index, live, 0.0),
        ce=per_row(factors.ce, index, live, 0.0),
        entropy=per_row(factors.entropy, index, live, 0.0),
    )


@triton.jit
def any_of(factors):
    return (factors.kd != 0) | (factors.ce != 0) | (factors.entropy != 0)


@triton.jit
def inverse(width):
    """1 / width, whose reciprocal may lie below what the hardware's gives."""
    return A.reciprocal(width * 2.0**-40) * 2.0**-40


@triton.jit
def temper_of(temperatures, index, rows, live, a):
    moments = temperatures.moments
    s_rate = A.reciprocal(per_row(temperatures.student, index, live, 1.0))
    t_rate = s_rate
    if temperatures.teacher is not None:
        t_rate = A.reciprocal(per_row(temperatures.teacher, index, live, 1.0))
    mean, width_slope, s_width = 0.0, 0.0, 1.0
    if moments is not None:
        mean = M.row_load(moments, index, live, 0.0)
        s_width = inverse(M.row_load(moments + rows, index, live, 1.0))
        t_width = inverse(M.row_load(moments + 4 * rows, index, live, 1.0))
        width_slope = M.row_load(moments + 2 * rows, index, live, 0.0)
        s_rate = s_rate * s_width
        t_rate = s_rate if temperatures.teacher is None else t_rate * t_width
    return records.Temper(
        s_rate, t_rate, s_rate * A.LOG2E, t_rate * A.LOG2E, a, mean, width_slope, s_width, ()
    )


@triton.jit
def restore(state, index, rows, live, WANT: tl.constexpr, AT_LABEL: tl.constexpr):
    """records.Row from what `write_row` saved."""
    state += index
    mean_log2_exp, unit = 0.0, 1.0
    if (records.UNIT + records.ENTROPY) & WANT:
        mean_log2_exp = M.row_load(state, 6 * rows, live, 0.0)
        unit = M.row_load(state, 7 * rows, live, 1.0)
    s_max, t_max = M.row_load(state, 0, live, 0.0), M.row_load(state, 2 * rows, live, 0.0)
    s_sum, gap = M.row_load(state, rows, live, 1.0), M.row_load(state, 3 * rows, live, 0.0)
    c = M.row_load(state, 4 * rows, live, 0.0)
    alive = gap != -float("inf")
    gap = tl.where(alive, gap, 0.0)
    s_log = A.log2(R.positive(s_sum))
    t_log = s_log + gap * A.LOG2E
    row = R.row_of(s_max, t_max, s_log, t_log, gap, alive, c, mean_log2_exp, unit)
    if records.REST & WANT:
        row = records.replace(row, rest=M.row_load(state, 5 * rows, live, 0.0))
    if records.STANDARDIZED & WANT:
        row = records.replace(
            row, scale_slope=M.row_load(state, 8 * rows, live, 0.0),
            entropy_slope=M.row_load(state, 9 * rows, live, 0.0),
        )  # fmt: skip
    return L.restore_label(state, rows, row, unit, live, AT_LABEL)


@triton.jit
def cross_entropy(stats, row, label, label_logit, columns, smoothing, WANT: tl.constexpr):
    """At T = 1; NaN where the label is out of range, 0 where no row has labels.

    columns: of all owners.
    """
    value = tl.zeros_like(row.s_max)
    if records.UNIT & WANT:
        value = row.unit_log * A.LN2
        value += tl.where(smoothing < 1, (1.0 - smoothing) * (row.unit_max - label_logit), 0.0)
        if records.MEAN & WANT:
            value -= smoothing * (L.sum_of_logits(stats, row) / (R.SHARE * columns))
        value = tl.where(label != L.NOWHERE, value, float("nan"))
    return tl.where(row.alive, value, 0.0)


@triton.jit
def write_row(
    outputs, found, factors, index, rows, live, a, b, WANT: tl.constexpr, OUTER: tl.constexpr
):
    """The row's values, its state for the backward pass, and its loss, where wanted.

    A factor of exactly 0 removes its term, be it infinite.
    """
    values, state, loss = outputs.value, outputs.state, outputs.loss
    stats, row, sums, hard = found
    kd_value = tl.where(row.alive, L.divergence(row, sums.value, a, b, OUTER), 0.0)
    student_entropy = L.student_entropy(row)
    if values is not None:
        M.row_store(values, kd_value, index, live)
        if (records.UNIT + records.ENTROPY) & WANT:
            M.row_store(values + rows, hard, index, live)
            M.row_store(values + 2 * rows, student_entropy, index, live)
        if records.TEACHER_ENTROPY & WANT:
            M.row_store(values + 3 * rows, row.t_entropy, index, live)
            agreement = tl.where(row.alive, L.agreement(row, sums.agreement), 0.0)
            M.row_store(values + 4 * rows, agreement, index, live)
    if state is not None:
        M.row_store(state, row.s_max, index, live)
        M.row_store(state + rows, stats.s_sum, index, live)
        M.row_store(state + 2 * rows, row.t_max, index, live)
        gap = tl.where(row.alive, row.gap, -float("inf"))
        M.row_store(state + 3 * rows, gap, index, live)
        M.row_store(state + 4 * rows, row.c, index, live)
        if records.REST & WANT:
            M.row_store(state + 5 * rows, row.rest, index, live)
        if (records.UNIT + records.ENTROPY) & WANT:
            M.row_store(state + 6 * rows, row.mean_log2_exp, index, live)
            M.row_store(state + 7 * rows, stats.unit, index, live)
        if records.SCALE_SLOPE & WANT:
            M.row_store(state + 8 * rows, row.scale_slope, index, live)
            M.row_store(state + 9 * rows, row.entropy_slope, index, live)
        L.write_label(state, index, rows, live, row)
    if loss is not None:
        total = tl.where(factors.kd != 0, factors.kd * kd_value, 0.0)
        total += tl.where(factors.ce != 0, factors.ce * hard, 0.0)
        total += tl.where(factors.entropy != 0, factors.entropy * student_entropy, 0.0)
        M.row_store(loss, total, index, live)


@triton.jit
def nothing(lp, lq, p, q, d, d2, c, a, b):
    """In place of a divergence where there is no teacher."""
    zero = tl.zeros_like(q)
    return zero, zero


# --- sums -------------------------------------------------------------------------------------


@triton.jit
def add_sums(sums, z, y, value, slope, row, WANT: tl.constexpr):
    agreement = sums.agreement
    if records.TEACHER_ENTROPY & WANT:
        best = tl.max(tl.where(z == row.s_max, y, -float("inf")), 1, keep_dims=True)
        agreement = tl.maximum(agreement, tl.where(best == row.t_max, 1.0, 0.0))
    return records.Sums(
        value=sums.value + tl.sum(value, 1, keep_dims=True),
        slope=sums.slope + tl.sum(slope, 1, keep_dims=True),
        agreement=agreement, scale_slope=sums.scale_slope, entropy_slope=sums.entropy_slope,
    )  # fmt: skip


@triton.jit
def add_scale_slopes(sums, z, slope, q, lq, row, temper, WANT: tl.constexpr):
    """Where the logits are standardised: the slopes' sums times log q + H, whose mean is 0."""
    scale_slope, entropy_slope = sums.scale_slope, sums.entropy_slope
    if records.SCALE_SLOPE & WANT:
        log2_exp = tl.where(lq > -float("inf"), R.centred_log2_exp(z, row, temper), 0.0)
        scale_slope += A.LN2 * tl.sum(slope * log2_exp, 1, keep_dims=True)
        entropy_slope -= (A.LN2 * A.LN2) * tl.sum(q * log2_exp * log2_exp, 1, keep_dims=True)
    return records.replace(sums, scale_slope=scale_slope, entropy_slope=entropy_slope)


@triton.jit
def sum_tile(sums, z, y, at, row, sides, FACTS: tl.constexpr):
    z, y = L.others(z, y, at, sides.temper)
    lp, lq, p, q, d, d2 = R.elements(z, y, row, sides.temper, FACTS.SAME)
    value, slope = FACTS.DIVERGENCE(lp, lq, p, q, d, d2, row.c, sides.a, sides.b)
    sums = add_sums(sums, z, y, value, slope, row, FACTS.WANT)
    return add_scale_slopes(sums, z, slope, q, lq, row, sides.temper, FACTS.WANT)


@triton.jit
def no_sums(LANES: tl.constexpr):
    zero = tl.zeros([LANES, 1], tl.float32)
    return records.Sums(zero, zero, zero, zero, zero)


@triton.jit
def collapse_sums(sums, WANT: tl.constexpr):
    scale_slope, entropy_slope = 0.0, 0.0
    if records.SCALE_SLOPE & WANT:
        scale_slope, entropy_slope = tl.sum(sums.scale_slope), tl.sum(sums.entropy_slope)
    return records.Sums(
        tl.sum(sums.value), tl.sum(sums.slope), tl.max(sums.agreement), scale_slope, entropy_slope
    )


@triton.jit
def with_sums(row, sums, CONSTANT: tl.constexpr, WANT: tl.constexpr):
    """The row with what the sweep of sums gives."""
    if CONSTANT == "slope_sum":
        row = records.replace(row, c=sums.slope + row.c)
    if records.SCALE_SLOPE & WANT:
        row = records.replace(row, scale_slope=sums.scale_slope, entropy_slope=sums.entropy_slope)
    return row


@triton.jit
def lacking(row, suspect):
    """Whether c may lack digits that the gradient needs, and is finite, of rows under suspicion."""
    return suspect & row.alive & A.finite(row.c)


@triton.jit
def rest_of(z, y, at, row, sides, FACTS: tl.constexpr):
    """What a tile adds to that which c lacks: the mean of the slopes less c."""
    z, y = L.others(z, y, at, sides.temper)
    lp, lq, p, q, d, d2 = R.elements(z, y, row, sides.temper, FACTS.SAME)
    _, slope = FACTS.DIVERGENCE(lp, lq, p, q, d, d2, row.c, sides.a, sides.b)
    return tl.sum(slope, 1, keep_dims=True)


# --- the gradient -----------------------------------------------------------------------------


@triton.jit
def kd_factor(row, factors, temper):
    """Of the slopes: 0 where the row does not count, or its constant is infinite."""
    defined = row.alive & (tl.abs(row.c) != float("inf"))
    return tl.where(defined, factors.kd * temper.s_rate, 0.0)


@triton.jit
def divergence_tile(pair, column, sides, asked, FACTS: tl.constexpr):
    """The divergence's terms and slopes, and q.

    pair: both sides as the divergence takes them, be it with or without the label.
    """
    row, temper = asked.row, sides.temper
    lp, lq, p, q, d, d2 = R.elements(pair[0], pair[1], row, temper, FACTS.SAME)
    defined = row.alive & (tl.abs(row.c) != float("inf"))
    c = tl.where(defined, row.c, 0.0)
    value, slope = FACTS.DIVERGENCE(lp, lq, p, q, d, d2, c, sides.a, sides.b)
    if records.REST & FACTS.WANT:
        slope -= q * row.rest
    value, slope = L.of_all(value, slope, q, column, row, temper)
    return value, slope, q


@triton.jit
def gradient_tile(z, slope, q, column, sides, asked, FACTS: tl.constexpr):
    """The gradient, and its part that goes through the temperature, from the slopes."""
    row, temper = asked.row, sides.temper
    defined = row.alive & (tl.abs(row.c) != float("inf"))
    scale_slope = tl.where(
        defined & (asked.factors.kd != 0), asked.factors.kd * row.scale_slope, 0.0
    )
    kd = kd_factor(row, asked.factors, temper)
    gradient = kd * (slope if FACTS.BLANKED else tl.where(kd != 0, slope, 0.0))
    if FACTS.H:
        entropy = tl.where(row.alive, asked.factors.entropy, 0.0)
        scale_slope += entropy * row.entropy_slope
        # Finite, so that it counts 0 where q is.
        log2_exp = R.centred_log2_exp(z, row, temper)
        q, log2_exp = L.entropy_terms(q, log2_exp, column, row, temper)
        log2_exp = tl.maximum(log2_exp, R.FLOOR)
        gradient -= (entropy * temper.s_rate * A.LN2) * q * log2_exp
    tempered = gradient
    if records.STANDARDIZED & FACTS.WANT:  # through the standard deviation
        gradient -= tl.where(
            z != -float("inf"),
            (scale_slope * temper.width) * (temper.width_slope * (z - temper.mean)),
            0.0,
        )
    if FACTS.CE:
        unit = tl.exp2((z - row.unit_max) * A.LOG2E - row.unit_log)
        ce = tl.where(asked.label != L.NOWHERE, asked.factors.ce, float("nan"))
        other = asked.smoothing / asked.columns
        target = tl.where(column == asked.label, (1.0 - asked.smoothing) + other, other)
        gradient += tl.where(row.alive, ce, 0.0) * (unit - target)
    return gradient, tempered


@triton.jit
def temperature_term(tempered, z, row):
    return tl.sum(
        tl.where(z != -float("inf"), tempered * (z - row.unit_max), 0.0), 1, keep_dims=True
    )


# --- steps of a sweep -------------------------------------------------------------------------


@triton.jit
def fold(x):
    """A tile with all 16 entries of a thread in one lane, which moves nothing: its maxima are then
    merged once."""
    LANES: tl.constexpr = x.shape[0]
    VECTOR: tl.constexpr = x.shape[1]
    ROUNDS: tl.constexpr = THREAD // VECTOR
    x = tl.permute(tl.reshape(x, [ROUNDS, LANES // ROUNDS, VECTOR]), [1, 0, 2])
    return tl.reshape(x, [LANES // ROUNDS, THREAD])


@triton.jit
def statistics_step(stats, tile, sides, known, FACTS: tl.constexpr):
    at, inside = tile.at, tile.inside
    z = M.load(sides.student, at, inside, "evict_last")
    y = M.load_beside(z, sides.teacher, at, inside, "evict_last")
    z, y = L.others(z, y, at, sides.temper)
    if len(sides.temper.label) != 0:
        inside = L.inside_others(inside, at, sides.temper)
    inside = inside if inside is None else fold(inside)
    if sides.teacher is None:
        stats = R.of_one_side(stats)
        stats = R.add(stats, fold(z), fold(z), inside, sides.temper, FACTS.WANT)
        return R.of_one_side(stats)
    else:
        return R.add(stats, fold(z), fold(y), inside, sides.temper, FACTS.WANT)


@triton.jit
def sum_step(sums, tile, sides, row, FACTS: tl.constexpr):
    # What the gradient reads again is to stay in the cache.
    # Where the gradient's sweep makes the sums, few rows want them before it.
    KEEP: tl.constexpr = "evict_first" if sides.gradient is None else "evict_last"
    EVICT: tl.constexpr = "" if records.LATE & FACTS.WANT else KEEP
    z = M.load(sides.student, tile.at, tile.inside, EVICT)
    y = M.load_beside(z, sides.teacher, tile.at, tile.inside, EVICT)
    return sum_tile(sums, z, y, tile.at, row, sides, FACTS)


@triton.jit
def rest_step(lacking, tile, sides, row, FACTS: tl.constexpr):
    z = M.load(sides.student, tile.at, tile.inside, "")
    y = M.load(sides.teacher, tile.at, tile.inside, "")
    return lacking + rest_of(z, y, tile.at, row, sides, FACTS)


@triton.jit
def gradient_step(gathered, tile, sides, asked, FACTS: tl.constexpr):
    z = M.load(sides.student, tile.at, tile.inside, "evict_first")
    y = M.load_beside(z, sides.teacher, tile.at, tile.inside, "evict_first")
    value, slope, q = divergence_tile((z, y), tile.at, sides, asked, FACTS)
    sums, temperature = gathered.sums, gathered.temperature
    # Beside a gradient of more than the divergence, what is added up would be spilled.
    EARLY: tl.constexpr = not FACTS.BLANKED
    if FACTS.SUMS and EARLY:
        sums = add_sums(sums, z, y, value, slope, asked.row, FACTS.WANT)
    g, tempered = gradient_tile(z, slope, q, tile.at, sides, asked, FACTS)
    if sides.gradient is not None:
        g = g.to(sides.gradient.dtype.element_ty)
        tl.store(sides.gradient + tile.at, g, mask=tile.inside)
    if FACTS.SUMS and not EARLY:
        sums = add_sums(sums, z, y, value, slope, asked.row, FACTS.WANT)
    if FACTS.TEMPERATURE:
        temperature += temperature_term(tempered, z, asked.row)
    return records.Gathered(sums, temperature)
