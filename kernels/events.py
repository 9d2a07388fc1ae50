"""Loss and gradient beside a teacher that lists some columns: what launches `listed.py`."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.divergences import Divergence
from fastkd.divergences.base import LOG_MIXTURE
from fastkd.kernels import phases as P
from fastkd.kernels.arguments import Outputs, Pieces, varying
from fastkd.kernels.launch import (
    extent_of,
    formula_of,
    laid_out,
    new_gradient,
    new_rows,
    of_rows,
    rows_in_memory,
    wanted,
)
from fastkd.kernels.listed import BITS, List, listed
from fastkd.kernels.pieces import STATISTICS_FIELDS
from fastkd.kernels.tuning import power_of_two, schedule
from fastkd.problem import Coefficients, Problem
from fastkd.sharding import Forward

MOST = 2048  # events of a tile
LINE = 32  # words of a cache line: no other program's marks lie on it


def serves(problem: Problem) -> bool:
    """Whether the kernel has the problem: else `fastkd.events` has it, on any device.

    The sum over listed entries alone is the textbook's, of which divergences by way of a power
    mixture keep no terms.
    """
    kind, teacher = Divergence.of_name(problem.divergence), problem.teacher
    whole = teacher.rest is not None or kind.constant != LOG_MIXTURE
    return (
        kind.has_device_function and whole and not problem.merge
        and teacher.indices.size(1) < MOST
    )  # fmt: skip


def phases(problem: Problem, entropy: bool, metrics: bool) -> Forward:
    """(values, state) of `problem.py`."""
    yield from ()  # an owner of all columns gathers nothing
    kinds = problem.kinds(entropy, metrics)
    values, state = new_rows(problem, kinds), new_rows(problem, problem.state_rows(kinds))
    _launch(problem, P.STATISTICS, entropy, metrics, outputs=Outputs(values, state))
    return values, state


def backward(
    problem: Problem, state: Tensor, upstream: Coefficients, gradient: bool, temperature: bool
) -> tuple[Tensor | None, Tensor | None]:
    grad, temperature_grad = new_gradient(problem) if gradient else None, None
    if gradient or temperature:
        temperature_grad = _launch(
            problem, P.GRADIENT, upstream.entropy is not None, False, upstream, grad,
            Outputs(state=state), temperature,
        )  # fmt: skip
    return grad, temperature_grad


def fused(
    problem: Problem, coefficients: Coefficients, metrics: bool, out: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(loss rows [N], values or None, gradient of their sum); out may be the student's logits."""
    gradient = new_gradient(problem) if out is None else out
    coefficients = coefficients.rows(problem)
    loss, values = new_rows(problem, 1)[0], new_rows(problem, 5) if metrics else None
    _launch(
        problem, P.STATISTICS, coefficients.entropy is not None, metrics, coefficients, gradient,
        Outputs(values, loss=loss),
    )  # fmt: skip
    return loss, values, gradient


def _launch(
    problem: Problem, first: tl.constexpr, entropy: bool, metrics: bool,
    factors: Coefficients | None = None, gradient: Tensor | None = None,
    outputs: Outputs | None = None, temperature_grad: bool = False,
) -> Tensor | None:  # fmt: skip
    """The phases from `first` on; the temperatures' gradient where that is wanted."""
    student, rows, width = problem.student, problem.rows, problem.student.size(-1)
    once = first.value == P.GRADIENT.value
    plan = schedule(rows, width, student.element_size(), student.device, once=once, swept=True)
    # Zero for the rows that the kernel skips.
    temperature = (
        student.new_zeros(rows, plan.splits, dtype=torch.float32) if temperature_grad else None
    )
    if rows == 0:
        return None if temperature is None else temperature.sum(1)
    operands = rows_in_memory(student, None, gradient, vector=plan.vector)
    extent, tile = laid_out(extent_of(problem, operands), operands, plan, plan.splits)
    count = problem.teacher.indices.size(1)
    assert outputs is not None
    arguments: dict[str, Any] = dict(
        student=operands.student, gradient=operands.gradient,
        teacher=_list(problem, extent.span * plan.splits, plan.splits > 1 and not once),
        extent=extent, divergence=formula_of(problem),
        **of_rows(problem._replace(teacher_temperature=None), factors),
        outputs=outputs._replace(temperature=temperature), WANT=wanted(problem, entropy, metrics),
        EVENTS=power_of_two(count + 1),
        TILE=tile,
        num_warps=plan.warps, enable_fp_fusion=True,
    )  # fmt: skip
    grid = rows, plan.splits
    with torch.cuda.device_of(student):
        if once or plan.splits == 1:
            listed[grid](pieces=Pieces(), FIRST=first, LAST=P.GRADIENT, **arguments)
        else:
            shape = plan.splits, STATISTICS_FIELDS.value, rows
            statistics = student.new_empty(shape, dtype=torch.float32)
            pieces = Pieces(statistics, None)
            listed[grid](pieces=pieces, FIRST=P.STATISTICS, LAST=P.STATISTICS, **arguments)
            listed[grid](pieces=pieces, FIRST=P.GRADIENT, LAST=P.GRADIENT, **arguments)
    return None if temperature is None else temperature.sum(1)


def _list(problem: Problem, positions: int, apart: bool) -> List:
    """apart: what is listed is read by one launch and needed by another."""
    indices, log_probs, rest = problem.teacher
    rows, count = indices.shape
    words = triton.cdiv(positions, BITS.value * LINE) * LINE
    marks = torch.empty((rows, words), dtype=torch.int32, device=indices.device)
    logits = torch.empty((rows, count), dtype=torch.float32, device=indices.device)
    return List(
        indices.contiguous(), log_probs.double().contiguous(),
        None if rest is None else rest.double().contiguous(), varying(count), marks,
        varying(words), logits if apart else None,
        0.0 if rest is not None else _tilt(problem.divergence, problem.a, problem.b),
    )  # fmt: skip


@functools.lru_cache(maxsize=64)
def _tilt(name: str, a: float, b: float) -> float:
    """f'(1) of the textbook's sum q f(p / q), which the kernels' terms do without: of table 1."""
    one = torch.zeros(1, 1, dtype=torch.float64, device="cpu")

    def value(lq: Tensor) -> Tensor:
        return Divergence.of_name(name).of_rows(one, lq, a, b).sum()

    return -torch.func.grad(value)(one).item()
