"""The rows of a problem in blocks that fit the cache."""

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
        inner, flat = (
            torch.arange(i.start, i.stop, device=mask.device) if isinstance(i, slice) else i
            for i in self[1:]
        )
        return Rows(self.outer, inner[mask], flat[mask])

    def parts(self, step: int) -> Iterator[Rows]:
        """At most `step` rows each, and much the same number."""
        count = self.size
        number = -(-count // step)
        for i in range(number):
            some = slice(count * i // number, count * (i + 1) // number)
            yield Rows(self.outer, _some(self.inner, some), _some(self.flat, some))


def _some(index: slice | Tensor, some: slice) -> slice | Tensor:
    if isinstance(index, slice):
        return slice(index.start + some.start, index.start + some.stop)
    return index[some]


def blocks(problem: Problem) -> Iterator[Rows]:
    """The rows that count, in blocks."""
    outer_rows, inner_rows = problem.student.shape[:2]
    eighth = problem.rows * problem.vocab_size // 8
    elements = min(BLOCK_ELEMENTS, max(LEAST_ELEMENTS, eighth))
    step = max(torch.get_num_threads(), elements // problem.vocab_size)
    for outer in range(outer_rows):
        first = outer * inner_rows
        rows = Rows(outer, slice(0, inner_rows), slice(first, first + inner_rows))
        if problem.counted is not None and not (counted := problem.counted[rows.flat]).all():
            rows = rows.only(counted)
        yield from rows.parts(step)
