"""How the pieces of a row join: the seam between the phases of a backend.

A row's columns may be spread over several owners. Each computes the statistics of its piece; a
merge hands every owner the statistics of all, in rank order, and so all come to the same bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor


class Merge:
    """The merge of rows that have one owner, who holds all columns.

    Attributes:
        size: how many owners share the rows.
        rank: which of them this is.
        first_column: the index, among all columns, of its first.
        columns: how many columns all have together; None: those of the problem.
    """

    size: int = 1
    rank: int = 0
    first_column: int = 0
    columns: int | None = None

    def gather(self, fields: Tensor) -> Tensor:
        """[F, N] of this owner to [size, F, N] of all."""
        return fields[None]


LOCAL = Merge()
_MERGES: dict[str, Merge] = {"": LOCAL}


def of(name: str) -> Merge:
    """The merge of that name; "" is LOCAL. Names stand for merges where a compiler looks on."""
    return _MERGES[name]


@contextlib.contextmanager
def registered(name: str, merge: Merge) -> Iterator[Merge]:
    """Makes a merge known by a name as long as the context lasts."""
    if name in _MERGES:
        raise ValueError(f"a merge called {name!r} is registered already")
    _MERGES[name] = merge
    try:
        yield merge
    finally:
        del _MERGES[name]
