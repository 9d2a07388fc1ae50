"""The PyTorch path: blocks of rows that fit the cache, closed-form gradients, no [N, V] temporaries."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .divergences import LOG_MIXTURE, Divergence, log_escort, plogr
from .problem import (
    AGREEMENT,
    CE,
    ENTROPY,
    KD,
    TEACHER_ENTROPY,
    Coefficients,
    Problem,
)

# Elements of a block: its few buffers then fit the cores' caches, and a call's overhead is small.
BLOCK_ELEMENTS = 1 << 17


def forward(problem: Problem, entropy: bool, metrics: bool) -> tuple[Tensor, Tensor]:
    """`values`, and an empty `state`: the backward recomputes from the logits."""
    values = _new_values(problem, 5 if metrics else 3 if entropy or problem.labels is not None else 1)
    for rows in _blocks(problem):
        _store(values, rows, _terms(problem, rows, entropy, metrics))
    return values, values.new_empty(0, problem.rows)


def backward(
    problem: Problem, state: Tensor, upstream: Coefficients, gradient: bool, temperature: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradient of the student's logits, in their dtype, and of each row's temperature."""
    out = torch.empty_like(problem.student, memory_format=torch.contiguous_format)
    heat = upstream.kd.new_empty(problem.rows) if temperature else None
    for rows in _blocks(problem):
        terms = _terms(problem, rows, upstream.entropy is not None, False)
        _gradient(problem, rows, terms, upstream, out if gradient else None, heat)
    return out if gradient else None, heat


