"""The PyTorch path: blocks of rows in the cache, closed-form gradients, no [N, V] temporaries.

Its formulas are plain ones in fp32. The rows where these lose digits, because the divergence is
small, or fail, because of a mask, show by their value, and are done again in fp64.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .blocks import Rows, Store, Waiting, blocks, largest
from .divergences import LN2, Divergence, Pair, Pull, Softmax
from .problem import (
    AGREEMENT,
    CE,
    ENTROPY,
    KD,
    TEACHER_ENTROPY,
    Coefficients,
    Problem,
)

# From here on a value is infinite: the largest of fp32. What stands for -inf is far beyond.
FAR = torch.finfo(torch.float32).max
MASKED = -1e300
FATHOM = -1e30  # the depth of a masked entry is below it, in fp32 too
# In fp64, a row of two equal sides is below the first, and what is below the second has no digits.
SAME, ROUNDING = 1e-12, 1e-15


def forward(problem: Problem, entropy: bool, metrics: bool) -> tuple[Tensor, Tensor]:
    """`values`, and an empty `state`: the backward recomputes from the logits."""
    kinds = 5 if metrics else 3 if entropy or problem.labels is not None else 1
    values = _new_values(problem, kinds)
    for rows, terms in _Solver(problem, entropy, metrics):
        _store(values, rows, terms)
    return values, values.new_empty(0, problem.rows)


def backward(
    problem: Problem, state: Tensor, upstream: Coefficients, gradient: bool, temperature: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradient of the student's logits, in their dtype, and of each row's temperature."""
    out = _new_gradient(problem) if gradient else None
    heat = upstream.kd.new_zeros(problem.rows) if temperature else None
    for rows, terms in _Solver(problem, upstream.entropy is not None, False):
        _gradient(problem, rows, terms, upstream, out, heat)
    return out, heat


