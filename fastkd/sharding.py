"""How the pieces of a row join: the seam between the phases of a backend.

A row's columns may be spread over several owners. Each computes the statistics of its piece; a
merge hands every owner the statistics of all, in rank order, and so all come to the same bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from . import tracing

Key = TypeVar("Key")
Result = TypeVar("Result")
Phases = Generator[Tensor, Tensor, Result]  # a backend's function that gathers between its phases
Forward = Phases[tuple[Tensor, Tensor]]  # `values` and `state`


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

    def start(self, fields: Tensor) -> Callable[[], Tensor]:
        """Begins a gather; what is given back waits for its end."""
        found = self.gather(fields)
        return lambda: found


class Group(Merge):
    """The merge of a process group, over which the vocabulary is sharded.

    `group` of distillation_loss takes one where the ranks hold unequal numbers of columns in a way
    that neither `vocab_size` nor torch.chunk tells.

    Args:
        process_group: all of its ranks call, with the same rows.
        first_column: the index, among the columns of all ranks, of this rank's first.
        columns: how many all ranks have together.
        mine: how many this rank has; as `group`, the student's width says it.
    """

    columns: int

    def __init__(
        self, process_group: dist.ProcessGroup, first_column: int, columns: int, mine: int = 0
    ) -> None:
        self.process_group = process_group
        self.size, self.rank = process_group.size(), process_group.rank()
        self.first_column, self.columns, self.mine = first_column, columns, mine

    def gather(self, fields: Tensor) -> Tensor:
        """One collective. What each takes to be its place goes along, and has to fit.

        But not on a GPU, which would have to be waited for; there the debug switch compares.
        """
        return self._gathering(fields, in_background=False)()

    def start(self, fields: Tensor) -> Callable[[], Tensor]:
        return self._gathering(fields, in_background=True)

    def _gathering(self, fields: Tensor, in_background: bool) -> Callable[[], Tensor]:
        if tracing.DEBUG:
            self._same_shapes(fields)
        checked = tracing.may_read(fields)
        sent = fields.flatten()
        if checked:
            place = [self.first_column, self.mine, self.columns, fields.size(-1)]
            sent = torch.cat([sent, sent.new_tensor(place)])
        found = sent.new_empty(self.size * sent.numel())
        # The name since PyTorch 2.13; before, all_gather_into_tensor.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        work = gather(found, sent, group=self.process_group, async_op=in_background)
        found = found.view(self.size, -1)

        def wait() -> Tensor:
            if work is not None:
                work.wait()
            if checked:
                _fit(found[:, fields.numel() :].long().tolist())
            return found[:, : fields.numel()].view(self.size, *fields.shape)

        return wait

    def _same_shapes(self, fields: Tensor) -> None:
        shapes: list[Any] = [None] * self.size
        dist.all_gather_object(shapes, tuple(fields.shape), group=self.process_group)
        if len(set(shapes)) > 1:
            raise ValueError(
                f"the ranks of `group` have different rows or options: statistics of shapes "
                f"{shapes}, fields by rows; give all ranks the same rows and the same settings"
            )


def _fit(places: list[list[int]]) -> None:
    """Refuses shards that do not follow each other, and other rows; all ranks see the same."""
    firsts, counts, totals, rows = map(list, zip(*places, strict=True))
    if len(set(rows)) > 1:
        raise ValueError(
            f"the ranks of `group` have {rows} rows: give all the same rows and the same settings"
        )
    follows = all(
        not count or first == sum(counts[:rank])
        for rank, (first, count) in enumerate(zip(firsts, counts, strict=True))
    )
    if not follows or set(totals) != {sum(counts)}:
        raise ValueError(
            f"the ranks of `group` hold {counts} columns, and take these to begin at {firsts} "
            f"of {totals}: hold as many on all, or split vocab_size columns as torch.chunk "
            "does, or pass a fastkd.sharding.Group"
        )


def of_group(
    group: dist.ProcessGroup | Group | None, student: Any, vocab_size: int | None
) -> Merge:
    """The merge of a group whose rank has these student logits, padding included.

    Without vocab_size all hold as many. With it they do too, and the last columns of all are
    padding; or the columns are split as torch.chunk does, and the last ranks hold fewer, or none.
    No rank knows what the others hold: each gather compares.
    """
    shape = getattr(student, "shape", ())  # what is no tensor is refused later
    if group is None or not shape:
        return LOCAL
    width = shape[-1]
    if isinstance(group, Group) and group.size > 1:
        columns = group.columns if vocab_size is None else min(group.columns, vocab_size)
        first = min(group.first_column, columns)
        return Group(group.process_group, first, columns, min(width, columns - first))
    if isinstance(group, Group) or group.size() == 1:
        return LOCAL
    size, rank = group.size(), group.rank()
    columns = size * width if vocab_size is None else vocab_size
    each = max(width, -(-columns // size))
    first = min(rank * each, columns)
    return Group(group, first, columns, min(width, columns - first))


LOCAL = Merge()
_MERGES: dict[str, Merge] = {"": LOCAL}


def of(name: str) -> Merge:
    """The merge of that name; "" is LOCAL. Names stand for merges where a compiler looks on."""
    if name in _MERGES:
        return _MERGES[name]
    group, *numbers = name.rsplit(":", 3)  # see name_of
    first_column, mine, columns = map(int, numbers)
    return Group(_group_of(group), first_column, columns, mine)


def _group_of(name: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


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


def name_of(merge: Merge) -> str:
    """The name by which a Problem knows a merge: a group's says all that it is."""
    if not isinstance(merge, Group):
        return ""
    return f"{merge.process_group.group_name}:{merge.first_column}:{merge.mine}:{merge.columns}"