def fused(
    problem: Problem, coefficients: Coefficients, metrics: bool, out: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Weighted loss rows, `values` with metrics, and the gradient of the sum of those rows."""
    if out is None:
        out = torch.empty_like(problem.student, memory_format=torch.contiguous_format)
    values = _new_values(problem, 5) if metrics else None
    loss = coefficients.kd.new_empty(problem.rows)
    for rows in _blocks(problem):
        terms = _terms(problem, rows, coefficients.entropy is not None, metrics)
        if values is not None:
            _store(values, rows, terms)
        loss[rows.index] = sum(
            _weighted(factor[rows.index], term)
            for factor, term in zip(coefficients, terms.values[:3], strict=True)
            if factor is not None
        )
        _gradient(problem, rows, terms, coefficients, out, None)
    return loss, values, out


def scale_(gradient: Tensor, upstream: Tensor) -> None:
    """Multiplies in place, and touches nothing where the factor is seen to be 1."""
    if not upstream.is_cpu or upstream != 1:
        gradient.mul_(upstream)


# --- one block ------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """Rows [start, stop) of outer index `outer`; `index` is their place in [N]."""

    outer: int
    start: int
    stop: int
    index: slice


class _Terms(NamedTuple):
    """What a block has to offer: [R] values in the order of problem.py, and [R, V] pieces."""

    values: list[Tensor | None]
    z: Tensor  # raw logits of the student
    z_max: Tensor  # [R, 1]
    q: Tensor
    lq: Tensor
    slope: Tensor  # gradient of the divergence to the tempered logits
    counts: Tensor | None  # [R, 1], bool; None: every row counts


def _blocks(problem: Problem) -> Iterator[_Rows]:
    outer_rows, inner_rows = problem.student.shape[:2]
    step = max(torch.get_num_threads(), BLOCK_ELEMENTS // problem.vocab_size)
    for outer in range(outer_rows):
        for start in range(0, inner_rows, step):
            stop = min(start + step, inner_rows)
            first = outer * inner_rows
            yield _Rows(outer, start, stop, slice(first + start, first + stop))


def _terms(problem: Problem, rows: _Rows, entropy: bool, metrics: bool) -> _Terms:
    z, y = _logits(problem.student, problem, rows), _logits(problem.teacher, problem, rows)
    z_max, y_max = z.amax(-1, keepdim=True), y.amax(-1, keepdim=True)
    counts = _counts(problem, rows, z_max, y_max)
    if counts is not None:
        z, y = torch.where(counts, z, 0.0), torch.where(counts, y, 0.0)
        z_max, y_max = torch.where(counts, z_max, 0.0), torch.where(counts, y_max, 0.0)

    student_scale = 1 / problem.student_temperature[rows.index, None]
    shared = problem.teacher_temperature is None
    teacher_scale = (
        student_scale if shared else 1 / problem.teacher_temperature[rows.index, None]
    )
    q, lq, q_sum = _softmax(z, z_max, student_scale)
    p, lp, p_sum = _softmax(y, y_max, teacher_scale)

    # d = lp - lq, with the normalisers differenced apart: no cancellation where p is close to q.
    gap = y_max * teacher_scale - z_max * student_scale + torch.log1p((p_sum - q_sum) / q_sum)
    d = (y - z) * teacher_scale if shared else y * teacher_scale - z * student_scale
    d -= gap
    if not math.isfinite(d.sum()):
        d = torch.where(d.isnan(), 0.0, d)  # both sides mask the entry
    kd, slope = _divergence(problem, lp, lq, p, q, d)

    values: list[Tensor | None] = [kd, None, None, None, None]
    if problem.labels is not None:
        values[CE] = _cross_entropy(problem, rows, z, z_max, counts)
    if entropy or metrics:
        values[ENTROPY] = -plogr(lq, lq).sum(-1)
    if metrics:
        values[TEACHER_ENTROPY] = -plogr(lp, lp).sum(-1)
        values[AGREEMENT] = ((z == z_max) & (y == y_max)).any(-1).to(z.dtype)
    if counts is not None:
        values = [v if v is None else torch.where(counts[:, 0], v, 0.0) for v in values]
    return _Terms(values, z, z_max, q, lq, slope, counts)


def _logits(tensor: Tensor, problem: Problem, rows: _Rows) -> Tensor:
    return tensor[rows.outer, rows.start : rows.stop, : problem.vocab_size].to(problem.dtype)


def _counts(problem: Problem, rows: _Rows, z_max: Tensor, y_max: Tensor) -> Tensor | None:
    """Rows that are counted and have a logit on either side; None where all do."""
    counts = (z_max != -torch.inf) & (y_max != -torch.inf)
    if problem.counted is not None:
        counts &= problem.counted[rows.index, None]
    return None if counts.all() else counts


def _softmax(x: Tensor, x_max: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities, their logs, and the sum of exp((x - max) * scale)."""
    log = (x - x_max).mul_(scale)
    probabilities = log.exp()
    total = probabilities.sum(-1, keepdim=True)
    return probabilities.div_(total), log.sub_(total.log()), total


def _divergence(
    problem: Problem, lp: Tensor, lq: Tensor, p: Tensor, q: Tensor, d: Tensor
) -> tuple[Tensor, Tensor]:
    """Value of each row, and its gradient to the tempered logits."""
    table, a, b = Divergence.of_name(problem.divergence), problem.a, problem.b
    c = q.new_zeros(q.size(0), 1)
    if table.constant == LOG_MIXTURE:
        c = torch.logsumexp(log_escort(lp, lq, a), -1, keepdim=True)
    value, slope = table.value_and_slope(lp, lq, p, q, d, c, a, b)
    # Whatever c is for, taking it as 0 and centring gives the same, and rows that sum to 0.
    total = slope.sum(-1, keepdim=True)
    slope = slope.addcmul_(q, total, value=-1)
    if not math.isfinite(total.sum()):  # the divergence is infinite there and has no gradient
        slope = torch.where(total.isfinite(), slope, 0.0)
    return table.stable_outer(value.sum(-1), c[:, 0], a, b), slope


def _cross_entropy(
    problem: Problem, rows: _Rows, z: Tensor, z_max: Tensor, counts: Tensor | None
) -> Tensor:
    labels = problem.labels[rows.index, None]
    if counts is not None:
        labels = torch.where(counts, labels, 0)
    smoothing = problem.label_smoothing
    lse = torch.logsumexp(z, -1)
    loss = lse - (1 - smoothing) * z.gather(-1, labels)[:, 0]
    return loss - smoothing * z.mean(-1) if smoothing else loss


# --- its gradient -----------------------------------------------------------------------------


def _gradient(
    problem: Problem,
    rows: _Rows,
    terms: _Terms,
    upstream: Coefficients,
    out: Tensor | None,
    temperature: Tensor | None,
) -> None:
    """Writes the block's gradient to the student's logits, and to its temperature."""
    scale = 1 / problem.student_temperature[rows.index, None]
    gradient = _weighted((upstream.kd[rows.index, None] * scale), terms.slope)
    if upstream.entropy is not None:
        entropy = terms.values[ENTROPY][:, None]
        gradient -= upstream.entropy[rows.index, None] * scale * plogr(terms.lq, terms.lq + entropy)
    if temperature is not None:
        # The gradient's rows sum to 0: measuring the logits from their maximum changes nothing.
        depth = torch.where(terms.z == -torch.inf, 0.0, terms.z - terms.z_max)
        heat = torch.linalg.vecdot(gradient, depth) * -scale[:, 0]
        temperature[rows.index] = heat if terms.counts is None else heat * terms.counts[:, 0]
    if out is None:
        return
    if upstream.ce is not None:
        gradient += upstream.ce[rows.index, None] * _cross_entropy_gradient(problem, rows, terms)
    if terms.counts is not None:
        gradient = torch.where(terms.counts, gradient, 0.0)
    target = out[rows.outer, rows.start : rows.stop]
    target[:, : problem.vocab_size] = gradient
    target[:, problem.vocab_size :] = 0


def _cross_entropy_gradient(problem: Problem, rows: _Rows, terms: _Terms) -> Tensor:
    labels = problem.labels[rows.index, None]
    if terms.counts is not None:
        labels = torch.where(terms.counts, labels, 0)
    smoothing = problem.label_smoothing
    gradient = torch.softmax(terms.z, -1).sub_(smoothing / problem.vocab_size)
    return gradient.scatter_add_(-1, labels, gradient.new_full(labels.shape, smoothing - 1))


def _weighted(factor: Tensor, term: Tensor) -> Tensor:
    """factor * term, and 0 where the factor is 0, whatever the term."""
    if factor.all():
        return factor * term
    return torch.where(factor == 0, 0.0, factor * term)


def _new_values(problem: Problem, kinds: int) -> Tensor:
    return problem.student.new_zeros(kinds, problem.rows, dtype=problem.dtype)


def _store(values: Tensor, rows: _Rows, terms: _Terms) -> None:
    for stored, value in zip(values, terms.values[: len(values)], strict=True):
        if value is not None:
            stored[rows.index] = value


