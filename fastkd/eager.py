"""The PyTorch path: blocks of rows in the cache, closed-form gradients, no [N, V] temporaries.

Its formulas are plain ones in fp32. The rows where these lose digits, because the divergence is
small, or fail, because of a mask, show by their value, and are done again in fp64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .divergences import NONE, Divergence, Pair
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
BLOCK_ELEMENTS = 1 << 18
# Rows with fewer columns than this are laid out in columns: few long passes, not many short ones.
NARROW = 16
# Smaller values than this are computed in fp64: in fp32 they are good to about 2e-7.
NEAR = 1 / 32
# From here on a value is infinite: the largest of fp32. What stands for -inf is far beyond.
FAR = torch.finfo(torch.float32).max
MASKED = -1e300


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
    values = _new_values(problem, 5 if metrics else 3)
    for rows, terms in _Solver(problem, coefficients.entropy is not None, metrics):
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


# --- the rows -------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """Some rows of outer index `outer`: their inner indices, and their indices in [N]."""

    outer: int
    inner: slice | Tensor
    flat: slice | Tensor

    def only(self, mask: Tensor) -> _Rows:
        inner, flat = (
            torch.arange(i.start, i.stop, device=mask.device) if isinstance(i, slice) else i
            for i in self[1:]
        )
        return _Rows(self.outer, inner[mask], flat[mask])


def _blocks(problem: Problem) -> Iterator[_Rows]:
    """The rows that count, in blocks."""
    outer_rows, inner_rows = problem.student.shape[:2]
    step = max(torch.get_num_threads(), BLOCK_ELEMENTS // problem.vocab_size)
    for outer in range(outer_rows):
        first = outer * inner_rows
        counted = None if problem.counted is None else problem.counted[first : first + inner_rows]
        if counted is None or counted.all():
            for start in range(0, inner_rows, step):
                stop = min(start + step, inner_rows)
                yield _Rows(outer, slice(start, stop), slice(first + start, first + stop))
        else:
            kept = counted.nonzero()[:, 0]
            for start in range(0, len(kept), step):
                inner = kept[start : start + step]
                yield _Rows(outer, inner, first + inner)


# --- one block ------------------------------------------------------------------------------


class _Terms(NamedTuple):
    """What a block has to offer: [R] values by their names in problem.py, and [R, V] pieces."""

    values: dict[int, Tensor]
    pair: Pair
    pull: Tensor  # minus the gradient of the divergence to lq
    total: Tensor | None  # its sum, [R, 1]; None: 1
    counts: Tensor | None  # [R, 1], bool: rows with a logit on either side; None: all


class _Store:
    """Buffers that are used again for every block."""

    def __init__(self, problem: Problem, dtype: torch.dtype) -> None:
        self.columns, self.empty = problem.vocab_size, problem.student.new_empty(0, dtype=dtype)
        self.buffers: list[Tensor] = []
        self.rows = self.taken = 0

    def start(self, rows: int) -> None:
        self.rows, self.taken = rows, 0

    def new(self) -> Tensor:
        if self.taken == len(self.buffers):
            self.buffers.append(self.empty.clone())
        buffer = self.buffers[self.taken]
        self.taken += 1
        if self.columns < NARROW:
            return buffer.resize_(self.columns, self.rows).t()
        return buffer.resize_(self.rows, self.columns)


class _Solver:
    """The terms of all rows that count, block by block; of rows given twice, the second hold."""

    def __init__(self, problem: Problem, entropy: bool, metrics: bool) -> None:
        self.problem, self.entropy, self.metrics = problem, entropy, metrics
        self.kind = Divergence.of_name(problem.divergence)
        self.scales = [_scale(problem.student_temperature)]  # the last is the teacher's
        if problem.teacher_temperature is not None:
            self.scales.append(_scale(problem.teacher_temperature))
        self.stores = {dtype: _Store(problem, dtype) for dtype in (problem.dtype, torch.float64)}

    def __iter__(self) -> Iterator[tuple[_Rows, _Terms]]:
        double = self.problem.dtype == torch.float64
        exact = double  # where most rows of a block need fp64, the next begins with it
        for rows in _blocks(self.problem):
            terms = self.exact_terms(rows) if exact else self.terms(rows, self.problem.dtype)
            doubtful = None if double else _doubtful(terms)
            most = doubtful is not None and bool(2 * doubtful.sum() > len(doubtful))
            if exact or doubtful is None:
                yield rows, terms
            elif most:
                yield rows, self.exact_terms(rows)
            else:
                again = rows.only(doubtful)
                # Before any is handed out: the gradient may go to where the logits are.
                corrected = self.exact_terms(again)
                yield rows, terms
                yield again, corrected
            exact = double or most

    def terms(self, rows: _Rows, dtype: torch.dtype) -> _Terms:
        problem, exact = self.problem, dtype == torch.float64
        store = self.stores[dtype]
        z, y = (
            logits[rows.outer, :, : problem.vocab_size][rows.inner]
            for logits in (problem.student, problem.teacher)
        )
        store.start(len(z))
        z, y = _converted(z, store, exact), _converted(y, store, exact)
        scales = [s[rows.flat] if isinstance(s, Tensor) else s for s in self.scales]
        pair = Pair(z, y, scales[0], scales[-1], store.new)
        value, pull = self.kind.value_and_pull(pair, problem.a, problem.b)
        total = None if self.kind.constant == NONE else pull.sum(-1, keepdim=True)

        values = {KD: value[:, 0]}
        if problem.labels is not None:
            values[CE] = _cross_entropy(z, problem.labels[rows.flat, None], problem.label_smoothing)
        if self.entropy or self.metrics:
            values[ENTROPY] = -torch.mul(pair.q, pair.lq, out=store.new()).sum(-1)
        if self.metrics:
            values[TEACHER_ENTROPY] = -torch.mul(pair.p, pair.lp, out=store.new()).sum(-1)
            agree = (z == pair.student_max) & (y == pair.teacher_max)
            values[AGREEMENT] = agree.any(-1).to(z.dtype)
        return _Terms(values, pair, pull, total, None)

    def exact_terms(self, rows: _Rows) -> _Terms:
        """The terms in fp64, with a number for -inf, which times 0 is 0; its traces are removed."""
        values, pair, pull, total, _ = self.terms(rows, torch.float64)
        counts = ((pair.student_max != MASKED) & (pair.teacher_max != MASKED))[:, 0]
        values = {
            kind: torch.where(value > FAR, torch.inf, value).where(counts, 0.0)
            for kind, value in values.items()
        }
        dead = ~counts  # rows without gradient
        infinite = values[KD] == torch.inf
        if infinite.any():
            dead |= infinite & ~(pull.abs().amax(-1) < FAR)
        rounding = values[KD].abs() < 1e-12
        if rounding.any():
            same = rounding & (pair.d.abs().amax(-1) == 0)
            values[KD] = torch.where(rounding, values[KD].clamp_min(0), values[KD])
            values[KD] = torch.where(same, 0.0, values[KD])
            dead |= same
        if dead.any():
            pull = torch.where(dead[:, None], 0.0, pull)
            total = torch.where(dead[:, None], 0.0, 1.0 if total is None else total).to(pull.dtype)
        return _Terms(values, pair, pull, total, None if counts.all() else counts[:, None])


def _converted(block: Tensor, store: _Store, exact: bool) -> Tensor:
    """In the store's dtype and layout, with finite numbers where `exact`."""
    if exact:
        return store.new().copy_(block).clamp_min_(MASKED)
    converts = block.dtype != store.empty.dtype or store.columns < NARROW
    return store.new().copy_(block) if converts else block


