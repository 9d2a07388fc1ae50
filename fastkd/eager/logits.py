"""The PyTorch backend of rows of a softmax: no [N, V] temporaries beside the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.divergences.pair import LN2, MASKED_BELOW
from fastkd.problem import WIDTH, Coefficients, Problem, held_by
from fastkd.sharding import Forward

from .blocks import Rows, blank, new_gradient, new_values, of_rows, place_of, vocabulary
from .solver import Solver, Terms


def phases(problem: Problem, entropy: bool, metrics: bool) -> Forward:
    """`values`, and an empty `state`: the backward recomputes from the logits."""
    yield from ()  # an owner of all columns gathers nothing
    values = new_values(problem, problem.kinds(entropy, metrics))
    kept = values.unbind()
    for rows, terms in Solver(problem, entropy, metrics, gradient=False):
        _store(kept, rows, terms)
    return values, values.new_empty(0, problem.rows)


def backward(
    problem: Problem, state: Tensor, upstream: Coefficients, gradient: bool, temperature: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradient of the student's logits, in their dtype, and of each row's temperature."""
    out = new_gradient(problem) if gradient else None
    target = None if out is None else vocabulary(out, problem)
    temperature_grad = upstream.kd.new_zeros(problem.rows) if temperature else None
    solver = Solver(problem, upstream.entropy is not None, False, gradient=True)
    weights = weights_of(upstream, solver.plain.scales[0])
    for rows, terms in solver:
        write_gradient(problem, rows, terms, weights, target, temperature_grad)
    return out, temperature_grad


