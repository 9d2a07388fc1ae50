"""Loss and gradient of multi-label heads from two rows of logits, in one sweep.

Every entry stands alone: it is read once, its gradient is written at once, and only the values are
summed up by rows. `README.md` derives the forms.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.kernels import arithmetic as A
from fastkd.kernels import memory as M
from fastkd.kernels import phases as P
from fastkd.kernels import records
from fastkd.kernels import walk as W
from fastkd.kernels.arguments import Extent, Outputs, Owner, Tiling, number, varying
from fastkd.kernels.launch import new_gradient, of_rows, rows_in_memory
from fastkd.kernels.sweep import counts
from fastkd.kernels.terms import EXPM1_RADIUS, LOG1P_RADIUS, expm1_remainder
from fastkd.kernels.tuning import schedule
from fastkd.problem import Coefficients, Problem
from fastkd.sharding import Forward, of

# Beyond this difference of logits a reverse divergence takes its direct form.
APART = tl.constexpr(64.0)


class Logistic(NamedTuple):
    x: Any
    small: Any  # sigmoid(-|x|)
    large: Any  # sigmoid(|x|)
    log: Any  # log(1 + e^-|x|), which is minus the log of the latter


class Sums(NamedTuple):
    """Of a row, the first five as in `values`."""

    kd: Any
    ce: Any
    entropy: Any
    teacher_entropy: Any
    agreement: Any
    scale_grad: Any  # minus T times the gradient of T


class Row(NamedTuple):
    s_rate: Any  # 1 / T
    t_rate: Any
    factors: Any


class Facts(NamedTuple):
    """What the compiler knows of a sweep."""

    VALUES: Any  # how many of Sums are wanted, from the first on
    REVERSE: Any
    SAME: Any  # whether both sides have one temperature
    CE: Any
    H: Any
    TEMPERATURE: Any  # whether its gradient is wanted


@triton.jit
def _logistic(x, DIGITS: tl.constexpr):
    """DIGITS: the logarithm to a relative 1e-6, where it is summed up; else to an absolute 2e-7."""
    e = tl.exp2(tl.abs(x) * -A.LOG2E)
    large = A.reciprocal(1.0 + e)
    log = A.fast_log2(1.0 + e) * A.LN2
    if DIGITS:
        log = tl.where(e < LOG1P_RADIUS, e - e * (e * A.log1p_remainder(e)), log)
    return Logistic(x, e * large, large, log)


@triton.jit
def _divergence(student, teacher, h, a, b, REVERSE: tl.constexpr):
    """a KL(p || q) + b KL(q || p), its slope to the student's tempered logit, and q (1 - q).

    Both are the same with yes and no exchanged: so that p of the first becomes s <= 1/2.
    h: the difference of the tempered logits.
    """
    s, up = teacher.small, teacher.x > 0
    z, y = tl.where(up, -student.x, student.x), -tl.abs(teacher.x)
    h = tl.where(up, -h, h)
    q = tl.where(z > 0, student.large, student.small)
    rest = tl.where(z > 0, student.small, student.large)
    near = tl.abs(h) < EXPM1_RADIUS
    curved = h * (h * expm1_remainder(h))  # e^h - 1 - h
    r = tl.where(near, s * (h + curved), (q - s) * A.reciprocal(rest))  # s (e^h - 1)
    rise = tl.where(near, r * rest, q - s)
    excess = tl.where(near, s * curved, r - tl.where(s > 0, s * h, 0.0))
    far = tl.where(z > 0, 1.0 - s, -s) * z + tl.where(s > 0, s * y, 0.0) + student.log - teacher.log
    forward = tl.where(tl.abs(r) < LOG1P_RADIUS, excess - r * (r * A.log1p_remainder(r)), far)
    # A weight of exactly 0 also removes an infinite term.
    value, slope, variance = tl.where(a > 0, a * forward, 0.0), a * rise, q * rest
    if REVERSE:
        certain = tl.abs(z) == float("inf")
        both = tl.where(rise != 0, rise * h, 0.0) - forward
        # Far apart, the two would cancel: q h + log(1 - q) - log(1 - s).
        apart = tl.where(z > 0, -rest * z - q * y, tl.where(q != 0, q * h, 0.0)) - student.log
        apart = tl.where(certain, tl.where(z > 0, -y, 0.0), apart) + teacher.log
        value += b * tl.where(certain | (tl.abs(h) > APART), apart, both)
        slope += b * tl.where(tl.abs(h) < float("inf"), variance * h, 0.0)
    return value, tl.where(up, -slope, slope), variance


@triton.jit
def _cross_entropy(z, label, unit):
    """At T = 1, and sigmoid(z); 0 * inf is 0."""
    sided = tl.where(z > 0, 1.0 - label, -label)
    return tl.where(sided == 0, 0.0, sided * z) + unit.log, tl.where(z > 0, unit.large, unit.small)


@triton.jit
def _times(x, logit):
    """x * logit, and 0 where the logit is infinite: nothing moves there."""
    return tl.where(tl.abs(logit) == float("inf"), 0.0, x * logit)


@triton.jit
def _row_sum(total, x, inside):
    return total + tl.sum(x if inside is None else tl.where(inside, x, 0.0), 1, keep_dims=True)


@triton.jit
def _entropy(side):
    """log(1 + e^-|x|) + |x| sigmoid(-|x|)"""
    return side.log + _times(side.small, tl.abs(side.x))


@triton.jit
def _add(sums, value, z, y, student, teacher, inside, VALUES: tl.constexpr):
    """The sums with a tile's added, but for the cross-entropy."""
    if VALUES > 0:
        sums = records.replace(sums, kd=_row_sum(sums.kd, value, inside))
    if VALUES > 1:
        sums = records.replace(sums, entropy=_row_sum(sums.entropy, _entropy(student), inside))
    if VALUES > 3:
        entropy = _row_sum(sums.teacher_entropy, _entropy(teacher), inside)
        agreement = tl.where((z > 0) == (y > 0), 1.0, 0.0)
        agreement = _row_sum(sums.agreement, agreement, inside)
        sums = records.replace(sums, teacher_entropy=entropy, agreement=agreement)
    return sums


