"""A vocabulary over the processes of a group, which see the same batches."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch.distributed as dist
from torch import Tensor

from fastkd.operands import LinearHead
from fastkd.sharding import Group, copied


class Indivisible(ValueError):
    """A vocabulary that these processes, or this student, cannot divide."""


def check_processes(size: int, processes: int) -> None:
    """Raises Indivisible where processes would be left over."""
    if processes % size:
        raise Indivisible(
            f"tensor_parallel={size} must divide the number of processes, which is {processes}: "
            "start as many by torchrun"
        )


class Columns:
    """Those of this process among `total`, as torch.chunk splits them over `size` neighbours.

    Weights are the same on all processes, whose gradients are averaged over all of them (by DDP or
    FSDP). Processes of one group have the same gradient of all that is below the head. Each has
    that of its own columns of the head: it counts `size` times, since the others have none there.
    """

    def __init__(self, size: int, total: int) -> None:
        processes = dist.get_world_size() if dist.is_initialized() else 1
        check_processes(size, processes)
        self.size = size
        self.process_group, _ = dist.new_subgroups(size)
        each = -(-total // size)
        first = min(self.process_group.rank() * each, total)
        self.mine = slice(first, min(first + each, total))
        self.group = Group(self.process_group, first, total)

    def of(self, operand: Any) -> Any:
        """A head with this process's columns, or whole logits with them; others hold ids of all."""
        if isinstance(operand, LinearHead):
            weight, bias = self._rows(operand.weight), operand.bias
            return dataclasses.replace(
                operand,
                hidden=copied(operand.hidden, self.process_group),
                weight=weight,
                bias=None if bias is None else self._rows(bias),
            )
        return operand[..., self.mine] if isinstance(operand, Tensor) else operand

    def _rows(self, parameter: Tensor) -> Tensor:
        rows = parameter[self.mine]
        if rows.requires_grad:
            rows.register_hook(lambda gradient: gradient * self.size)
        return rows

    def shared(self, loader: Any) -> Any:
        """A loader of accelerate's, with the same batches for the processes of a group."""
        batches = loader.batch_sampler
        if not hasattr(batches, "num_processes"):
            raise NotImplementedError(
                "tensor_parallel with data that one process hands out, or without a length: give "
                "a dataset with a length, and leave dispatch_batches out"
            )
        batches.num_processes //= self.size
        batches.process_index //= self.size
        return loader

    def once(self, gathered: Tensor) -> Tensor:
        """Each batch's rows once, of those that all processes gave, [processes * B, ...]."""
        pieces = gathered.view(dist.get_world_size(), -1, *gathered.shape[1:])
        return pieces[:: self.size].flatten(0, 1)