def fused(
    problem: Problem, coefficients: Coefficients, metrics: bool, out: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Weighted loss rows, `values` with metrics, and the gradient of the sum of those rows."""
    inplace = out is not None
    out = new_gradient(problem) if out is None else out.view(problem.student.shape)
    target = vocabulary(out, problem)
    entropy = coefficients.entropy is not None
    alone = (coefficients.ce is None or problem.teacher is None) and not entropy
    room = target if alone and not inplace else None
    values = new_values(problem, problem.kinds(entropy, metrics))
    kept = values.unbind()
    solver = Solver(problem, entropy, metrics, True, room, inplace)
    coefficients = coefficients.numbers()
    weights = weights_of(coefficients, solver.plain.scales[0])
    for rows, terms in solver:
        _store(kept, rows, terms)
        write_gradient(problem, rows, terms, weights, target, None)
    if inplace:
        blank(problem, out)
    return coefficients.weigh(kept), values if metrics else None, out


def scale_(gradient: Tensor, upstream: Tensor) -> None:
    """Multiplies in place, and touches nothing where the factor is seen to be 1."""
    if not upstream.is_cpu or upstream.item() != 1:
        gradient.mul_(upstream)


# --- the gradient of a block -----------------------------------------------------------------


def weights_of(upstream: Coefficients, scale: float | Tensor) -> Coefficients:
    """For the gradient by logits: [N, 1], or a number that all rows share; scale: the student's.

    kd is the number 0 where no row asks for the divergence's gradient.
    """
    kd, ce, entropy = (x[:, None] if isinstance(x, Tensor) else x for x in upstream.numbers())
    asked = kd.any() if isinstance(kd, Tensor) else kd
    return Coefficients(
        kd * scale if asked else 0.0, ce, None if entropy is None else entropy * scale
    )


def write_gradient(
    problem: Problem,
    rows: Rows,
    terms: Terms,
    weights: Coefficients,
    out: Tensor | None,
    temperature: Tensor | None,
) -> None:
    """Writes the block's gradient to the student's logits [O, I, V], and to its temperature."""
    if weights.of_no_divergence:
        terms = terms._replace(descent=None)
    place = terms.place
    if place is None and out is not None and terms.counts is None:
        place = place_of(out, rows, terms.pair.student.exp.dtype)
    gradient = terms.pair.new() if place is None else place
    tempered = terms.descent is not None or weights.entropy is not None
    if tempered:
        _tempered_gradient(rows, terms, weights, gradient)
    if tempered and (temperature is not None or problem.moments is not None):
        if terms.tempering is None:
            grad = _temperature_grad(gradient, terms)
        else:
            grad = _weighed(terms, weights, rows)
        degrees = problem.student_temperature[rows.flat, None]
        moments = None if problem.moments is None else problem.moments[0, :, rows.flat, None]
        if temperature is not None:
            found = grad if moments is None else grad * moments[WIDTH]
            temperature[rows.flat] = found[:, 0].to(temperature.dtype)
        if moments is not None:
            _add_through_width(gradient, grad, moments, degrees, terms)
    if not tempered and weights.ce is None:  # only figures are wanted
        gradient.zero_()
    if weights.ce is not None:
        _cross_entropy_gradient(gradient, problem, rows, terms, weights.ce, add=tempered)
    if terms.counts is not None:
        gradient = torch.where(terms.counts, gradient, 0.0)
    if out is not None and place is None:
        out[rows.outer, rows.inner] = gradient.to(out.dtype)


def _tempered_gradient(rows: Rows, terms: Terms, weights: Coefficients, gradient: Tensor) -> None:
    """Writes that of divergence and entropy."""
    pair, descent, q = terms.pair, terms.descent, terms.pair.student
    if descent is None:
        gradient.zero_()
    else:
        weight = of_rows(weights.kd, rows)
        torch.mul(q.exp, weight * descent.total / q.sum_exp, out=gradient)
        _subtract(gradient, descent.terms, weight, descent.factor)
    if weights.entropy is not None:
        lq_plus_entropy = LN2 * (q.log2_exp - pair.mean_log2_exp(q))
        weight = of_rows(weights.entropy, rows) / q.sum_exp
        gradient.addcmul_(lq_plus_entropy.mul_(q.exp), weight, value=-1)


def _subtract(rows: Tensor, terms: Tensor, weight: Any, factor: Any) -> None:
    """terms * weight * factor, each [R, 1] or a number; a number costs no operation."""
    if isinstance(weight, Tensor):
        weight, factor = 1.0, weight * factor
    if isinstance(factor, Tensor):
        rows.addcmul_(terms, factor, value=held_by(rows.dtype, -weight))
    else:
        rows.add_(terms, alpha=held_by(rows.dtype, -weight * factor))


def _temperature_grad(gradient: Tensor, terms: Terms) -> Tensor:
    """The derivative to T, over the width where the logits are standardised, [R, 1]."""
    log2_exps, new = terms.pair.student.log2_exp, terms.pair.new
    # The gradient's rows sum to 0: measuring the logits from their maximum changes nothing.
    log2_exp = torch.mul(log2_exps, gradient, out=new()).masked_fill_(
        log2_exps <= MASKED_BELOW, 0.0
    )
    grad = -LN2 * log2_exp.sum(-1, keepdim=True)
    return grad if terms.counts is None else torch.where(terms.counts, grad, 0.0)


def _weighed(terms: Terms, weights: Coefficients, rows: Rows) -> Tensor:
    assert terms.tempering is not None
    kd, entropy = (of_rows(weight, rows) for weight in (weights.kd, weights.entropy))
    return -Coefficients(kd, entropy, None).weigh(terms.tempering)


def _add_through_width(
    gradient: Tensor, grad: Tensor, moments: Tensor, temperature: Tensor, terms: Terms
) -> None:
    """What goes through the width of standardised logits; with the rows' moments and T."""
    side, scale = terms.pair.student, terms.pair.student_scale
    (mean, _, width_slope), dtype = moments, gradient.dtype
    centred = torch.mul(side.log2_exp, LN2 / scale, out=terms.pair.new())
    centred.add_((side.shift - mean).to(dtype)).masked_fill_(side.log2_exp <= MASKED_BELOW, 0.0)
    gradient.addcmul_(centred.mul_(width_slope.to(dtype)), (grad * temperature).to(dtype))


def _cross_entropy_gradient(
    gradient: Tensor, problem: Problem, rows: Rows, terms: Terms, weights: Any, add: bool
) -> None:
    """Adds it, or writes it."""
    assert terms.unit is not None
    assert problem.labels is not None
    weight, smoothing = of_rows(weights, rows), problem.label_smoothing
    size = (weight / terms.unit.sum_exp).to(gradient.dtype)
    if add:
        gradient.addcmul_(terms.unit.exp, size)
    else:
        torch.mul(terms.unit.exp, size, out=gradient)
    at_labels = gradient.new_full((len(gradient), 1), smoothing - 1).mul_(weight)
    terms.pair.add_at_labels(gradient, at_labels[:, 0])
    if smoothing:
        gradient.sub_(weight * (smoothing / problem.columns))


def _store(values: Sequence[Tensor], rows: Rows, terms: Terms) -> None:
    for kind, value in terms.values.items():
        if kind < len(values):
            values[kind][rows.flat] = value.to(values[kind].dtype)
