"""The PyTorch backend of multi-label heads: blocks of rows, closed forms, fp64 inside.

No entry depends on another: there are no row statistics, and `state` is empty. fp64 leaves the
plain formulas as many digits as fp32 logits hold; +-1e200 stands for an infinite logit, and times 0
is 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd import sharding
from fastkd.problem import AGREEMENT, CE, ENTROPY, KD, TEACHER_ENTROPY, Coefficients, Problem

from .blocks import Rows, blank, blocks, new_gradient, new_values
from .solver import FAR

BLOCK_ELEMENTS = 1 << 15  # in fp64, with some ten temporaries
CERTAIN = 1e200


def phases(problem: Problem, entropy: bool, metrics: bool) -> sharding.Forward:
    """`values`, and as `state` what the gradient needs of other owners' columns.

    A row is a sum over classes, and so is its derivative to T, which owners of some classes keep.
    """
    kinds = problem.kinds(entropy, metrics)
    shared = bool(problem.merge)
    dtype = torch.float64 if shared else problem.dtype
    slopes = 2 if shared and problem.temperature_trains else 0
    sums = problem.student.new_zeros(kinds + slopes, problem.rows, dtype=dtype)
    one = sums.new_ones(()).expand(problem.rows)
    for block in _blocks(problem):
        _store(sums[:kinds], problem, block)
        if slopes:
            _gradient(problem, block, Coefficients(one, None, None), None, sums[-2])
            if entropy:
                _gradient(problem, block, Coefficients(one * 0, None, one), None, sums[-1])
    if shared:
        sums = (yield sums).sum(0)
    return sums[:kinds].to(problem.dtype), sums[kinds:].clone()  # which an operator keeps apart


def backward(
    problem: Problem, state: Tensor, upstream: Coefficients, gradient: bool, temperature: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradient of the student's logits, in their dtype, and of each row's temperature."""
    out = new_gradient(problem) if gradient else None
    temperature_grad = upstream.kd.new_zeros(problem.rows) if temperature else None
    for block in _blocks(problem):
        _gradient(problem, block, upstream, out, None if len(state) else temperature_grad)
    if temperature_grad is not None and len(state):
        temperature_grad += Coefficients(upstream.kd, upstream.entropy, None).weigh(state)
    return out, temperature_grad


