"""One process against two that share the vocabulary: `python -m benchmarks --suite sharded`.

Loss and gradient of 256 x 32000 logits in fp32 over gloo, a thread to a process. The gathers of a
call are timed by themselves beside it, as many and of the same sizes, and PyTorch's own
loss_parallel for the cross-entropy. Two processes on two cores should take half the time of one and
that of the gathers: a column has what they take above the gathers, over that half. But two share
memory and caches, which one has to itself. Two that know nothing of each other, each with the loss
of its half of the columns as if these were all, show what the machine gives; the last column is
what the group takes, above the gathers, over the time of these.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

import fastkd
from fastkd.sharding import Group

ROWS, COLUMNS, WORLD = 256, 32000, 2
CASES: dict[str, dict[str, Any]] = {
    "forward_kl": {"divergence": "forward_kl"},
    "reverse_kl": {"divergence": "reverse_kl"},
    "jsd": {"divergence": fastkd.JSD(beta=0.5)},
    "tvd": {"divergence": "tvd"},
    "cross-entropy": {"alpha": 0.0},
}
MODES = ("forward", "backward")


def run(rounds: int, small: bool, header: dict[str, Any], out: Path | None) -> int:
    """Prints the table; writes it, and the numbers, to a folder."""
    shape = (16, 320) if small else (ROWS, COLUMNS)
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, (shape, rounds, folder), WORLD, start_method="spawn")
        rows = json.loads((Path(folder) / "rows.json").read_text())
    text = _table(rows)
    print(text)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out / "table.md").write_text(text + "\n")
        (out / "results.json").write_text(json.dumps({"header": header, "rows": rows}, indent=1))
    return 0


def _rank(rank: int, shape: tuple[int, int], rounds: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD
    )
    torch.manual_seed(0)
    student, teacher = torch.randn(2, *shape) * 2
    labels = torch.randint(shape[1], shape[:1])
    rows = []
    for name, settings in CASES.items():
        for mode in MODES:
            rows.append(_case(name, mode, settings, student, teacher, labels, rounds))
    rows.append(_loss_parallel(student, labels, rounds))
    if rank == 0:
        (Path(folder) / "rows.json").write_text(json.dumps(rows))
    dist.barrier()
    os._exit(0)


def _case(
    name: str, mode: str, settings: dict[str, Any], student: Tensor, teacher: Tensor,
    labels: Tensor, rounds: int,
) -> dict[str, Any]:  # fmt: skip
    each = student.size(1) // WORLD
    mine = slice(dist.get_rank() * each, (dist.get_rank() + 1) * each)
    own, others = (x[:, mine].contiguous() for x in (student, teacher))

    def loss(z: Tensor, y: Tensor, group: Any) -> Tensor:
        leaf = z.detach().requires_grad_()
        ids = labels if group else labels % z.size(1)
        value = fastkd.distillation_loss(
            leaf, y, ids, gradient=mode, backend="torch", group=group, **settings
        )
        value.backward()
        assert leaf.grad is not None
        return leaf.grad

    with mock.patch.object(Group, "gather", autospec=True, side_effect=Group.gather) as gather:
        part = loss(own, others, dist.group.WORLD)
    sizes = [call.args[1].numel() for call in gather.call_args_list]
    whole = loss(student, teacher, None)
    error = (part - whole[:, mine]).abs().max() / whole.abs().max()
    assert error < 1e-4, f"{name}: {error}"
    found: list[tuple[float, ...]] = []
    for _ in range(rounds):  # in turns, so that all see the same machine
        found.append((
            _one_at_a_time(lambda: loss(student, teacher, None)),
            _together(lambda: loss(own, others, dist.group.WORLD)),
            _together(lambda: loss(own, others, None)),
        ))  # fmt: skip
    gathers = [_together(lambda: _gather(sizes)) for _ in range(rounds)]
    return _row(name, mode, found, gathers, float(error))


def _loss_parallel(student: Tensor, labels: Tensor, rounds: int) -> dict[str, Any]:
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
    from torch.distributed.tensor.parallel import loss_parallel

    mesh = init_device_mesh("cpu", (WORLD,))
    z = distribute_tensor(student, mesh, [Shard(1)])

    def shared() -> None:
        leaf = z.detach().requires_grad_()
        with loss_parallel():
            F.cross_entropy(leaf, labels).backward()

    def alone(columns: Tensor) -> None:
        leaf = columns.detach().requires_grad_()
        F.cross_entropy(leaf, labels % leaf.size(1)).backward()

    own = z.to_local()
    found = [
        (_one_at_a_time(lambda: alone(student)), _together(shared), _together(lambda: alone(own)))
        for _ in range(rounds)
    ]
    return _row("cross-entropy by loss_parallel", "", found, [], 0.0)


def _one_at_a_time(call: Callable[[], Any]) -> float:
    """On rank 0, while the other waits and leaves it the machine."""
    found = math.nan
    dist.barrier()
    if dist.get_rank() == 0:
        began = time.perf_counter()
        call()
        found = time.perf_counter() - began
    dist.barrier()
    return found


def _together(call: Callable[[], Any]) -> float:
    dist.barrier()
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _gather(sizes: list[int]) -> None:
    """Those of a call, by themselves."""
    merge = Group(dist.group.WORLD, dist.get_rank(), WORLD, 1)
    for size in sizes:
        merge.gather(torch.zeros(1, size, dtype=torch.float64))


def _row(
    name: str, mode: str, found: list[tuple[float, ...]], gathers: list[float], error: float
) -> dict[str, Any]:
    """found: of each round the seconds of one process, of two, and of two without a group."""
    one, two, apart = (1e3 * statistics.median(times) for times in zip(*found, strict=True))
    gather = 1e3 * statistics.median(gathers) if gathers else None
    above = two - (gather or 0.0)
    return {
        "case": name, "gradient": mode, "one_ms": one, "two_ms": two, "gather_ms": gather,
        "apart_ms": apart, "of_half": above / (one / 2), "of_apart": above / apart, "error": error,
    }  # fmt: skip


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| loss and gradient | gradient= | one process, ms | two | gathers | above, of half "
        "| two without a group, ms | above, of these |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        gather = "" if row["gather_ms"] is None else f"{row['gather_ms']:.2f}"
        lines.append(
            f"| {row['case']} | {row['gradient']} | {row['one_ms']:.1f} | {row['two_ms']:.1f} | "
            f"{gather} | {row['of_half']:.2f} | {row['apart_ms']:.1f} | {row['of_apart']:.2f} |"
        )
    return "\n".join(lines)
