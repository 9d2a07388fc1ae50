"""The PyTorch backend of rows of a softmax: no [N, V] temporaries beside the gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.divergences import FATHOM, LN2
from fastkd.problem import WIDTH, Coefficients, Problem
from fastkd.sharding import Phases

from .blocks import Rows, blank, new_gradient, new_values, place_of
from .solver import Solver, Terms, of_rows, shared


def phases(problem: Problem, entropy: bool, metrics: bool) -> Phases[tuple[Tensor, Tensor]]:
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
    target = None if out is None else out[..., : problem.vocab_size]
    heat = upstream.kd.new_zeros(problem.rows) if temperature else None
    solver = Solver(problem, upstream.entropy is not None, False, gradient=True)
    weights = weights_of(upstream, solver.scales[0])
    for rows, terms in solver:
        write_gradient(problem, rows, terms, weights, target, heat)
    return out, heat


def fused(
    problem: Problem, coefficients: Coefficients, metrics: bool, out: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Weighted loss rows, `values` with metrics, and the gradient of the sum of those rows."""
    inplace = out is not None
    out = new_gradient(problem) if out is None else out.view(problem.student.shape)
    target = out[..., : problem.vocab_size]
    alone = (coefficients.ce is None or problem.teacher is None) and coefficients.entropy is None
    room = target if alone and not inplace else None
    entropy = coefficients.entropy is not None
    values = new_values(problem, problem.kinds(entropy, metrics))
    kept = values.unbind()
    solver = Solver(problem, entropy, metrics, True, room, inplace)
    weights = weights_of(coefficients, solver.scales[0])
    for rows, terms in solver:
        _store(kept, rows, terms)
        write_gradient(problem, rows, terms, weights, target, None)
    if inplace:
        blank(problem, out)
    return coefficients.weigh(values), values if metrics else None, out


def scale_(gradient: Tensor, upstream: Tensor) -> None:
    """Multiplies in place, and touches nothing where the factor is seen to be 1."""
    if not upstream.is_cpu or upstream.item() != 1:
        gradient.mul_(upstream)


# --- the gradient of a block -----------------------------------------------------------------


def weights_of(upstream: Coefficients, scale: float | Tensor) -> Coefficients:
    """For the gradient by logits: [N, 1], or 0-d where all rows share it; scale: the student's."""
    kd, ce, entropy = (
        rows if rows is None else rows[0] if shared(rows) else rows[:, None] for rows in upstream
    )
    assert kd is not None
    return Coefficients(kd * scale, ce, None if entropy is None else entropy * scale)


def write_gradient(
    problem: Problem,
    rows: Rows,
    terms: Terms,
    weights: Coefficients,
    out: Tensor | None,
    temperature: Tensor | None,
) -> None:
    """Writes the block's gradient to the student's logits [O, I, V], and to its temperature."""
    place = None
    if out is not None and terms.counts is None:
        place = place_of(out, rows, terms.pair.student.terms.dtype)
    gradient = terms.pair.new() if place is None else place
    tempered = terms.pull is not None or weights.entropy is not None
    if tempered:
        _tempered_gradient(rows, terms, weights, gradient)
    if tempered and (temperature is not None or problem.moments is not None):
        heat = _heat(gradient, terms) if terms.tempering is None else _weighed(terms, weights, rows)
        degrees = problem.student_temperature[rows.flat, None]
        moments = None if problem.moments is None else problem.moments[0, :, rows.flat, None]
        if temperature is not None:
            slope = -heat if moments is None else -heat * moments[WIDTH]
            temperature[rows.flat] = slope[:, 0].to(temperature.dtype)
        if moments is not None:
            _add_pull(gradient, heat, moments, degrees, terms)
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
    pair, pull, q = terms.pair, terms.pull, terms.pair.student
    if pull is None:
        gradient.zero_()
    else:
        weight = of_rows(weights.kd, rows)
        torch.mul(q.terms, weight * pull.total / q.mass, out=gradient)
        gradient.addcmul_(pull.terms, weight * pull.factor, value=-1)
    if weights.entropy is not None:
        lq_plus_entropy = LN2 * (q.depth - pair.mean_depth(q))
        weight = of_rows(weights.entropy, rows) / q.mass
        gradient.addcmul_(lq_plus_entropy.mul_(q.terms), weight, value=-1)


def _heat(gradient: Tensor, terms: Terms) -> Tensor:
    """Minus the derivative to T, over the width where the logits are standardised, [R, 1]."""
    depths, new = terms.pair.student.depth, terms.pair.new
    # The gradient's rows sum to 0: measuring the logits from their maximum changes nothing.
    depth = torch.mul(depths, gradient, out=new()).masked_fill_(depths <= FATHOM, 0.0)
    heat = LN2 * depth.sum(-1, keepdim=True)
    return heat if terms.counts is None else torch.where(terms.counts, heat, 0.0)


def _weighed(terms: Terms, weights: Coefficients, rows: Rows) -> Tensor:
    assert terms.tempering is not None
    kd, entropy = terms.tempering
    heat = of_rows(weights.kd, rows) * kd
    return heat if weights.entropy is None else heat + of_rows(weights.entropy, rows) * entropy


def _add_pull(
    gradient: Tensor, heat: Tensor, moments: Tensor, temperature: Tensor, terms: Terms
) -> None:
    """What goes through the width of standardised logits; with the rows' moments and T."""
    side, scale = terms.pair.student, terms.pair.student_scale
    (mean, _, pull), dtype = moments, gradient.dtype
    centred = torch.mul(side.depth, LN2 / scale, out=terms.pair.new())
    centred.add_((side.top - mean).to(dtype)).masked_fill_(side.depth <= FATHOM, 0.0)
    gradient.addcmul_(centred.mul_(pull.to(dtype)), (-heat * temperature).to(dtype))


def _cross_entropy_gradient(
    gradient: Tensor, problem: Problem, rows: Rows, terms: Terms, weights: Tensor, add: bool
) -> None:
    """Adds it, or writes it."""
    assert terms.unit is not None
    assert problem.labels is not None
    weight, smoothing = of_rows(weights, rows).to(gradient.dtype), problem.label_smoothing
    size = (weight / terms.unit.mass).to(gradient.dtype)
    if add:
        gradient.addcmul_(terms.unit.terms, size)
    else:
        torch.mul(terms.unit.terms, size, out=gradient)
    at_labels = ((smoothing - 1) * weight).expand(len(gradient), 1)
    terms.pair.add_at_labels(gradient, at_labels[:, 0])
    if smoothing:
        gradient.sub_(weight * (smoothing / problem.columns))


def _store(values: Sequence[Tensor], rows: Rows, terms: Terms) -> None:
    for kind, value in terms.values.items():
        if kind < len(values):
            values[kind][rows.flat] = value.to(values[kind].dtype)