def fused(
    problem: Problem, coefficients: Coefficients, metrics: bool, out: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Weighted loss rows, `values` with metrics, and the gradient of the sum of those rows."""
    target = new_gradient(problem) if out is None else out.view(problem.student.shape)
    coefficients = coefficients.rows(problem)
    entropy = coefficients.entropy is not None
    values = new_values(problem, problem.kinds(entropy, metrics))
    if problem.merge:
        values, _ = sharding.run(problem.merge, phases(problem, entropy, metrics))
    for block in _blocks(problem):
        if not problem.merge:
            _store(values, problem, block)
        _gradient(problem, block, coefficients, target, None)
    if out is not None:
        blank(problem, target)
    return coefficients.weigh(values), values if metrics else None, target


class _Sigmoids:
    """Rows of one side in fp64, [R, V]."""

    def __init__(self, logit: Tensor) -> None:
        self.logit = logit

    @cached_property
    def yes(self) -> Tensor:
        return self.logit.sigmoid()

    @cached_property
    def log(self) -> Tensor:
        """log(1 + e^-|logit|)"""
        return self.logit.abs().neg_().exp_().log1p_()

    @cached_property
    def variance(self) -> Tensor:
        """The derivative of the sigmoid."""
        return self.yes * (-self.logit).sigmoid_()


class _Block(NamedTuple):
    rows: Rows
    raw: Tensor  # the student's logits, [R, V]
    rate: Tensor  # 1 / T of the student, [R, 1]
    student: _Sigmoids
    teacher: _Sigmoids


def _blocks(problem: Problem) -> Iterator[_Block]:
    step = max(1, BLOCK_ELEMENTS // max(problem.vocab_size, 1))
    student_rate = 1 / problem.student_temperature.double()[:, None]
    teacher_rate = student_rate
    if problem.teacher_temperature is not None:
        teacher_rate = 1 / problem.teacher_temperature.double()[:, None]
    for rows in blocks(problem.student, problem.counted, step):
        sides = [
            x[rows.outer, rows.inner, : problem.vocab_size].double().clamp(-CERTAIN, CERTAIN)
            for x in (problem.student, problem.teacher)
            if x is not None
        ]
        z, rate = sides[0], student_rate[rows.flat]
        student = teacher = _Sigmoids(z * rate)  # without a teacher, the divergence is 0
        if len(sides) > 1:
            teacher = _Sigmoids(sides[1].mul_(teacher_rate[rows.flat]))
        yield _Block(rows, z, rate, student, teacher)


# --- values and gradients of one --------------------------------------------------------------


def _store(values: Tensor, problem: Problem, block: _Block) -> None:
    student, teacher = block.student, block.teacher
    terms = {KD: torch.zeros_like(student.logit)}
    for weight, (p, q) in ((problem.a, (teacher, student)), (problem.b, (student, teacher))):
        if weight:
            terms[KD] += (_cross_entropy(q, p.yes) - _entropy(p)).clamp_(min=0).mul_(weight)
    if len(values) > 1:
        terms[ENTROPY] = _entropy(student)
        if problem.labels is not None:
            terms[CE] = _cross_entropy(_Sigmoids(block.raw), problem.labels[block.rows.flat])
    if len(values) > 3:
        terms[TEACHER_ENTROPY] = _entropy(teacher)
        agree = (student.logit > 0) == (teacher.logit > 0)
        terms[AGREEMENT] = agree.double() / problem.columns
    for kind, term in terms.items():
        total = term.sum(-1)
        total = torch.where(total > FAR, torch.inf, total)
        values[kind][block.rows.flat] = total.to(values.dtype)


def _cross_entropy(side: _Sigmoids, yes: Tensor) -> Tensor:
    """-yes log sigmoid(logit) - (1 - yes) log sigmoid(-logit)."""
    return side.logit.clamp(min=0).addcmul_(side.logit, yes.double(), value=-1).add_(side.log)


def _entropy(side: _Sigmoids) -> Tensor:
    return _cross_entropy(side, side.yes)


def _gradient(
    problem: Problem,
    block: _Block,
    upstream: Coefficients,
    out: Tensor | None,
    temperature_grad: Tensor | None,
) -> None:
    """Writes the block's gradient to the student's logits, and to its temperature."""
    kd = upstream.kd[block.rows.flat, None].double()
    ce, entropy = (None if x is None else x[block.rows.flat, None].double() for x in upstream[1:])
    student, teacher = block.student, block.teacher
    gradient = (student.yes - teacher.yes).mul_(problem.a)
    if problem.b:
        apart = student.logit - teacher.logit
        gradient += problem.b * student.variance * apart.masked_fill_(apart.abs() > FAR, 0.0)
    gradient.mul_(kd).masked_fill_(kd == 0, 0.0)  # were the teacher's logits NaN
    if entropy is not None:
        gradient -= entropy * student.variance * student.logit
    gradient *= block.rate
    if temperature_grad is not None:
        moved = torch.where(block.raw.abs() > FAR, 0.0, block.raw * gradient)
        slope = moved.sum(-1) * block.rate[:, 0]
        temperature_grad[block.rows.flat] = -slope.to(temperature_grad.dtype)
    if ce is not None:
        assert problem.labels is not None
        gradient += ce * (block.raw.sigmoid() - problem.labels[block.rows.flat].double())
    if out is not None:
        rows = block.rows
        out[rows.outer, rows.inner, : problem.vocab_size] = gradient.to(out.dtype)