def fused(
    problem: Problem, coefficients: Coefficients, metrics: bool, out: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Weighted loss rows, `values` with metrics, and the gradient of the sum of those rows."""
    target = _new_gradient(problem) if out is None else out.view(problem.student.shape)
    alone = out is None and coefficients.ce is None and coefficients.entropy is None
    values = _new_values(problem, 5 if metrics else 3)
    for rows, terms in _Solver(
        problem, coefficients.entropy is not None, metrics, target if alone else None
    ):
        _store(values, rows, terms)
        _gradient(problem, rows, terms, coefficients, target, None)
    if out is not None:
        _blank(problem, target)
    loss = torch.zeros_like(coefficients.kd)
    for factor, term in zip(coefficients, values[:3], strict=True):
        if factor is not None:  # where it is 0, the term is left out, were it infinite
            loss += torch.where(factor == 0, 0.0, factor * term)
    return loss, values if metrics else None, target


def scale_(gradient: Tensor, upstream: Tensor) -> None:
    """Multiplies in place, and touches nothing where the factor is seen to be 1."""
    if not upstream.is_cpu or upstream != 1:
        gradient.mul_(upstream)


# --- one block ------------------------------------------------------------------------------


class _Terms(NamedTuple):
    """What a block has to offer: [R] values by their names in problem.py, and [R, V] pieces."""

    values: dict[int, Tensor]
    pair: Pair
    pull: Pull
    unit: Softmax | None  # the student's at temperature 1; None: no cross-entropy
    counts: Tensor | None  # [R, 1], bool: rows with a logit on either side; None: all


class _Solver:
    """The terms of all rows that count, block by block; of rows given twice, the second hold.

    `room` [O, I, V] is where the student's terms may be written: the place of the gradient.
    """

    def __init__(
        self, problem: Problem, entropy: bool, metrics: bool, room: Tensor | None = None
    ) -> None:
        self.problem, self.entropy, self.metrics, self.room = problem, entropy, metrics, room
        self.kind = Divergence.of_name(problem.divergence)
        self.scales = [_scale(problem.student_temperature)]  # the last is the teacher's
        if problem.teacher_temperature is not None:
            self.scales.append(_scale(problem.teacher_temperature))
        self.store, self.exact_store = (
            Store(problem, dtype) for dtype in (problem.dtype, torch.float64)
        )
        self.waiting = Waiting(-(-largest(problem) // 2))  # fp64 takes twice the memory

    def __iter__(self) -> Iterator[tuple[Rows, _Terms]]:
        double = self.problem.dtype == torch.float64
        exact = double  # where most rows of a block need fp64, the next begins with it
        for rows in blocks(self.problem):
            if not exact:
                self.store.start(rows.size)
                terms = self.terms(rows, self.logits(rows), self.store)
                doubtful = _doubtful(terms, self.kind.near)
                if doubtful is None:
                    yield rows, terms
                    continue
                if not _most(doubtful):
                    # Before the terms are handed out: the gradient may go to where the logits are.
                    yield from self.wait(rows.only(doubtful))
                    yield rows, terms
                    continue
            exact = double
            for half in rows.parts(self.waiting.capacity):
                terms = self.exact_terms(half, self.logits(half))
                yield half, terms
                exact = exact or _most(_doubtful(terms, self.kind.near))
        yield from self.waited()

    def wait(self, rows: Rows) -> Iterator[tuple[Rows, _Terms]]:
        if not self.waiting.takes(rows):
            yield from self.waited()
        self.waiting.add(rows, self.logits(rows))

    def waited(self) -> Iterator[tuple[Rows, _Terms]]:
        if self.waiting.size:
            rows, logits = self.waiting.take()
            yield rows, self.exact_terms(rows, logits)

    def logits(self, rows: Rows) -> list[Tensor]:
        problem = self.problem
        return [
            logits[rows.outer, rows.inner, : problem.vocab_size]
            for logits in (problem.student, problem.teacher)
        ]

    def terms(self, rows: Rows, logits: Iterable[Tensor], store: Store) -> _Terms:
        problem = self.problem
        z, y = (x if x.dtype == store.dtype else store.new().copy_(x) for x in logits)
        scales = [s[rows.flat] if isinstance(s, Tensor) else s for s in self.scales]
        room = None if self.room is None else _place(problem, self.room, rows, store.dtype)
        pair = Pair(z, y, scales[0], scales[-1], store.new, room)
        value, pull = self.kind.value_and_pull(pair, problem.a, problem.b)

        values, unit = {KD: value[:, 0]}, None
        if problem.labels is not None:
            at_one = isinstance(scales[0], float) and scales[0] == 1
            unit = pair.student if at_one else Softmax.of(z, 1.0, store.new(), store.new())
            values[CE] = _cross_entropy(unit, problem.labels[rows.flat], problem.label_smoothing)
        if self.entropy or self.metrics:
            values[ENTROPY] = _entropy(pair.student, store.new())
        if self.metrics:
            values[TEACHER_ENTROPY] = _entropy(pair.teacher, store.new())
            agree = (z == z.amax(-1, keepdim=True)) & (y == y.amax(-1, keepdim=True))
            values[AGREEMENT] = agree.any(-1).to(z.dtype)
        return _Terms(values, pair, pull, unit, None)

    def exact_terms(self, rows: Rows, logits: list[Tensor]) -> _Terms:
        """The terms in fp64, with a number for -inf, which times 0 is 0; its traces are removed."""
        store = self.exact_store
        store.start(rows.size)
        numbers = [store.new().copy_(side).clamp_min_(MASKED) for side in logits]
        values, pair, pull, unit, _ = self.terms(rows, numbers, store)
        counts = ((pair.student.top != MASKED) & (pair.teacher.top != MASKED))[:, 0]
        values = {
            kind: torch.where(value > FAR, torch.inf, value).where(counts, 0.0)
            for kind, value in values.items()
        }
        dead = ~counts  # rows without gradient
        infinite = values[KD] == torch.inf
        if infinite.any():
            size = pull.terms.abs().amax(-1, keepdim=True) * pull.factor
            dead |= infinite & ~(size.abs() < FAR)[:, 0]
        if (values[KD] < SAME).any():
            dead |= (values[KD] < SAME) & (pair.climb().abs_().amax(-1) == 0)
            values[KD] = torch.where(values[KD] < ROUNDING, 0.0, values[KD])
        if dead.any():
            pull = _without(pull, dead[:, None])
        return _Terms(values, pair, pull, unit, None if counts.all() else counts[:, None])


def _without(pull: Pull, dead: Tensor) -> Pull:
    factor, total = (
        torch.where(dead, 0.0, part).to(pull.terms.dtype) for part in (pull.factor, pull.total)
    )
    return Pull(torch.where(dead, 0.0, pull.terms), factor, total)


def _scale(temperature: Tensor) -> float | Tensor:
    """1 / T: a number where all rows share it, which saves passes, else [N, 1]."""
    shared = temperature.stride(0) == 0 and len(temperature) > 0
    return 1 / temperature[0].item() if shared else 1 / temperature[:, None]


def _cross_entropy(unit: Softmax, labels: Tensor, smoothing: float) -> Tensor:
    loss = unit.log_mass - (1 - smoothing) * LN2 * unit.depth.gather(-1, labels[:, None])
    if smoothing:
        loss -= smoothing * LN2 * unit.depth.mean(-1, keepdim=True)
    return loss[:, 0]


def _entropy(side: Softmax, spare: Tensor) -> Tensor:
    return (side.log_mass - LN2 * _mean_depth(side, spare))[:, 0]


def _mean_depth(side: Softmax, spare: Tensor) -> Tensor:
    return torch.mul(side.terms, side.depth, out=spare).sum(-1, keepdim=True) / side.mass


def _doubtful(terms: _Terms, near: float) -> Tensor | None:
    """Rows whose divergence is small or infinite, or whose figures are not finite; None: no row."""
    check, total = terms.values[KD], terms.pull.total
    if isinstance(total, Tensor):
        check = check + 0 * total[:, 0]
    for kind in terms.values.keys() - {KD}:
        check = check + 0 * terms.values[kind]
    least, most = (bound.item() for bound in check.aminmax())
    if least > near and most < FAR:
        return None
    return ~((check > near) & (check < FAR))


def _most(doubtful: Tensor | None) -> bool:
    return doubtful is not None and bool(2 * doubtful.sum() > len(doubtful))


# --- its gradient -----------------------------------------------------------------------------


def _gradient(
    problem: Problem,
    rows: Rows,
    terms: _Terms,
    upstream: Coefficients,
    out: Tensor | None,
    temperature: Tensor | None,
) -> None:
    """Writes the block's gradient to the student's logits, and to its temperature."""
    place = None
    if out is not None and terms.counts is None:
        place = _place(problem, out, rows, terms.pull.terms.dtype)
    gradient = _tempered_gradient(rows, terms, upstream, place)
    if temperature is not None or problem.moments is not None:
        heat = _heat(gradient, terms)
        if temperature is not None:
            temperature[rows.flat] = heat.to(temperature.dtype)
        if problem.moments is not None:
            _add_pull(gradient, heat, problem.moments[0], rows, terms)
    if upstream.ce is not None:
        _add_cross_entropy_gradient(gradient, problem, rows, terms, upstream.ce)
    if terms.counts is not None:
        gradient = torch.where(terms.counts, gradient, 0.0)
    if out is not None and place is None:
        _write(gradient, out[rows.outer, :, : problem.vocab_size], rows.inner)


def _place(problem: Problem, out: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor | None:
    """Where the rows' gradient goes, if it can be computed there: a pass less."""
    if out.dtype != dtype or not isinstance(rows.inner, slice):
        return None
    return out[rows.outer, rows.inner, : problem.vocab_size]


def _write(gradient: Tensor, block: Tensor, rows: slice | Tensor) -> None:
    if isinstance(rows, slice):
        block[rows].copy_(gradient)
    else:
        block[rows] = gradient.to(block.dtype)


def _tempered_gradient(
    rows: Rows, terms: _Terms, upstream: Coefficients, out: Tensor | None
) -> Tensor:
    """Of divergence and entropy."""
    pair, pull, q = terms.pair, terms.pull, terms.pair.student
    weight = _factor(upstream.kd, rows, terms) * pair.student_scale
    gradient = torch.mul(
        q.terms, weight * pull.total / q.mass, out=pair.new() if out is None else out
    )
    gradient.addcmul_(pull.terms, weight * pull.factor, value=-1)
    if upstream.entropy is not None:
        weight = _factor(upstream.entropy, rows, terms) * pair.student_scale
        lq_plus_entropy = LN2 * (q.depth - _mean_depth(q, pair.new()))
        gradient.addcmul_(lq_plus_entropy.mul_(q.terms), weight / q.mass, value=-1)
    return gradient


def _heat(gradient: Tensor, terms: _Terms) -> Tensor:
    """The gradient of each row's temperature."""
    depths, new = terms.pair.student.depth, terms.pair.new
    # The gradient's rows sum to 0: measuring the logits from their maximum changes nothing.
    depth = torch.mul(depths, gradient, out=new()).masked_fill_(depths < FATHOM, 0.0)
    heat = LN2 * depth.sum(-1, keepdim=True)
    return -(heat if terms.counts is None else torch.where(terms.counts, heat, 0.0))[:, 0]


def _add_pull(gradient: Tensor, heat: Tensor, moments: Tensor, rows: Rows, terms: _Terms) -> None:
    """What goes through the width of standardised logits."""
    side, scale = terms.pair.student, terms.pair.student_scale
    mean, _, pull = moments[:, rows.flat, None].to(gradient.dtype)
    centred = torch.mul(side.depth, LN2 / scale, out=terms.pair.new()).add_(side.top - mean)
    centred.masked_fill_(side.depth < FATHOM, 0.0)
    gradient.addcmul_(centred, pull * heat[:, None] / scale)


def _add_cross_entropy_gradient(
    gradient: Tensor, problem: Problem, rows: Rows, terms: _Terms, upstream: Tensor
) -> None:
    assert terms.unit is not None
    assert problem.labels is not None
    weight, smoothing = _factor(upstream, rows, terms), problem.label_smoothing
    gradient.addcmul_(terms.unit.terms, weight / terms.unit.mass)
    gradient.scatter_add_(-1, problem.labels[rows.flat, None], (smoothing - 1) * weight)
    if smoothing:
        gradient.sub_(weight * (smoothing / problem.vocab_size))


def _factor(factor: Tensor, rows: Rows, terms: _Terms) -> Tensor:
    return factor[rows.flat, None].to(terms.pull.terms.dtype)


def _new_values(problem: Problem, kinds: int) -> Tensor:
    return problem.student.new_zeros(kinds, problem.rows, dtype=problem.dtype)


def _new_gradient(problem: Problem) -> Tensor:
    out = torch.empty_like(problem.student, memory_format=torch.contiguous_format)
    _blank(problem, out)
    return out


def _blank(problem: Problem, out: Tensor) -> None:
    """Sets to 0 what no block writes: the padding, and the rows that do not count."""
    out[..., problem.vocab_size :] = 0
    if problem.counted is not None and not problem.counted.all():
        out[~problem.counted.view(out.shape[:2])] = 0


def _store(values: Tensor, rows: Rows, terms: _Terms) -> None:
    for kind, value in terms.values.items():
        if kind < len(values):
            values[kind, rows.flat] = value.to(values.dtype)
