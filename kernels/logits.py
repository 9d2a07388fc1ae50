"""Loss and gradient from two rows of logits: what launches the kernels.

A row is worked off in three phases, each of which ends where a merge may stand: statistics
(`rows.py`), sums of value and slope, gradient. A schedule, `resident.py` or `sweep.py`, lays
them out over programs; `tuning.py` chooses it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.divergences import LOG_MIXTURE, REVERSE_KL, SLOPE_SUM, Divergence
from fastkd.kernels import phases as P
from fastkd.kernels import records
from fastkd.kernels.divergences import SLOPES, Device, device_of
from fastkd.kernels.launch import (
    beginnings,
    new_gradient,
    new_rows,
    per_row,
    rows_in_memory,
)
from fastkd.kernels.pieces import STATISTICS_FIELDS, SUMS_FIELDS
from fastkd.kernels.resident import resident
from fastkd.kernels.sweep import sweep
from fastkd.kernels.tuning import (
    Schedule,
    layout,
    multiprocessors,
    power_of_two,
    registers,
    schedule,
)
from fastkd.problem import (
    CONSTANT,
    ENTROPY_SCALE_SLOPE,
    GAP,
    SCALE_SLOPE,
    WIDTH,
    Coefficients,
    Problem,
)
from fastkd.sharding import LOCAL, Merge, Phases, of, together


@triton.jit(do_not_specialize=("inner", "pieces", "tiles"))
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
    return together(of(problem.merge), phases(problem, entropy, metrics))[0]


def phases(problem: Problem, entropy: bool, metrics: bool) -> Phases[tuple[Tensor, Tensor]]:
    """The same, where other owners' columns come in between."""
    kinds = problem.kinds(entropy, metrics)
    values = new_rows(problem, kinds)
    state = new_rows(problem, problem.state_rows(kinds))
    yield from _launches(problem, P.STATISTICS, entropy, metrics, state=state, values=values)
    return values, state