@torch.library.custom_op("fastkd::summed", mutates_args=())
def _summed(tensor: Tensor, group: str) -> Tensor:
    """The sum over a group's ranks."""
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=_group_of(group))
    return total


@_summed.register_fake
def _(tensor: Tensor, group: str) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: str) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _summed(gradient, ctx.group), None


def copied(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The same tensor, which all ranks hold; its gradient is the sum of what each rank gives.

    For the hidden states of a column-parallel `LinearHead`, whose gradient on a rank is that of its
    own columns. A tensor-parallel framework does the same where it hands hidden states to its head
    (Megatron's copy to the tensor-parallel region, DTensor's Replicate): leave it out there, or the
    gradient is too large by the group's size.
    """
    found: Tensor = _Copied.apply(tensor, group.group_name)
    return found


def run(name: str, phases: Phases[Result], pieces: Tensor | None = None) -> Result:
    """The result of phases between which the merge of that name gathers.

    pieces: what it has gathered already, of phases that have begun.
    """
    merge = of(name)
    sent: Any = pieces  # a generator begins with None
    while True:
        try:
            fields = phases.send(sent)
        except StopIteration as end:
            result: Result = end.value
            return result
        sent = merge.gather(fields)


def together(*phases: Phases[Result]) -> Phases[list[Result]]:
    """Runs all to their ends, each a backend's function that gathers between its phases.

    Where a phase ends it yields fields [F, ...] and is sent those of all owners, [size, F, ...];
    what several yield at once goes in one gather.
    """
    results: dict[int, Result] = {}
    sent: dict[int, Any] = dict.fromkeys(range(len(phases)))
    while True:
        fields: dict[int, Tensor] = {}
        for index, pieces in sent.items():
            try:
                fields[index] = phases[index].send(pieces)
            except StopIteration as end:
                results[index] = end.value
        if not fields:
            return [results[index] for index in range(len(phases))]
        found = yield torch.cat([one.flatten() for one in fields.values()])
        parts = found.split([one.numel() for one in fields.values()], 1)
        sent = {
            index: part.view(len(found), *one.shape)
            for (index, one), part in zip(fields.items(), parts, strict=True)
        }


def overlapped(
    name: str, calls: Iterable[tuple[Key, Phases[Result]]]
) -> Iterator[tuple[Key, Result]]:
    """Runs one after the other, each by some key; while one waits for its first gather, the next is
    made, and comes to its own.
    """
    begun: list[tuple[Key, Callable[[], Result]]] = []
    for key, phases in calls:
        begun.append((key, _begun(name, phases)))
        if len(begun) > 1:
            before, end = begun.pop(0)
            yield before, end()
    for key, end in begun:
        yield key, end()


def _begun(name: str, phases: Phases[Result]) -> Callable[[], Result]:
    """Starts its first gather; what is given back runs it to its end."""
    try:
        wait = of(name).start(next(phases))
    except StopIteration as stop:  # it needs none
        result: Result = stop.value
        return lambda: result
    return lambda: run(name, phases, wait())
