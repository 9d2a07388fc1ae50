"""Output heads: logits that exist for a chunk of rows at a time.

A chunk's logits are made in a buffer, in the dtype of the arithmetic; a backend computes loss and
gradient on them, in place where it can; and the gradient goes on to the tensors that they came
from. Only the sums for weight and bias outlast a chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, moments
from .operands import LinearHead
from .operators import readable
from .problem import Coefficients, Head, Problem

# Bytes of a chunk's logits, of both sides. On a GPU products of thousands of rows run at its full
# rate; on a CPU the logits stay in the cache between product and loss.
GPU_BYTES, CPU_BYTES = 512 << 20, 32 << 20
LEAST_ROWS = 16
# Columns of a head that are converted at once where it is not in the dtype of its products.
COLUMNS = 4096


def chunked(problem: Problem) -> bool:
    return isinstance(problem.student, Head) or isinstance(problem.teacher, Head)


def head_of(side: LinearHead) -> Head:
    """As autocast has it, products are of factors in its dtype; else in the wider of both dtypes.

    A CPU, where products of half precision are slow and round, takes factors in fp32.
    """
    hidden, weight, bias = map(readable, (side.hidden, side.weight, side.bias))
    product = torch.promote_types(hidden.dtype, weight.dtype)
    if torch.is_autocast_enabled(hidden.device.type):
        product = torch.get_autocast_dtype(hidden.device.type)
    if hidden.device.type == "cpu":
        product = torch.promote_types(product, torch.float32)
    return Head(
        hidden,
        weight,
        bias,
        scale=1.0 if side.logit_scale is None else side.logit_scale,
        softcap=0.0 if side.logit_softcap is None else side.logit_softcap,
        product=product,
        trains=(checks.trains(hidden), checks.trains(weight), checks.trains(bias)),
    )


def plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps autocast out of the products, whose dtypes the heads say."""

    @functools.wraps(function)
    def run(self: Chunked, problem: Problem, *arguments: Any) -> Any:
        with torch.autocast(problem.student_temperature.device.type, enabled=False):
            return function(self, problem, *arguments)

    return run


class Chunked(NamedTuple):
    """A backend's functions (see problem.py) for problems whose student or teacher is a Head."""

    backend: Any
    name: str

    @plain
    def forward(self, problem: Problem, entropy: bool, metrics: bool) -> tuple[Tensor, Tensor]:
        values, state = _Rows(problem), _Rows(problem)
        for rows, part in _chunks(problem, self.name):
            found = self.backend.forward(part, entropy, metrics)
            values.add(rows, found[0])
            state.add(rows, found[1])
        return values.all(), state.all()

    @plain
    def backward(
        self,
        problem: Problem,
        state: Tensor,
        upstream: Coefficients,
        gradient: bool,
        temperature: bool,
    ) -> tuple[Any, Tensor | None]:
        sums, temperatures = _sums(problem) if gradient else None, _Rows(problem)
        for rows, part in _chunks(problem, self.name):
            found, heat = self.backend.backward(
                part, state[:, rows].contiguous(), upstream.part(rows), gradient, temperature
            )
            if sums is not None:
                sums.add(rows, part, found)
            if heat is not None:
                temperatures.add(rows, heat[None])
        gradients = None if sums is None else sums.gradients()
        return gradients, temperatures.all()[0] if temperature else None

    @plain
    def fused(
        self, problem: Problem, coefficients: Coefficients, metrics: bool, out: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Any]:
        sums, losses, values = _sums(problem, out), _Rows(problem), _Rows(problem)
        for rows, part in _chunks(problem, self.name):
            loss, figures, found = self.backend.fused(
                part, coefficients.part(rows), metrics, sums.place(part)
            )
            losses.add(rows, loss[None])
            if figures is not None:
                values.add(rows, figures)
            sums.add(rows, part, found)
        return losses.all()[0], values.all() if metrics else None, sums.gradients()


# --- chunks ----------------------------------------------------------------------------------


def _chunks(problem: Problem, name: str) -> Iterator[tuple[Any, Problem]]:
    """Rows of [N], a slice or indices, and their problem, with logits in place of heads."""
    student, teacher = problem.student, problem.teacher
    shared = isinstance(student, Head) and isinstance(teacher, Head) and student.same(teacher)
    heads = [isinstance(student, Head), isinstance(teacher, Head) and not shared]
    size = chunk_rows(problem, sum(heads))
    new = problem.student_temperature.new_empty
    buffers = [new(size, problem.vocab_size) if head else None for head in heads]
    for rows in _pieces(problem, size):
        part = problem.part(rows)
        sides = [
            side if buffer is None else logits(side, buffer[: part.rows])[None]
            for side, buffer in zip((part.student, part.teacher), buffers, strict=True)
        ]
        part = part._replace(student=sides[0], teacher=sides[0] if shared else sides[1])
        yield rows, moments.standardized(part, name) if problem.standardize else part


