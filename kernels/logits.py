"""Loss and gradient from two rows of logits: what launches the kernels.

A row is worked off in three phases, each of which ends where a merge may stand: statistics
(`rows.py`), sums of value and slope, gradient. A schedule, `resident.py` or `sweep.py`, lays
them out over programs; `tuning.py` chooses it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.divergences import LOG_MIXTURE, REVERSE_KL, SLOPE_SUM, Divergence
from fastkd.kernels import phases as P
from fastkd.kernels import rows as R
from fastkd.kernels.divergences import device_of
from fastkd.kernels.launch import (
    beginnings,
    new_gradient,
    new_rows,
    per_row,
    rows_in_memory,
    two_sides,
)
from fastkd.kernels.resident import resident
from fastkd.kernels.sweep import sweep
from fastkd.kernels.tuning import layout, multiprocessors, registers, schedule
from fastkd.problem import WIDTH, Coefficients, Problem


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
    long = problem.labels is not None or entropy or metrics
    values = new_rows(problem, 5 if metrics else 3 if long else 1)
    state = new_rows(problem, 10 if problem.moments is not None else 8 if long else 6)
    _run(problem, P.STATISTICS, entropy, metrics, state=state, values=values)
    return values, state


def backward(
    problem: Problem, state: Tensor, upstream: Coefficients, gradient: bool, temperature: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The student's gradient [N, width] and the temperatures' [N], as far as they are wanted."""
    grad = new_gradient(problem) if gradient else None
    heat = _run(
        problem, P.GRADIENT, upstream.entropy is not None, False, upstream, state=state,
        gradient=grad, heat=temperature,
    )  # fmt: skip
    return grad, heat


def fused(
    problem: Problem, coefficients: Coefficients, metrics: bool, out: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(loss rows [N], values or None, gradient of their sum); out may be the student's logits."""
    gradient = new_gradient(problem) if out is None else out
    loss = new_rows(problem, 1)[0]
    values = new_rows(problem, 5) if metrics else None
    _run(
        problem, P.STATISTICS, coefficients.entropy is not None, metrics, coefficients,
        values=values, loss=loss, gradient=gradient,
    )  # fmt: skip
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


def _run(
    problem: Problem, first: tl.constexpr, entropy: bool, metrics: bool,
    factors: Coefficients | None = None, state: Tensor | None = None,
    values: Tensor | None = None, loss: Tensor | None = None, gradient: Tensor | None = None,
    heat: bool = False,
) -> Tensor | None:  # fmt: skip
    """Launches the phases from `first` on; the temperatures' gradient where heat is wanted."""
    problem = two_sides(problem)
    student, teacher, rows = problem.student, problem.teacher, problem.rows
    width, device = student.size(-1), student.device
    kind = Divergence.of_name(problem.divergence)
    device_function = device_of(problem.divergence, problem.a, problem.b)
    constant = device_function.constant or kind.constant
    itemsize = min(student.element_size(), teacher.element_size())
    once = first.value == P.GRADIENT.value
    lean = problem.labels is None and problem.moments is None and not (entropy or metrics)
    plan = schedule(rows, width, itemsize, device, once=once, lean=lean)
    # Zero for the rows that the kernel skips.
    temperature = (
        torch.zeros(rows, plan.splits, dtype=torch.float32, device=device) if heat else None
    )
    if rows == 0:
        return None if temperature is None else temperature.sum(1)
    counts = () if plan.kind == "sweep" else (width, problem.vocab_size)
    operands = rows_in_memory(*counts, student=student, teacher=teacher, gradient=gradient)
    kd, ce, h = factors or (None, None, None)
    want = R.GAP.value * (constant == REVERSE_KL)
    want |= R.MIXTURE.value * (constant == LOG_MIXTURE)
    want |= R.UNIT.value * (problem.labels is not None)
    want |= R.MEAN.value * (problem.labels is not None and problem.label_smoothing != 0)
    want |= R.ENTROPY.value * (entropy or metrics)
    want |= R.TEACHER_ENTROPY.value * metrics
    want |= R.LEVER.value * (problem.moments is not None)
    want |= R.REST.value * (constant in (REVERSE_KL, SLOPE_SUM))
    alone = first.value == P.STATISTICS.value and gradient is None and not metrics
    swept = plan.kind == "sweep" and plan.splits == 1 and problem.moments is None
    want |= R.KL.value * (alone and swept and problem.divergence in ("forward_kl", "reverse_kl"))
    t_temperature = problem.teacher_temperature
    if t_temperature is None and problem.moments is not None:  # the widths make two of one
        t_temperature = problem.student_temperature
    arguments = operands | per_row(
        s_temperature=problem.student_temperature, t_temperature=t_temperature, kd=kd, ce=ce,
        entropy=h,
    ) | dict(  # noqa: C408
        moments=problem.moments, labels=problem.labels, counted=problem.counted,
        smoothing=float(problem.label_smoothing), a=float(problem.a), b=float(problem.b),
        state=state, values=values, loss=loss, width=width, rows=rows, columns=problem.vocab_size,
        WANT=want, DIVERGENCE=device_function.evaluate, OUTER=device_function.outer,
        CONSTANT=constant, LANES=plan.lanes, num_warps=plan.warps, enable_fp_fusion=True,
    )  # fmt: skip
    with torch.cuda.device_of(student):
        if plan.kind == "resident":
            parts, piece, stored = layout(
                plan, width, min(operands["ALIGN"], 16 // itemsize), itemsize
            )
            resident[(triton.cdiv(rows, plan.lanes),)](
                FIRST=first, temperature=temperature, PARTS=parts, PIECE=piece, STORED=stored,
                num_ctas=plan.blocks, **arguments,
            )  # fmt: skip
        else:
            scratch, phases = None, [(first, P.GRADIENT)]
            block = plan.lanes * plan.vector
            begins = beginnings(operands, plan.vector)
            reach = problem.vocab_size + (plan.vector - 1 if begins["SHIFTED"] else 0)
            span = triton.cdiv(triton.cdiv(reach, plan.splits), block) * block
            if plan.splits > 1 and first.value == P.STATISTICS.value:
                shape = (rows, P.FIELDS.value, plan.splits)
                scratch = torch.empty(shape, dtype=torch.float32, device=device)
                kinds = [P.STATISTICS, P.SUMS, P.REFINEMENT, P.GRADIENT]
                if not want & R.REST.value:
                    kinds.remove(P.REFINEMENT)
                phases = [(phase, phase) for phase in kinds]
            shifted, everywhere = begins["SHIFTED"], 3 if gradient is None else 7
            plain = lean and shifted in (0, everywhere)
            caps = {} if once else registers(device, problem.divergence, shifted > 0, plain)
            for begin, end in phases:
                sweep[(rows, plan.splits)](
                    FIRST=begin, LAST=end, SPLITS=plan.splits, VECTOR=plan.vector,
                    scratch=scratch, span=span, temperature=temperature,
                    **arguments | begins | caps,
                )  # fmt: skip
    return None if temperature is None else _heat(problem, temperature)


def _heat(problem: Problem, pieces: Tensor) -> Tensor:
    """The gradient of T from those of T * width, where the logits are standardised."""
    heat = pieces.sum(1)
    return heat if problem.moments is None else heat * problem.moments[0, WIDTH]