def backward(
    problem: Problem, state: Tensor, upstream: Coefficients, gradient: bool, temperature: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The student's gradient [N, width] and the temperatures' [N], as far as they are wanted."""
    grad = new_gradient(problem) if gradient else None
    sweeps = temperature and not problem.merge
    heat = None
    if gradient or sweeps:
        (heat,) = together(LOCAL, _launches(
            problem, P.GRADIENT, upstream.entropy is not None, False, upstream, state=state,
            gradient=grad, heat=sweeps,
        ))  # fmt: skip
    if temperature and problem.merge:
        heat = _temperature_gradient(problem, state, upstream)
    return grad, heat


def fused(
    problem: Problem, coefficients: Coefficients, metrics: bool, out: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(loss rows [N], values or None, gradient of their sum); out may be the student's logits."""
    gradient = new_gradient(problem) if out is None else out
    loss = new_rows(problem, 1)[0]
    values = new_rows(problem, 5) if metrics else None
    together(of(problem.merge), _launches(
        problem, P.STATISTICS, coefficients.entropy is not None, metrics, coefficients,
        values=values, loss=loss, gradient=gradient,
    ))  # fmt: skip
    return loss, values, gradient


def scale_(gradient: Tensor, upstream: Tensor) -> None:
    """Multiplies the rows of gradient by a 0-d tensor, in place; no traffic where that is 1."""
    rows = gradient if gradient.dim() == 3 else gradient[None]
    width, pieces = rows.size(-1), triton.cdiv(rows.size(-1), 2048)
    tiles = rows.size(0) * rows.size(1) * pieces
    if tiles:
        cuda = gradient.device.type == "cuda"
        programs = 8 * multiprocessors(gradient.device) if cuda else 2
        with torch.cuda.device_of(gradient):
            _scale[(min(tiles, programs),)](
                rows, upstream, rows.stride(0), rows.stride(1), rows.size(1), pieces, width, tiles,
                BLOCK=2048,
            )  # fmt: skip


def _launches(
    problem: Problem, first: tl.constexpr, entropy: bool, metrics: bool,
    factors: Coefficients | None = None, state: Tensor | None = None,
    values: Tensor | None = None, loss: Tensor | None = None, gradient: Tensor | None = None,
    heat: bool = False,
) -> Phases[Tensor | None]:  # fmt: skip
    """Launches the phases from `first` on; the temperatures' gradient where heat is wanted."""
    merge = of(problem.merge)
    student, teacher, rows = problem.student, problem.teacher, problem.rows
    width, device = student.size(-1), student.device
    sides = [x for x in (student, teacher) if x is not None]
    kd, ce, h = factors or (None, None, None)
    device_function, constant = Device(P.nothing), None
    t_temperature = problem.teacher_temperature
    if teacher is None:
        kd = t_temperature = None
    else:
        device_function = device_of(problem.divergence, problem.a, problem.b)
        constant = device_function.constant or Divergence.of_name(problem.divergence).constant
        if t_temperature is None and problem.moments is not None:  # the widths make two of one
            t_temperature = problem.student_temperature
    itemsize = min(x.element_size() for x in sides)
    once = first.value == P.GRADIENT.value
    lean = problem.labels is None and problem.moments is None and not (entropy or metrics)
    shared = {} if merge is LOCAL else {"swept": True}
    columns = width if merge.columns is None else triton.cdiv(merge.columns, merge.size)
    plan = schedule(rows, columns, itemsize, device, once=once, lean=lean, **shared)
    # Zero for the rows that the kernel skips.
    temperature = (
        torch.zeros(rows, plan.splits, dtype=torch.float32, device=device) if heat else None
    )
    if rows == 0:
        return None if temperature is None else temperature.sum(1)
    counts = () if plan.kind == "sweep" else (width, problem.vocab_size)
    operands = rows_in_memory(*counts, student=student, teacher=teacher, gradient=gradient)
    want = _wanted(problem, constant, entropy, metrics)
    apart = merge is not LOCAL and problem.temperature_trains  # whose gradient is to be in state
    want |= records.LEVER.value * (problem.moments is not None or (apart and state is not None))
    alone = plan.kind == "sweep" and plan.splits == 1 and merge is LOCAL and not once
    slope = SLOPES.get(problem.divergence) if teacher is not None else None
    if alone and slope is not None and problem.moments is None and not metrics:
        want |= records.KL.value + records.AGAIN.value * (gradient is not None)
    arguments = operands | per_row(
        s_temperature=problem.student_temperature, t_temperature=t_temperature, kd=kd, ce=ce,
        entropy=h,
    ) | dict(  # noqa: C408
        moments=problem.moments, labels=problem.labels, counted=problem.counted,
        smoothing=float(problem.label_smoothing), a=float(problem.a), b=float(problem.b),
        state=state, values=values, loss=loss, width=width, rows=rows, columns=problem.vocab_size,
        temperature=temperature, WANT=want, DIVERGENCE=device_function.evaluate,
        OUTER=device_function.outer, AT_LABEL=device_function.at_label, CONSTANT=constant,
        LANES=plan.lanes, num_warps=plan.warps, enable_fp_fusion=True,
    )  # fmt: skip
    if plan.kind == "resident":
        vector = min(operands["ALIGN"], 16 // itemsize)
        parts, piece, stored = layout(plan, width, vector, itemsize)
        with torch.cuda.device_of(student):
            resident[(triton.cdiv(rows, plan.lanes),)](
                FIRST=first, PARTS=parts, PIECE=piece, STORED=stored, num_ctas=plan.blocks,
                **arguments,
            )  # fmt: skip
    else:
        arguments |= beginnings(operands, plan.vector) | {"SLOPE": slope}
        shifted = arguments["SHIFTED"]
        everywhere = 1 + 2 * (teacher is not None) + 4 * (gradient is not None)
        plain = lean and shifted in (0, everywhere)
        if not once:
            arguments |= registers(device, problem.divergence, shifted > 0, plain)
        yield from _sweeps(arguments, first, plan, merge)
    return None if temperature is None else _of_temperatures(problem, temperature.sum(1))


def _wanted(problem: Problem, constant: str | None, entropy: bool, metrics: bool) -> int:
    """Bits of rows.py."""
    want = records.GAP.value * (constant == REVERSE_KL)
    want |= records.MIXTURE.value * (constant == LOG_MIXTURE)
    want |= records.UNIT.value * (problem.labels is not None)
    want |= records.MEAN.value * (problem.labels is not None and problem.label_smoothing != 0)
    want |= records.ENTROPY.value * (entropy or metrics)
    want |= records.TEACHER_ENTROPY.value * metrics
    want |= records.STANDARDIZED.value * (problem.moments is not None)
    want |= records.REST.value * (constant in (REVERSE_KL, LOG_MIXTURE, SLOPE_SUM))
    return want


def _sweeps(
    arguments: dict[str, Any], first: tl.constexpr, plan: Schedule, merge: Merge
) -> Phases[None]:
    """All phases in one launch, or where a row has several programs or owners a launch for each."""
    rows, columns, alone = arguments["rows"], arguments["columns"], merge is LOCAL
    block = plan.lanes * plan.vector
    reach = columns + (plan.vector - 1 if arguments["SHIFTED"] else 0)
    pieces = plan.splits * merge.size
    arguments |= dict(  # noqa: C408
        span=triton.cdiv(triton.cdiv(reach, plan.splits), block) * block,
        first_column=None if merge.columns is None else merge.first_column,
        all_columns=merge.columns,
        VECTOR=plan.vector, SPLITS=plan.splits, PIECES=pieces, PADDED=power_of_two(pieces),
    )  # fmt: skip

    def launch(
        begin: tl.constexpr, end: tl.constexpr, statistics: Tensor | None, sums: Tensor | None
    ) -> None:
        with torch.cuda.device_of(arguments["student"]):
            sweep[(rows, plan.splits)](
                FIRST=begin, LAST=end, statistics=statistics, sums_of_pieces=sums, **arguments
            )

    def new(fields: tl.constexpr) -> Tensor:
        return arguments["s_temperature"].new_empty(plan.splits, fields.value, rows)

    if first.value == P.GRADIENT.value or (alone and plan.splits == 1):
        launch(first, P.GRADIENT, None, None)
        return
    statistics, sums = new(STATISTICS_FIELDS), new(SUMS_FIELDS)
    launch(P.STATISTICS, P.STATISTICS, statistics, None)
    if not alone:
        statistics = (yield statistics).contiguous()
    summed = arguments["teacher"] is not None or (
        arguments["WANT"] & (records.LEVER.value | records.TEACHER_ENTROPY.value)
    )
    if summed:
        launch(P.SUMS, P.SUMS, statistics, sums)
        if not alone:
            sums = (yield sums).contiguous()
    launch(P.GRADIENT, P.GRADIENT, statistics, sums)


def _temperature_gradient(problem: Problem, state: Tensor, upstream: Coefficients) -> Tensor:
    """From the derivatives that the forward pass has summed up over all columns."""
    alive = state[GAP] != -torch.inf
    defined = alive & (state[CONSTANT].abs() != torch.inf) & (upstream.kd != 0)
    slope = torch.where(defined, upstream.kd * state[SCALE_SLOPE], 0.0)
    if upstream.entropy is not None:
        slope += torch.where(alive, upstream.entropy * state[ENTROPY_SCALE_SLOPE], 0.0)
    return -slope / problem.student_temperature


def _of_temperatures(problem: Problem, slope: Tensor) -> Tensor:
    """The gradient of T from that of T * width, where the logits are standardised."""
    return slope if problem.moments is None else slope * problem.moments[0, WIDTH]