def chunk_rows(problem: Problem, buffers: int) -> int:
    """Rows of a chunk, at most, by its budget of bytes alone."""
    budget = GPU_BYTES if problem.student_temperature.is_cuda else CPU_BYTES
    row = buffers * problem.vocab_size * problem.student_temperature.element_size()
    return max(1, min(problem.rows, max(LEAST_ROWS, budget // row)))


def _pieces(problem: Problem, size: int) -> Iterator[Any]:
    """Only the rows that count, where many do not: their products would be for nothing.

    To know how many waits for the device, for less time than a product takes.
    """
    if problem.counted is not None:
        counted = problem.counted.nonzero()[:, 0]
        if 4 * len(counted) < 3 * problem.rows:
            yield from counted.split(size)  # of nothing, nothing once: a backend's fields are seen
            return
    for start in range(0, max(problem.rows, 1), size):
        yield slice(start, min(start + size, problem.rows))


class _Rows:
    """Figures [F, N], of which some rows come at a time; 0 where none come."""

    def __init__(self, problem: Problem) -> None:
        self.found = problem.student_temperature.new_zeros(1, problem.rows)

    def add(self, rows: Any, piece: Tensor) -> None:
        if len(piece) != len(self.found):
            self.found = self.found.new_zeros(len(piece), self.found.size(1))
        self.found[:, rows] = piece

    def all(self) -> Tensor:
        return self.found


# --- gradients -------------------------------------------------------------------------------


def _sums(problem: Problem, out: Tensor | None = None) -> Any:
    if isinstance(problem.student, Head):
        return _HeadGradients(problem)
    return _LogitsGradient(problem, out)


class _LogitsGradient:
    """The gradient of a student that comes as logits, beside a teacher's head."""

    def __init__(self, problem: Problem, out: Tensor | None) -> None:
        student = problem.student
        self.out = torch.zeros_like(student) if out is None else out.view(student.shape)
        self.inplace = out is not None
        if out is not None and problem.counted is not None:
            self.out[:, ~problem.counted] = 0

    def place(self, part: Problem) -> Tensor | None:
        return None

    def add(self, rows: Any, part: Problem, found: Tensor) -> None:
        self.out[:, rows] = found.view(part.student.shape)

    def gradients(self) -> Tensor:
        return self.out


class _HeadGradients:
    """The gradients of hidden states, weight and bias, as far as these train; sums in fp32."""

    def __init__(self, problem: Problem) -> None:
        self.head = head = problem.student
        self.columns = problem.vocab_size
        hidden, weight, bias = head.trains
        new = problem.student_temperature.new_zeros
        self.hidden = torch.zeros_like(head.hidden) if hidden else None
        self.weight = new(head.weight.shape) if weight else None
        self.bias = new(head.weight.size(0)) if bias else None

    def place(self, part: Problem) -> Tensor | None:
        """Where the logits' gradient may go: over the logits, if nothing needs these any more."""
        return None if self.head.softcap or part.student is part.teacher else part.student

    def add(self, rows: Any, part: Problem, found: Tensor) -> None:
        gradient = found.view(part.student.shape)[0]
        if self.head.softcap:
            gradient.mul_(1 - (part.student[0] / self.head.softcap).square_())
        if self.head.scale != 1:
            gradient.mul_(self.head.scale)
        if self.bias is not None:
            self.bias[: self.columns] += gradient.sum(0)
        narrow = gradient.to(self.head.product)
        hidden = self.head.hidden[rows].to(self.head.product)
        if part.counted is not None:  # what does not count may hold NaN, which 0 would not remove
            hidden = torch.where(part.counted[:, None], hidden, 0.0)
        sums = None if self.hidden is None else gradient.new_zeros(hidden.shape)
        for some, weight in _converted(self.head, self.columns):
            if sums is not None:
                _add_product(sums, narrow[:, some], weight)
            if self.weight is not None:
                _add_product(self.weight[some], narrow[:, some].t(), hidden)
        if self.hidden is not None and sums is not None:
            self.hidden[rows] = sums.to(self.hidden.dtype)

    def gradients(self) -> list[Tensor | None]:
        head = self.head
        return [
            self.hidden,
            None if self.weight is None else self.weight.to(head.weight.dtype),
            None if self.bias is None or head.bias is None else self.bias.to(head.bias.dtype),
        ]


# --- products --------------------------------------------------------------------------------


def logits(head: Head, out: Tensor) -> Tensor:
    """softcap * tanh(scale * (hidden weight^T + bias) / softcap), in the dtype of `out` [R, V]."""
    hidden = head.hidden.to(head.product)
    for some, weight in _converted(head, out.size(1)):
        _product(hidden, weight.t(), out[:, some])
    if head.bias is not None:
        out += head.bias[: out.size(1)]
    if head.scale != 1:
        out *= head.scale
    if head.softcap:
        out.div_(head.softcap).tanh_().mul_(head.softcap)
    return out


def _converted(head: Head, columns: int) -> Iterator[tuple[slice, Tensor]]:
    """The weight's first columns in the dtype of its products, all at once where it has that."""
    step = columns if head.weight.dtype == head.product else COLUMNS
    for start in range(0, columns, step):
        some = slice(start, min(start + step, columns))
        yield some, head.weight[some].to(head.product)


def _product(x: Tensor, y: Tensor, out: Tensor) -> None:
    """x y, in the dtype of `out`."""
    if x.dtype == out.dtype:
        torch.mm(x, y, out=out)
    else:
        torch.mm(x, y, out_dtype=out.dtype, out=out)


def _add_product(out: Tensor, x: Tensor, y: Tensor) -> None:
    """out + x y, in the dtype of `out` and in its place."""
    if x.dtype == out.dtype:
        out.addmm_(x, y)
    else:
        torch.addmm(out, x, y, out_dtype=out.dtype, out=out)