def _scale(temperature: Tensor) -> float | Tensor:
    """1 / T: a number where all rows share it, which saves passes, else [N, 1]."""
    shared = temperature.stride(0) == 0 and len(temperature) > 0
    return 1 / temperature[0].item() if shared else 1 / temperature[:, None]


def _doubtful(terms: _Terms) -> Tensor | None:
    """Rows whose divergence is small or infinite, or whose figures are not finite; None: no row."""
    check = terms.values[KD] if terms.total is None else terms.values[KD] + 0 * terms.total[:, 0]
    for kind in terms.values.keys() - {KD}:
        check = check + 0 * terms.values[kind]
    least, most = (bound.item() for bound in check.aminmax())
    if least > NEAR and most < FAR:
        return None
    return ~((check > NEAR) & (check < FAR))


def _cross_entropy(z: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    loss = torch.logsumexp(z, -1) - (1 - smoothing) * z.gather(-1, labels)[:, 0]
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
    labelled = None  # first, because `out` may be the student's logits
    if upstream.ce is not None:
        labelled = _factor(upstream.ce, rows, terms) * _cross_entropy_gradient(problem, rows, terms)
    block = None if out is None else out[rows.outer, :, : problem.vocab_size]
    heats = temperature is not None or problem.moments is not None
    direct = None if block is None or heats else _direct(block, rows, terms)
    gradient = _tempered_gradient(rows, terms, upstream, direct)
    if heats:
        heat = _heat(gradient, terms)
        if temperature is not None:
            temperature[rows.flat] = heat.to(temperature.dtype)
        if problem.moments is not None:
            _add_pull(gradient, heat, problem.moments[0], rows, terms)
    if labelled is not None:
        gradient += labelled
    if terms.counts is not None:
        gradient = torch.where(terms.counts, gradient, 0.0)
    if block is None or direct is not None:
        return
    if isinstance(rows.inner, slice):
        block[rows.inner].copy_(gradient)
    else:
        block[rows.inner] = gradient.to(block.dtype)


def _direct(block: Tensor, rows: _Rows, terms: _Terms) -> Tensor | None:
    """Where the gradient goes, if it can be computed there: a pass less."""
    suits = terms.counts is None and block.dtype == terms.pull.dtype and block.size(-1) >= NARROW
    return block[rows.inner] if suits and isinstance(rows.inner, slice) else None


def _tempered_gradient(
    rows: _Rows, terms: _Terms, upstream: Coefficients, out: Tensor | None
) -> Tensor:
    """Of divergence and entropy."""
    pair = terms.pair
    weight = _factor(upstream.kd, rows, terms) * pair.student_scale
    gradient = pair.times_q(weight if terms.total is None else weight * terms.total, out)
    gradient.addcmul_(terms.pull, weight, value=-1)
    if upstream.entropy is not None:
        slope = (pair.lq + terms.values[ENTROPY][:, None]).mul_(pair.q)
        weight = _factor(upstream.entropy, rows, terms) * pair.student_scale
        gradient.addcmul_(slope, weight, value=-1)
    return gradient


def _heat(gradient: Tensor, terms: _Terms) -> Tensor:
    """The gradient of each row's temperature."""
    pair = terms.pair
    # The gradient's rows sum to 0: measuring the logits from their maximum changes nothing.
    depth = _unmasked(pair.student - pair.student_max, pair)
    heat = depth.mul_(gradient).sum(-1, keepdim=True) * pair.student_scale
    return -(heat if terms.counts is None else torch.where(terms.counts, heat, 0.0))[:, 0]


def _add_pull(gradient: Tensor, heat: Tensor, moments: Tensor, rows: _Rows, terms: _Terms) -> None:
    """What goes through the width of standardised logits."""
    pair = terms.pair
    mean, _, pull = moments[:, rows.flat, None].to(gradient.dtype)
    centred = _unmasked(pair.student - mean, pair)
    gradient.addcmul_(centred, pull * heat[:, None] / pair.student_scale)


def _unmasked(x: Tensor, pair: Pair) -> Tensor:
    return x.masked_fill_(pair.student <= MASKED, 0.0)


def _cross_entropy_gradient(problem: Problem, rows: _Rows, terms: _Terms) -> Tensor:
    assert problem.labels is not None
    smoothing, labels = problem.label_smoothing, problem.labels[rows.flat, None]
    gradient = torch.softmax(terms.pair.student, -1).sub_(smoothing / problem.vocab_size)
    return gradient.scatter_add_(-1, labels, gradient.new_full(labels.shape, smoothing - 1))


def _factor(factor: Tensor, rows: _Rows, terms: _Terms) -> Tensor:
    return factor[rows.flat, None].to(terms.pull.dtype)


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


def _store(values: Tensor, rows: _Rows, terms: _Terms) -> None:
    for kind, value in terms.values.items():
        if kind < len(values):
            values[kind][rows.flat] = value.to(values.dtype)