@triton.jit
def _step(sums, tile, sides, row, FACTS: tl.constexpr):
    """Adds a tile to the sums, and writes its gradient."""
    VALUES: tl.constexpr = FACTS.VALUES
    at, inside = tile.at, tile.inside
    z = M.load(sides.student, at, inside, "evict_first")
    seen = inside
    if VALUES == 0:  # beside a factor of 0 the teacher is not read, as its logits may be NaN
        seen = tl.broadcast_to(row.factors.kd, z.shape) != 0
        seen = seen if inside is None else seen & inside
    y = M.load_beside(z, sides.teacher, at, seen, "evict_first")
    tempered, tempered_teacher = z * row.s_rate, y * row.t_rate
    h = (z - y) * row.s_rate if FACTS.SAME else tempered - tempered_teacher
    student = _logistic(tempered, VALUES > 1 or (FACTS.REVERSE and VALUES > 0))
    teacher = _logistic(tempered_teacher, VALUES > 3 or (FACTS.REVERSE and VALUES > 0))
    value, slope, variance = tl.zeros_like(z), tl.zeros_like(z), student.small * student.large
    if sides.teacher is not None:
        value, slope, variance = _divergence(student, teacher, h, sides.a, sides.b, FACTS.REVERSE)
    sums = _add(sums, value, z, y, student, teacher, inside, VALUES)

    g = row.factors.kd * slope
    if FACTS.H:
        g -= row.factors.entropy * _times(variance, student.x)
    g *= row.s_rate
    if FACTS.TEMPERATURE:
        sums = records.replace(sums, scale_grad=_row_sum(sums.scale_grad, _times(g, z), inside))
    if sides.labels is not None:
        if FACTS.CE or VALUES > 1:
            label = tl.load(sides.labels + at, mask=inside).to(tl.float32)
            hard, sigmoid = _cross_entropy(z, label, _logistic(z, VALUES > 1))
            sums = records.replace(sums, ce=_row_sum(sums.ce, hard, inside))
            g += row.factors.ce * (sigmoid - label)
    if sides.gradient is not None:
        tl.store(sides.gradient + at, g.to(sides.gradient.dtype.element_ty), mask=inside)
    return sums


