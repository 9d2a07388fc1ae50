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

from fastkd.divergences.base import LOG_MIXTURE, REVERSE_KL, SLOPE_SUM
from fastkd.kernels import memory as M
from fastkd.kernels import phases as P
from fastkd.kernels import records
from fastkd.kernels.arguments import (
    Extent,
    Formula,
    Held,
    Outputs,
    Owner,
    Pieces,
    number,
    varying,
)
from fastkd.kernels.divergences import SLOPES
from fastkd.kernels.launch import (
    Rows,
    extent_of,
    formula_of,
    laid_out,
    new_gradient,
    new_rows,
    of_rows,
    rows_in_memory,
    wanted,
)
from fastkd.kernels.pieces import STATISTICS_FIELDS, SUMS_FIELDS
from fastkd.kernels.resident import resident
from fastkd.kernels.shared import shared
from fastkd.kernels.sweep import sweep
from fastkd.kernels.tuning import Schedule, at_once, layout, multiprocessors, registers, schedule
from fastkd.kernels.words import RING
from fastkd.problem import (
    CONSTANT,
    ENTROPY_SCALE_SLOPE,
    GAP,
    SCALE_SLOPE,
    WIDTH,
    Coefficients,
    Problem,
)
from fastkd.sharding import LOCAL, Forward, Merge, Phases, of, run


