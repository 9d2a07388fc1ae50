"""The rows of a problem in blocks that fit the cache, and the buffers that blocks share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .problem import Problem

# Elements of a block: its buffers then fit the last cache, and a call's overhead is small; fewer,
# but not fewer than the second, where a block would be more than an eighth of the problem, so that
# its buffers stay small beside the gradient.
BLOCK_ELEMENTS, LEAST_ELEMENTS = 1 << 19, 1 << 17
# The first buffers, allocated together. Memory freed in a large piece stays with the process, in
# small ones it may not, and the next call has to wait for each of its pages.
AT_ONCE = 4


class Rows(NamedTuple):
    """Some rows of outer index `outer`: their inner indices, and their indices in [N]."""

    outer: int
    inner: slice | Tensor
    flat: slice | Tensor

    @property
    def size(self) -> int:
        some = self.inner
        return some.stop - some.start if isinstance(some, slice) else len(some)

    def only(self, mask: Tensor) -> Rows:
        some = mask.nonzero()[:, 0]
        inner, flat = (i.start + some if isinstance(i, slice) else i[some] for i in self[1:])
        return Rows(self.outer, inner, flat)

    def parts(self, step: int) -> Iterator[Rows]:
        """At most `step` rows each, and much the same number; the first are the largest."""
        count = self.size
        number = -(-count // step)
        size = -(-count // max(number, 1))
        for i in range(number):
            some = slice(size * i, min(size * (i + 1), count))
            yield Rows(self.outer, _some(self.inner, some), _some(self.flat, some))


def _some(index: slice | Tensor, some: slice) -> slice | Tensor:
    if isinstance(index, slice):
        return slice(index.start + some.start, index.start + some.stop)
    return index[some]


def largest(problem: Problem) -> int:
    """Rows of a block, at most."""
    eighth = problem.rows * problem.vocab_size // 8
    elements = min(BLOCK_ELEMENTS, max(LEAST_ELEMENTS, eighth))
    return max(torch.get_num_threads(), elements // problem.vocab_size)


def blocks(problem: Problem) -> Iterator[Rows]:
    """The rows that count, in blocks."""
    outer_rows, inner_rows = problem.student.shape[:2]
    step = largest(problem)
    for outer in range(outer_rows):
        first = outer * inner_rows
        rows = Rows(outer, slice(0, inner_rows), slice(first, first + inner_rows))
        if problem.counted is not None and not (counted := problem.counted[rows.flat]).all():
            rows = rows.only(counted)
        yield from rows.parts(step)


class Store:
    """Buffers that are used again for every block."""

    def __init__(self, problem: Problem, dtype: torch.dtype) -> None:
        self.dtype, self.columns = dtype, problem.vocab_size
        self.empty = problem.student.new_empty(0, dtype=dtype)
        self.capacity = self.rows = self.taken = 0
        self.buffers: list[Tensor] = []  # [capacity, V]
        self.views: list[Tensor] = []  # of these, [rows, V]

    def start(self, rows: int) -> None:
        if rows > self.capacity:
            self.capacity, self.buffers = rows, []
        if rows != self.rows:
            self.rows, self.views = rows, [buffer[:rows] for buffer in self.buffers]
        self.taken = 0

    def new(self) -> Tensor:
        if self.taken == len(self.buffers):
            count = 1 if self.buffers else AT_ONCE
            more = self.empty.new_empty(count, self.capacity, self.columns).unbind()
            self.buffers += more
            self.views += [buffer[: self.rows] for buffer in more]
        self.taken += 1
        return self.views[self.taken - 1]


class Waiting:
    """Rows to be done again in fp64, with copies of their logits, which may be overwritten."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.size = capacity, 0
        self.rows: list[Rows] = []  # of one outer index
        self.logits: list[list[Tensor]] = []  # student's and teacher's

    def takes(self, rows: Rows) -> bool:
        fits = self.size + rows.size <= self.capacity
        return not self.rows or (fits and self.rows[0].outer == rows.outer)

    def add(self, rows: Rows, logits: list[Tensor]) -> None:
        self.size += rows.size
        self.rows.append(rows)
        self.logits.append(logits)

    def take(self) -> tuple[Rows, list[Tensor]]:
        """All of them; they wait no longer."""
        (outer, *_), inner, flat = zip(*self.rows, strict=True)
        logits = [torch.cat(side) for side in zip(*self.logits, strict=True)]
        self.size, self.rows, self.logits = 0, [], []
        return Rows(outer, torch.cat(inner), torch.cat(flat)), logits
