"""The rows of a problem in blocks that fit the cache, and the buffers that blocks share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.divergences.pair import MASKED
from fastkd.problem import WIDTH, Problem, shared

# Elements of a block: its buffers then fit the last cache, and a call's overhead is small; fewer,
# but not fewer than the second, where a block would be more than an eighth of the problem, so that
# its buffers stay small beside the gradient.
BLOCK_ELEMENTS, LEAST_ELEMENTS = 5 << 17, 1 << 18
# The first buffers, allocated together. Memory freed in a large piece stays with the process, in
# small ones it may not, and the next call has to wait for each of its pages.
AT_ONCE = 3


class Rows(NamedTuple):
    """Some rows: their outer and inner indices, and their indices in [N]."""

    outer: int | Tensor
    inner: slice | Tensor
    flat: slice | Tensor

    @property
    def size(self) -> int:
        some = self.inner
        return some.stop - some.start if isinstance(some, slice) else len(some)

    def only(self, some: Tensor) -> Rows:
        """Some of them, by their places among these."""
        return Rows(*(_some(index, some) for index in self))

    def parts(self, step: int) -> Iterator[Rows]:
        """At most `step` rows each; the first are the largest."""
        if 0 < self.size <= step:
            yield self
            return
        for some in slices(self.size, step):
            yield Rows(*(_some(index, some) for index in self))


def _some(index: int | slice | Tensor, some: slice | Tensor) -> Any:
    if not isinstance(index, slice):
        return index if isinstance(index, int) else index[some]
    if isinstance(some, slice):
        return slice(index.start + some.start, index.start + some.stop)
    return index.start + some


def of_rows(factor: Any, rows: Rows) -> Any:
    """The factor of these rows, [R, 1]; a number or a 0-d tensor is that of all rows."""
    return factor[rows.flat] if isinstance(factor, Tensor) and factor.dim() else factor


def slices(size: int, step: int) -> Iterator[slice]:
    """All of [0, size), at most `step` at a time."""
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def largest(problem: Problem) -> int:
    """Rows of a block, at most: as many for every thread."""
    columns = max(problem.vocab_size, 1)  # of rows over many processes there may be none here
    eighth = problem.rows * columns // 8
    elements = min(BLOCK_ELEMENTS, max(LEAST_ELEMENTS, eighth))
    threads = torch.get_num_threads()
    return threads * max(1, round(elements / columns / threads))


def blocks(logits: Tensor, counted: Tensor | None, step: int) -> Iterator[Rows]:
    """The rows of [O, I, V] that count, in blocks of at most `step`."""
    outer_rows, inner_rows = logits.shape[:2]
    for outer in range(outer_rows):
        first = outer * inner_rows
        rows = Rows(outer, slice(0, inner_rows), slice(first, first + inner_rows))
        if counted is not None and not (some := counted[rows.flat]).all():
            rows = rows.only(some.nonzero()[:, 0])
        yield from rows.parts(step)


def marked(problem: Problem, mask: Tensor, step: int) -> Iterator[Rows]:
    """The rows that a mask [N] has, in blocks of at most `step`."""
    flat = mask.nonzero()[:, 0]
    inner_rows = problem.student.size(1)
    return Rows(flat // inner_rows, flat % inner_rows, flat).parts(step)


def vocabulary(logits: Tensor, problem: Problem) -> Tensor:
    """The logits without the columns that are padding."""
    size = problem.vocab_size
    return logits if logits.size(-1) == size else logits[..., :size]


def new_values(problem: Problem, kinds: int) -> Tensor:
    return problem.student.new_zeros(kinds, problem.rows, dtype=problem.dtype)


def new_gradient(problem: Problem) -> Tensor:
    out = torch.empty_like(problem.student, memory_format=torch.contiguous_format)
    blank(problem, out)
    return out


def blank(problem: Problem, out: Tensor) -> None:
    """Sets to 0 what no block writes: the padding, and the rows that do not count."""
    if problem.vocab_size < out.size(-1):
        out[..., problem.vocab_size :] = 0
    if problem.counted is not None and not problem.counted.all():
        out[~problem.counted.view(out.shape[:2])] = 0


def place_of(out: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor | None:
    """Where the rows' gradient goes, if it can be computed there: a pass less."""
    if out.dtype != dtype or not isinstance(rows.inner, slice):
        return None
    return out[rows.outer, rows.inner]


def scales_of(problem: Problem) -> list[float | Tensor]:
    """1 / T of student and teacher: a number where all rows share it, which saves passes, else
    [N, 1] in fp64.
    """
    temperatures = [problem.student_temperature]
    if problem.teacher_temperature is not None:
        temperatures.append(problem.teacher_temperature)
    if problem.moments is not None:
        widths = problem.moments[:, WIDTH].double()
        return [1 / (temperatures[i].double() * widths[i])[:, None] for i in (0, -1)]
    scales = [1 / (t[0].item() if shared(t) else t.double()[:, None]) for t in temperatures]
    return [scales[0], scales[-1]]


class Precision:
    """A dtype that blocks are computed in: buffers, and the logits and 1 / T of both sides."""

    def __init__(
        self, problem: Problem, dtype: torch.dtype, scales: Sequence[float | Tensor]
    ) -> None:
        sides = (problem.student, problem.teacher)
        self.sides = [vocabulary(x, problem) for x in sides if x is not None]
        self.scales = [x.to(dtype) if isinstance(x, Tensor) else x for x in scales]
        self.dtype, self.store = dtype, Store(problem, dtype)
        self.exact = dtype == torch.float64

    def logits(self, rows: Rows) -> list[Tensor]:
        """[R, V], in buffers where they are not in the dtype; in fp64 all are, with a number for
        -inf, which times 0 is 0.
        """
        found = [side[rows.outer, rows.inner] for side in self.sides]
        if self.exact:
            return [self.store.new().copy_(x).clamp_min_(MASKED) for x in found]
        return [x if x.dtype == self.dtype else self.store.new().copy_(x) for x in found]

    def log2_exps(self, logits: Sequence[Tensor]) -> list[Tensor]:
        """Where the logits' log2_exp may be written: in their own place, if it is a buffer."""
        return [
            x if self.exact or side.dtype != self.dtype else self.store.new()
            for x, side in zip(logits, self.sides, strict=True)
        ]


class Store:
    """Buffers that are used again for every block."""

    def __init__(self, problem: Problem, dtype: torch.dtype) -> None:
        self.dtype, self.columns = dtype, problem.vocab_size
        self.like = problem.student
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
            shape = count, self.capacity, self.columns
            more = self.like.new_empty(shape, dtype=self.dtype).unbind()
            self.buffers += more
            whole = self.rows == self.capacity
            self.views += more if whole else [buffer[: self.rows] for buffer in more]
        self.taken += 1
        return self.views[self.taken - 1]