@triton.jit
def _scale(gradient, upstream, extent, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    by = tl.load(upstream).to(tl.float32)
    if by == 1.0:
        return
    pieces = tl.cdiv(extent.columns, BLOCK)
    for tile in range(tl.program_id(0), number(extent.rows) * pieces, tl.num_programs(0)):
        at = (tile % pieces) * BLOCK + tl.arange(0, BLOCK)
        inside = at < extent.columns
        row = gradient.pointer + M.row_at(tile // pieces, gradient, extent.inner, ALIGN)
        x = tl.load(row + at, mask=inside).to(tl.float32) * by
        tl.store(row + at, x.to(row.dtype.element_ty), mask=inside)


def phases(problem: Problem, entropy: bool, metrics: bool) -> Forward:
    """(values, state) of `problem.py`."""
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
    temperature_grad = None
    if gradient or sweeps:
        temperature_grad = run("", _launches(
            problem, P.GRADIENT, upstream.entropy is not None, False, upstream, state=state,
            gradient=grad, temperature_grad=sweeps,
        ))  # fmt: skip
    if temperature and problem.merge:
        temperature_grad = _temperature_gradient(problem, state, upstream)
    return grad, temperature_grad


def fused(
    problem: Problem, coefficients: Coefficients, metrics: bool, out: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(loss rows [N], values or None, gradient of their sum); out may be the student's logits."""
    gradient = new_gradient(problem) if out is None else out
    coefficients = coefficients.rows(problem)
    loss = new_rows(problem, 1)[0]
    values = new_rows(problem, 5) if metrics else None
    run(problem.merge, _launches(
        problem, P.STATISTICS, coefficients.entropy is not None, metrics, coefficients,
        values=values, loss=loss, gradient=gradient,
    ))  # fmt: skip
    return loss, values, gradient


def scale_(gradient: Tensor, upstream: Tensor) -> None:
    """Multiplies the rows of gradient by a 0-d tensor, in place; no traffic where that is 1."""
    rows = gradient if gradient.dim() == 3 else gradient[None]
    count, width = rows.size(0) * rows.size(1), rows.size(-1)
    operands = rows_in_memory(rows, None)
    if count and width:
        tiles = count * triton.cdiv(width, 2048)
        cuda = gradient.device.type == "cuda"
        programs = 8 * multiprocessors(gradient.device) if cuda else 2
        with torch.cuda.device_of(gradient):
            _scale[(min(tiles, programs),)](
                operands.student, upstream, Extent(varying(count), width, inner=operands.inner),
                ALIGN=operands.align, BLOCK=2048, enable_fp_fusion=True,
            )  # fmt: skip


def _launches(
    problem: Problem, first: tl.constexpr, entropy: bool, metrics: bool,
    factors: Coefficients | None = None, state: Tensor | None = None,
    values: Tensor | None = None, loss: Tensor | None = None, gradient: Tensor | None = None,
    temperature_grad: bool = False,
) -> Phases[Tensor | None]:  # fmt: skip
    """Launches the phases from `first` on; the temperatures' gradient where that is wanted."""
    merge, once = of(problem.merge), first.value == P.GRADIENT.value
    student, rows, device = problem.student, problem.rows, problem.student.device
    more = problem.moments is not None or entropy or metrics
    lean = problem.labels is None and not more
    formula = formula_of(problem)
    if problem.teacher is not None:
        formula = formula._replace(slope=SLOPES.get(problem.divergence))
    plan = _plan(problem, merge, formula, once, lean)
    # Zero for the rows that the kernel skips.
    temperature = (
        torch.zeros(rows, plan.splits, dtype=torch.float32, device=device)
        if temperature_grad
        else None
    )
    if rows == 0:
        return None if temperature is None else temperature.sum(1)
    resident_ = plan.kind == "resident"
    operands = rows_in_memory(
        student, problem.teacher, gradient,
        counts=(student.size(-1), problem.vocab_size) if resident_ else (),
        vector=1 if resident_ else plan.vector,
    )  # fmt: skip
    want = _wanted(problem, merge, formula, entropy, metrics, state is not None)
    if merge is LOCAL and not once:
        want |= _wanted_at_once(problem, formula, plan, want, lean, metrics, gradient is not None)
    arguments: dict[str, Any] = dict(
        student=operands.student, teacher=operands.teacher, gradient=operands.gradient,
        extent=extent_of(problem, operands), divergence=formula,
        outputs=Outputs(values, state, loss, temperature), **of_rows(problem, factors),
        WANT=want, num_warps=plan.warps, enable_fp_fusion=True,
    )  # fmt: skip
    if resident_:
        itemsize = _itemsize(problem)
        parts = layout(plan, student.size(-1), min(operands.align, 16 // itemsize), itemsize)
        with torch.cuda.device_of(student):
            resident[(triton.cdiv(rows, plan.lanes),)](
                FIRST=first, HELD=Held(operands.align, plan.lanes, *parts), num_ctas=plan.blocks,
                **arguments,
            )  # fmt: skip
    elif plan.kind == "shared" and not once:
        programs, options = at_once(device, problem.divergence, lean, plan.warps)
        _shared(arguments | options, rows, operands, plan, programs)
    else:
        if not once:
            # Only the divergence has use for labels.
            beside = formula.at_label is not None and (factors is None or factors.ce is None)
            everywhere = 1 + 2 * (problem.teacher is not None) + 4 * (gradient is not None)
            plain = (lean or (beside and not more)) and operands.shifted in (0, everywhere)
            arguments |= registers(device, problem.divergence, operands.shifted > 0, plain)
        yield from _sweeps(arguments, rows, operands, first, plan, merge)
    return None if temperature is None else _of_temperatures(problem, temperature.sum(1))


def _itemsize(problem: Problem) -> int:
    """Of the narrower operand."""
    return min(x.element_size() for x in (problem.student, problem.teacher) if x is not None)


def _plan(problem: Problem, merge: Merge, formula: Formula, once: bool, lean: bool) -> Schedule:
    columns = problem.student.size(-1)
    if merge.columns is not None:
        columns = triton.cdiv(merge.columns, merge.size)
    handed_on = {} if merge is LOCAL else {"swept": True}
    plan = schedule(
        problem.rows, columns, _itemsize(problem), problem.student.device, once=once, lean=lean,
        **handed_on,
    )  # fmt: skip
    if plan.kind == "shared" and formula.at_label is not None:
        plan = plan._replace(kind="sweep")
    return plan


def _wanted(
    problem: Problem, merge: Merge, formula: Formula, entropy: bool, metrics: bool, saved: bool
) -> int:
    """Bits of records.py; saved: into a state, for a backward of its own."""
    constant = formula.constant.value
    # The temperature's gradient of a row that others have columns of is to be in the state.
    scale_slope = saved and merge is not LOCAL and problem.temperature_trains
    want = wanted(problem, entropy, metrics)
    want |= records.GAP.value * (constant == REVERSE_KL)
    want |= records.MIXTURE.value * (constant == LOG_MIXTURE)
    want |= records.STANDARDIZED.value * (problem.moments is not None)
    want |= records.REST.value * (constant in (REVERSE_KL, LOG_MIXTURE, SLOPE_SUM))
    return want | records.SCALE_SLOPE.value * (problem.moments is not None or scale_slope)


def _wanted_at_once(
    problem: Problem, formula: Formula, plan: Schedule, want: int, lean: bool, metrics: bool,
    gradient: bool,
) -> int:  # fmt: skip
    """Bits more where all phases are here: a value that the first knows, sums made by the last."""
    resident_ = plan.kind == "resident"
    more = 0
    if formula.slope is not None and not (resident_ or metrics or problem.moments is not None):
        more |= records.KL.value + records.AGAIN.value * gradient
    if gradient and (plan.kind != "sweep" or plan.splits == 1):
        # Rows in registers have too few of them where more lives as long as all parts do.
        late = lean and not want & records.REST.value
        if not resident_:
            late = formula.constant.value != SLOPE_SUM
        more |= records.LATE.value * (late and not want & records.SCALE_SLOPE.value)
    return more


def _summed(arguments: dict[str, Any]) -> bool:
    """Whether anything is wanted of the sums."""
    wanted = records.SCALE_SLOPE.value | records.TEACHER_ENTROPY.value
    return arguments["teacher"].pointer is not None or bool(arguments["WANT"] & wanted)


def _shared(
    arguments: dict[str, Any], rows: int, operands: Rows, plan: Schedule, programs: int
) -> None:
    """All phases in one launch, by groups of programs, of which there are `programs` at most."""
    extent, tile = laid_out(arguments.pop("extent"), operands, plan, plan.splits)
    groups = min(max(programs // plan.splits, 1), rows)
    student = operands.student.pointer
    mailboxes = Pieces(*(
        torch.zeros(groups, RING.value, fields.value, plan.splits, dtype=torch.int64,
                    device=student.device)
        for fields in (STATISTICS_FIELDS, SUMS_FIELDS)
    ))  # fmt: skip
    with torch.cuda.device_of(student):
        shared[(groups * plan.splits,)](
            extent=extent, pieces=mailboxes, SUMMED=_summed(arguments), TILE=tile,
            launch_cooperative_grid=True, **arguments,
        )  # fmt: skip


def _sweeps(
    arguments: dict[str, Any], rows: int, operands: Rows, first: tl.constexpr, plan: Schedule,
    merge: Merge,
) -> Phases[None]:  # fmt: skip
    """All phases in one launch, or where a row has several programs or owners a launch for each."""
    extent, tile = laid_out(arguments.pop("extent"), operands, plan, plan.splits * merge.size)
    alone, student = merge is LOCAL, operands.student.pointer
    if merge.columns is not None:
        owner = Owner(varying(merge.first_column), varying(merge.columns))
        extent = extent._replace(owner=owner)

    def launch(begin: tl.constexpr, end: tl.constexpr, between: Pieces) -> None:
        with torch.cuda.device_of(student):
            sweep[(rows, plan.splits)](
                extent=extent, pieces=between, FIRST=begin, LAST=end, TILE=tile, **arguments
            )

    if first.value == P.GRADIENT.value or (alone and plan.splits == 1):
        launch(first, P.GRADIENT, Pieces())
        return
    summed = _summed(arguments)
    statistics, sums = (
        torch.empty(plan.splits, n.value, rows, dtype=torch.float32, device=student.device)
        for n in (STATISTICS_FIELDS, SUMS_FIELDS)
    )
    launch(P.STATISTICS, P.STATISTICS, Pieces(statistics, None))
    if not alone:
        statistics = (yield statistics).contiguous()
    if summed:
        launch(P.SUMS, P.SUMS, Pieces(statistics, sums))
        if not alone:
            sums = (yield sums).contiguous()
    launch(P.GRADIENT, P.GRADIENT, Pieces(statistics, sums))


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
