"""Runs cases on real processes over gloo: what every rank does, and what comes back of it."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Case = Callable[[], None]


def on_ranks(world: int, cases: dict[str, Case], folder: Path) -> dict[str, str]:
    """Runs all cases on so many processes, started once; by name the faults of those that fail.

    They are forked of one that has imported all cases, which takes as long as many of them.
    """
    multiprocessing.set_forkserver_preload(["tests.test_sharded"])
    mp.start_processes(_rank, (world, cases, str(folder)), world, start_method="forkserver")
    faults: dict[str, str] = {}
    for rank in range(world):
        for name, fault in torch.load(folder / f"{rank}.pt").items():
            faults[name] = faults.get(name, "") + f"\nrank {rank}: {fault}"
    return faults


def _rank(rank: int, world: int, cases: dict[str, Case], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    faults = {}
    for name, case in cases.items():
        torch.manual_seed(0)
        try:
            case()
        except Exception:  # the others go on, and so does this rank, with the next case
            faults[name] = traceback.format_exc()
    torch.save(faults, Path(folder) / f"{rank}.pt")
    os._exit(0)  # a group that ran into its timeout may abort the process that takes it down


def columns(total: int) -> slice:
    """Those of this rank, as torch.chunk splits them."""
    each = -(-total // dist.get_world_size())
    first = min(dist.get_rank() * each, total)
    return slice(first, min(first + each, total))


class Counted:
    """Counts the collectives that are called while it lasts."""

    def __enter__(self) -> Counted:
        self.count = 0
        self.kept = {name: getattr(dist, name) for name in COLLECTIVES if hasattr(dist, name)}
        for name, function in self.kept.items():
            setattr(dist, name, self._counting(function))
        return self

    def _counting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            self.count += 1
            return function(*arguments, **keywords)

        return call

    def __exit__(self, *_: object) -> None:
        for name, function in self.kept.items():
            setattr(dist, name, function)


COLLECTIVES = [
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_gather_single", "all_reduce",
    "all_to_all", "all_to_all_single", "barrier", "broadcast", "gather", "reduce",
    "reduce_scatter", "reduce_scatter_tensor", "scatter", "send", "recv",
]  # fmt: skip