@triton.jit
def _bernoulli(
    student, teacher, gradient, extent, temperatures, targets, factors, outputs, a, b,
    VALUES: tl.constexpr, REVERSE: tl.constexpr, RESIDENT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """RESIDENT: a lane is a row; else all lanes have `extent.span` columns of one."""
    FACTS: tl.constexpr = Facts(
        VALUES, REVERSE, SAME=temperatures.teacher is None, CE=factors.ce is not None,
        H=factors.entropy is not None, TEMPERATURE=outputs.temperature is not None,
    )  # fmt: skip
    rows = number(extent.rows)
    if RESIDENT:
        index, exists, live = M.rows_of(rows, targets.counted, TILE.lanes)
    else:
        index, exists, live = tl.program_id(0).to(tl.int64), None, None
    s_rate = 1.0 / P.per_row(temperatures.student, index, live, 1.0)
    t_rate = s_rate
    if temperatures.teacher is not None:
        t_rate = 1.0 / P.per_row(temperatures.teacher, index, live, 1.0)
    row = Row(s_rate, t_rate, P.factors_of(factors, index, live))
    if RESIDENT and VALUES == 0:
        live &= P.any_of(row.factors)
    student_at = M.row_at(index, student, extent.inner, TILE.align)
    teacher_at = M.row_at(index, teacher, extent.inner, TILE.align)
    gradient_at = M.row_at(index, gradient, extent.inner, TILE.align)
    student, teacher, gradient = student.pointer, teacher.pointer, gradient.pointer
    labels = targets.labels
    student += student_at
    if teacher is not None:
        teacher += teacher_at
    if gradient is not None:
        gradient += gradient_at
    if labels is not None:
        labels += index * extent.columns
    a, b, _ = P.singles(a, b, 0.0)
    sides = records.Sides(student, teacher, gradient, a=a, b=b, labels=labels)

    if RESIDENT:
        sums = _short_rows(exists, live, sides, row, extent, FACTS, TILE)
    else:
        sums = _long_row(index, targets, factors, sides, row, extent, FACTS, TILE)
    _write(outputs, sums, row, index, exists, rows, extent, RESIDENT, FACTS, TILE)


@triton.jit
def _no_sums(LANES: tl.constexpr):
    zero = tl.zeros([LANES, 1], tl.float32)
    return Sums(zero, zero, zero, zero, zero, zero)


@triton.jit
def _short_rows(exists, live, sides, row, extent, FACTS: tl.constexpr, TILE: tl.constexpr):
    """The sums of whole rows, whose gradient is written; it is 0 where nothing counts."""
    columns, at = M.aligned(extent.columns, TILE.align), tl.arange(0, TILE.vector)[None, :]
    tile = W.Tile(at, live & (at < columns))
    sums = _step(_no_sums(TILE.lanes), tile, sides, row, FACTS)
    if sides.gradient is not None:
        blank = exists & (at < M.aligned(extent.width, TILE.align))
        nothing = tl.zeros(blank.shape, sides.gradient.dtype.element_ty)
        tl.store(sides.gradient + at, nothing, mask=blank & ((at >= columns) | (live == 0)))
    return sums


@triton.jit
def _long_row(index, targets, factors, sides, row, extent, FACTS: tl.constexpr, TILE: tl.constexpr):
    """The same of `extent.span` columns of a row."""
    BLOCK: tl.constexpr = TILE.lanes * TILE.vector
    split, columns = tl.program_id(1), extent.columns
    stretch = W.stretch_of(split, extent.span, 0, columns, TILE.lanes, TILE.vector, 0)
    left = stretch
    if targets.counted is not None or FACTS.VALUES == 0:
        some = counts(index, targets, factors, FACTS.VALUES == 0)
        full, end = tl.where(some, stretch.full, 0), tl.where(some, stretch.end, stretch.begin)
        left = records.replace(stretch, full=full, end=end)
    if sides.gradient is not None:
        M.fill_zero(sides.gradient, left.end, stretch.end, BLOCK)
        if split == 0:
            M.fill_zero(sides.gradient, columns, extent.width, BLOCK)
    return W.walk(_no_sums(TILE.lanes), left, sides, row, FACTS, _step, True)


@triton.jit
def _write(outputs, sums, row, index, exists, rows, extent, RESIDENT: tl.constexpr,
           FACTS: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    at = index * TILE.splits + tl.program_id(1)
    for kind in tl.static_range(FACTS.VALUES):
        total = sums[kind] if RESIDENT else tl.sum(sums[kind])
        if kind == 4:
            total /= extent.columns if extent.owner is None else number(extent.owner.all_columns)
        tl.store(outputs.value + kind * rows * TILE.splits + at, total, mask=exists)
    if FACTS.TEMPERATURE:
        total = sums.scale_grad if RESIDENT else tl.sum(sums.scale_grad)
        tl.store(outputs.temperature + at, -row.s_rate * total, mask=exists)


# --- launchers, as problem.py asks for them ---------------------------------------------------


def phases(problem: Problem, entropy: bool, metrics: bool) -> Forward:
    """The state: of rows with several owners the derivatives of kd and entropy to T, [2, N]."""
    kinds = problem.kinds(entropy, metrics)
    values, _ = _run(problem, kinds)
    if not problem.merge:
        return values, values.new_empty(0, problem.rows)
    one, zero = values.new_ones(problem.rows), values.new_zeros(problem.rows)
    slopes = torch.stack([zero, zero])
    if problem.temperature_trains:
        terms = Coefficients(one, None, None), Coefficients(zero, None, one)
        slopes = torch.stack([_run(problem, 0, term, temperature_grad=True)[1] for term in terms])
    pieces = yield torch.cat([values, slopes])
    return pieces[:, :kinds].sum(0), pieces[:, kinds:].sum(0)


def backward(
    problem: Problem, state: Tensor, upstream: Coefficients, gradient: bool, temperature: bool
) -> tuple[Tensor | None, Tensor | None]:
    out = new_gradient(problem) if gradient else None
    sweeps = temperature and not problem.merge
    temperature_grad = None
    if gradient or sweeps:
        _, temperature_grad = _run(problem, 0, upstream, out, sweeps)
    if temperature and problem.merge:
        temperature_grad = Coefficients(upstream.kd, upstream.entropy, None).weigh(state)
    return out, temperature_grad if temperature else None


def fused(
    problem: Problem, coefficients: Coefficients, metrics: bool, out: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    gradient = new_gradient(problem) if out is None else out
    kinds = problem.kinds(coefficients.entropy is not None, metrics)
    apart = coefficients.of_no_divergence and problem.teacher is not None
    coefficients = coefficients.rows(problem)
    if apart:
        values, _ = _run(problem, kinds)
        _run(problem._replace(teacher=None), 0, coefficients, gradient)
    else:
        values, _ = _run(problem, kinds, coefficients, gradient)
    if problem.merge:
        values = of(problem.merge).gather(values).sum(0)
    return coefficients.weigh(values), values if metrics else None, gradient


def _run(
    problem: Problem, kinds: int, factors: Coefficients | None = None,
    gradient: Tensor | None = None, temperature_grad: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The first `kinds` of `values`, the gradient, and the temperatures' where that is wanted."""
    student, teacher, rows = problem.student, problem.teacher, problem.rows
    width, device, columns = student.size(-1), student.device, problem.vocab_size
    itemsize = min(x.element_size() for x in (student, teacher) if x is not None)
    plan = schedule(rows, width, itemsize, device, once=True)
    resident = plan.kind == "resident"
    if not resident and problem.b and kinds > 1:  # what a thread holds of an entry is much
        plan = plan._replace(lanes=plan.lanes // 2)
    values = torch.empty((kinds, rows, plan.splits), dtype=torch.float32, device=device)
    temperature = torch.empty((rows, plan.splits), dtype=torch.float32, device=device)
    counts = (width, columns) if resident else ()
    operands = rows_in_memory(student, teacher, gradient, counts)
    block = plan.lanes * plan.vector
    all_columns = of(problem.merge).columns
    owner = None if all_columns is None else Owner(varying(0), varying(all_columns))
    span = triton.cdiv(triton.cdiv(columns, plan.splits), block) * block
    if rows:
        with torch.cuda.device_of(student):
            _bernoulli[(triton.cdiv(rows, plan.lanes) if resident else rows, plan.splits)](
                operands.student, operands.teacher, operands.gradient,
                Extent(varying(rows), columns, width, operands.inner, span, owner),
                outputs=Outputs(values, temperature=temperature if temperature_grad else None),
                a=float(problem.a), b=float(problem.b), **of_rows(problem, factors),
                VALUES=kinds, REVERSE=problem.b != 0, RESIDENT=resident,
                TILE=Tiling(operands.align, plan.lanes, plan.vector, plan.splits, 1, 1, 0),
                num_warps=plan.warps, enable_fp_fusion=True,
            )  # fmt: skip
    return values.sum(-1), temperature.sum(-1)
