"""Sides without logits of their own: chunks of rows, for which their logits exist.

A chunk's logits are made in a buffer, in the dtype of the arithmetic; a backend computes loss and
gradient on them, in place where it can; and the gradient goes on to the tensors that they came
from. Only the sums for a head's weight and bias outlast a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ensembles, linear, sharding, soft_labels
from .divergences import Divergence
from .eager.blocks import slices
from .forms import Head, Mixture
from .operators import EXACT, PROBLEM, operator
from .problem import Coefficients, Problem

# Bytes of a chunk where nobody says how many, and the part of them that is left to what a head
# converts, a CPU's library holds for a product, and a backend beside logits. On a GPU products of
# thousands of rows run at its full rate; on a CPU those of some hundred, and of more the logits
# would leave the cache before the loss reads them.
GPU_BYTES, CPU_BYTES = 512 << 20, 80 << 20
GPU_SPARE, CPU_SPARE = 1 / 8, 1 / 5
LEAST_ROWS = 16


def rows_within(problem: Problem, buffers: int, least: int = 1) -> int:
    """The most rows, at least `least`, of which some buffers of logits keep to the budget."""
    on_gpu = problem.student_temperature.is_cuda
    usual, spare = (GPU_BYTES, GPU_SPARE) if on_gpu else (CPU_BYTES, CPU_SPARE)
    budget = problem.chunk_bytes or usual
    columns = -(-problem.columns // sharding.of(problem.merge).size)  # the same on all owners
    row = max(buffers * columns, 1) * problem.student_temperature.element_size()
    return max(1, min(problem.rows, max(least, int((1 - spare) * budget) // row)))


class Chunked(NamedTuple):
    """A backend's functions (see problem.py) for problems that come in chunks of rows."""

    backend: Any
    name: str

    def forward(self, problem: Problem, entropy: bool, metrics: bool) -> tuple[Tensor, Tensor]:
        """What `phases` gives, with its gathers, for rows with several owners."""
        values, state = _Rows(problem), _Rows(problem)
        for rows, part, found in self._forwards(problem, entropy, metrics):
            values.add(rows, found[0])
            state.add(rows, _with_moments(part, found[1]))
        return values.found, state.found

    def _forwards(
        self, problem: Problem, entropy: bool, metrics: bool
    ) -> Iterator[tuple[Any, Problem, tuple[Tensor, Tensor]]]:
        """Each chunk's forward; what it gathers is on its way while the next logits are made."""
        calls = (
            ((rows, part), self.backend.phases(part, entropy, metrics))
            for rows, part in _chunks(problem, self.name, ahead=True)
        )
        for (rows, part), found in sharding.overlapped(problem.merge, calls):
            yield rows, part, found

    def phases(self, problem: Problem, entropy: bool, metrics: bool) -> sharding.Forward:
        values, state = _Rows(problem), _Rows(problem)
        for rows, part in _chunks(problem, self.name):
            found = yield from self.backend.phases(part, entropy, metrics)
            values.add(rows, found[0])
            state.add(rows, _with_moments(part, found[1]))
        return values.found, state.found

    def backward(
        self,
        problem: Problem,
        state: Tensor,
        upstream: Coefficients,
        gradient: bool,
        temperature: bool,
    ) -> tuple[Any, Tensor | None]:
        sums, temperatures = linear.sums_of(problem) if gradient else None, _Rows(problem)
        moments, state = _without_moments(problem, state)
        for rows, part in _chunks(problem, self.name, moments):
            found, temperature_grad = self.backend.backward(
                part, state[:, rows].contiguous(), upstream.part(rows), gradient, temperature
            )
            if sums is not None:
                sums.add(rows, part, found)
            if temperature_grad is not None:
                temperatures.add(rows, temperature_grad[None])
        gradients = None if sums is None else sums.gradients()
        return gradients, temperatures.found[0] if temperature else None

    def fused(
        self, problem: Problem, coefficients: Coefficients, metrics: bool, out: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Any]:
        if problem.merge:
            return self._fused_of_several(problem, coefficients, metrics, out)
        sums, losses, values = linear.sums_of(problem, out), _Rows(problem), _Rows(problem)
        for rows, part in _chunks(problem, self.name):
            loss, figures, found = self.backend.fused(
                part, coefficients.part(rows), metrics, sums.place(part)
            )
            losses.add(rows, loss[None])
            if figures is not None:
                values.add(rows, figures)
            sums.add(rows, part, found)
        return losses.found[0], values.found if metrics else None, sums.gradients()

    def _fused_of_several(
        self, problem: Problem, coefficients: Coefficients, metrics: bool, out: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Any]:
        """A chunk's forward, and when the next one's is begun, its backward."""
        sums, losses, values = linear.sums_of(problem, out), _Rows(problem), _Rows(problem)
        entropy = coefficients.entropy is not None
        for rows, part, (figures, state) in self._forwards(problem, entropy, metrics):
            weights = coefficients.part(rows)
            found, _ = self.backend.backward(part, state, weights.rows(part), True, False)
            losses.add(rows, weights.weigh(figures)[None])
            values.add(rows, figures)
            sums.add(rows, part, found)
        return losses.found[0], values.found if metrics else None, sums.gradients()


# --- moments over several owners ---------------------------------------------------------------

MOMENTS = 6  # rows of `state` before those of the backend


def keeps_moments(problem: Problem) -> bool:
    """Whether they are kept for the backward, which could not find them without a gather."""
    return problem.standardize and problem.merge != ""


