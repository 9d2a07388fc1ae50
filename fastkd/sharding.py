"""How the pieces of a row join: the seam between the phases of a backend.

A row's columns may be spread over several owners. Each computes the statistics of its piece; a
merge hands every owner the statistics of all, in rank order, and so all come to the same bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from . import tracing

Result = TypeVar("Result")


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
        """[F, ...] of this owner to [size, F, ...] of all."""
        return fields[None]


class Group(Merge):
    """The merge of a process group, over which the vocabulary is sharded.

    process_group: all of its ranks call, with the same rows.
    first_column, columns: see Merge.
    mine: how many columns this rank holds.
    """

    def __init__(
        self, process_group: dist.ProcessGroup, first_column: int, columns: int, mine: int
    ) -> None:
        self.process_group = process_group
        self.size, self.rank = process_group.size(), process_group.rank()
        self.first_column, self.columns, self.mine = first_column, columns, mine

    def gather(self, fields: Tensor) -> Tensor:
        """One collective. What each takes to be its place goes along, and has to fit."""
        place = fields.new_tensor([self.first_column, self.mine, self.columns])
        sent = torch.cat([fields.flatten(), place])
        if tracing.DEBUG:
            self._same_shapes(fields)
        found = sent.new_empty(self.size, sent.numel())
        dist.all_gather_into_tensor(found, sent, group=self.process_group)
        if tracing.may_read(found):
            self._contiguous(found[:, -len(place) :].long().tolist())
        return found[:, : -len(place)].view(self.size, *fields.shape)

    def _contiguous(self, places: list[list[int]]) -> None:
        """Refuses shards that do not follow each other; all ranks see the same, and refuse."""
        expected = 0
        for first, mine, columns in places:
            if columns != self.columns or (mine and first != expected):
                raise ValueError(
                    f"the ranks of `group` hold {[mine for _, mine, _ in places]} columns, which "
                    f"they take to begin at {[first for first, *_ in places]} of "
                    f"{[columns for *_, columns in places]}: pass vocab_size, of all columns, the "
                    "same on all ranks, and split it as torch.chunk does, or evenly"
                )
            expected += mine

    def _same_shapes(self, fields: Tensor) -> None:
        shapes: list[Any] = [None] * self.size
        dist.all_gather_object(shapes, tuple(fields.shape), group=self.process_group)
        if len(set(shapes)) > 1:
            raise ValueError(
                f"the ranks of `group` have different rows or options: statistics of shapes "
                f"{shapes}, fields by rows; give all ranks the same rows and the same settings"
            )


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


def name_of(merge: Group) -> str:
    """By which a Problem knows it. A group that is made again takes the place of the old one."""
    name = f"{merge.process_group.group_name}:{merge.first_column}:{merge.mine}:{merge.columns}"
    _MERGES[name] = merge
    return name


def together(merge: Merge, *phases: Generator[Tensor, Tensor, Result]) -> list[Result]:
    """Runs all to their ends, each a backend's function that gathers between its phases.

    Where a phase ends it yields fields [F, ...] and is sent those of all owners, [size, F, ...];
    what several yield at once goes in one gather.
    """
    results: dict[int, Result] = {}
    sent: dict[int, Any] = dict.fromkeys(range(len(phases)))
    while sent:
        fields: dict[int, Tensor] = {}
        for index, pieces in sent.items():
            try:
                fields[index] = phases[index].send(pieces)
            except StopIteration as end:
                results[index] = end.value
        sent = dict(zip(fields, _gathered(merge, list(fields.values())), strict=True))
    return [results[index] for index in range(len(phases))]


def _gathered(merge: Merge, fields: list[Tensor]) -> list[Tensor]:
    if len(fields) < 2:
        return [merge.gather(one) for one in fields]
    found = merge.gather(torch.cat([one.flatten() for one in fields]))
    sizes = [one.numel() for one in fields]
    return [
        pieces.view(merge.size, *one.shape)
        for one, pieces in zip(fields, found.split(sizes, 1), strict=True)
    ]