def _with_moments(part: Problem, state: Tensor) -> Tensor:
    if not keeps_moments(part):
        return state
    assert part.moments is not None
    return torch.cat([part.moments.flatten(0, 1), state])


def _without_moments(problem: Problem, state: Tensor) -> tuple[Tensor | None, Tensor]:
    if not keeps_moments(problem):
        return None, state
    return state[:MOMENTS].unflatten(0, (2, 3)), state[MOMENTS:]


# --- mixtures over several owners -------------------------------------------------------------


def normed(problem: Problem, name: str) -> Problem:
    """A mixture of probabilities needs of each member what its softmax has of all columns.

    That is found once, in one gather of all rows, since a backward makes the mixture again.
    """
    mixture = problem.teacher
    if not (problem.merge and isinstance(mixture, Mixture) and mixture.combine == "probs"):
        return problem
    if Divergence.of_name(problem.divergence).rows == "bernoulli":  # whose entries stand alone
        return problem
    norms = _norms(problem.student_temperature, *problem.pack(), name)
    return problem._replace(teacher=mixture._replace(norms=norms))


@operator("fastkd::norms", f"(Tensor temperature, {PROBLEM}, str backend) -> Tensor")
def _norms(
    temperature: Tensor, tensors: Any, numbers: Tensor, vocab_size: int, spec: str, name: str
) -> Tensor:
    problem = Problem.unpack(tensors, numbers, vocab_size, spec)
    found = temperature.new_empty(3, len(problem.teacher.members), problem.rows, dtype=EXACT)
    size = rows_within(problem, 1, LEAST_ROWS)
    buffer = temperature.new_empty(size, vocab_size)
    with torch.autocast(temperature.device.type, enabled=False):
        for rows in slices(problem.rows, size):
            room = buffer[: rows.stop - rows.start]
            found[..., rows] = ensembles.own_norms(problem.part(rows), room, name)
    pieces = sharding.of(problem.merge).gather(found[:2])
    return ensembles.joined_norms(pieces, found[2])


@_norms.register_fake
def _(
    temperature: Tensor, tensors: Any, numbers: Tensor, vocab_size: int, spec: str, name: str
) -> Tensor:
    mixture = Problem.unpack(tensors, numbers, vocab_size, spec).teacher
    return temperature.new_empty(len(mixture.members), 3, temperature.size(0), dtype=EXACT)


def _chunks(
    problem: Problem, name: str, moments: Tensor | None = None, ahead: bool = False
) -> Iterator[tuple[Any, Problem]]:
    """Rows of [N], a slice or indices, and their problem, with logits on both sides.

    moments: where they are known. ahead: the logits of a chunk are still of use when the next
        one's are made.
    """
    if moments is not None:
        problem = problem._replace(moments=moments)
    student, teacher = problem.student, problem.teacher
    shared = isinstance(student, Head) and isinstance(teacher, Head) and student.same(teacher)
    counts = [_buffers(student), 0 if shared else _buffers(teacher)]
    others = soft_labels.BUFFERS if problem.soft else 0
    size, sets = rows_within(problem, sum(counts) + others, LEAST_ROWS), 1
    if ahead and size < problem.rows:
        sets = 2
        gradient = 1  # of the one before
        size = rows_within(problem, sets * (sum(counts) + others) + gradient, LEAST_ROWS)
    new = problem.student_temperature.new_empty
    buffers = [
        [[new(size, problem.vocab_size) for _ in range(count)] for count in counts]
        for _ in range(sets)
    ]
    for number, rows in enumerate(_pieces(problem, size)):
        part = problem.part(rows)
        first, second = ([x[: part.rows] for x in some] for some in buffers[number % sets])
        with torch.autocast(part.student_temperature.device.type, enabled=False):
            sides = [_logits(part, part.student, first, name), None]
            sides[1] = sides[0] if shared else _logits(part, part.teacher, second, name)
            if problem.soft:  # whose gradient has two parts, added in the dtype of the arithmetic
                sides[0] = sides[0].to(problem.dtype)
            part = ensembles.tempered(part, sides, name)
        yield rows, part


def _buffers(side: Any) -> int:
    """How many it takes to make its logits."""
    return ensembles.BUFFERS if isinstance(side, Mixture) else int(isinstance(side, Head))


def _logits(part: Problem, side: Any, buffers: list[Tensor], name: str) -> Any:
    """[1, R, V] of a side; of what has logits, or lists some entries, itself."""
    if isinstance(side, Head):
        return linear.logits(side, buffers[0])[None]
    if isinstance(side, Mixture):
        return ensembles.logits(part, side, buffers, name)[None]
    return side


def _pieces(problem: Problem, size: int) -> Iterator[Any]:
    """Only the rows that count, where many do not: their products would be for nothing.

    To know how many waits for the device, for less time than a product takes.
    """
    if problem.counted is not None:
        counted = problem.counted.nonzero()[:, 0]
        if 4 * len(counted) < 3 * problem.rows:
            yield from counted.split(size)  # of nothing, nothing once: a backend's fields are seen
            return
    yield from slices(max(problem.rows, 1), size)


class _Rows:
    """Figures [F, N], of which some rows come at a time; 0 where none come."""

    def __init__(self, problem: Problem) -> None:
        self.found = problem.student_temperature.new_zeros(1, problem.rows)

    def add(self, rows: Any, piece: Tensor) -> None:
        if len(piece) != len(self.found) or piece.dtype != self.found.dtype:
            self.found = piece.new_zeros(len(piece), self.found.size(1))
        self.found[:, rows] = piece
