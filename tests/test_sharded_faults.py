"""A rank that dies: the others end with an error, within the timeout of their group."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import fastkd

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")

TIMEOUT = 8  # seconds
ROUNDS = 3


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2,
        timeout=timedelta(seconds=TIMEOUT),
    )  # fmt: skip
    student, teacher = torch.randn(2, 4, 8)
    for number in range(ROUNDS + 1):
        leaf = student.clone().requires_grad_()
        if rank == 1 and number == ROUNDS:  # as the other waits for its gather
            os.kill(os.getpid(), signal.SIGKILL)
        began = time.monotonic()
        try:
            fastkd.distillation_loss(leaf, teacher, group=dist.group.WORLD).backward()
        except RuntimeError as error:
            took = time.monotonic() - began
            Path(folder, "error").write_text(f"{number}\n{took}\n{error}")
            os._exit(3)
    os._exit(0)


def test_a_killed_rank_hangs_nobody(tmp_path):
    multiprocessing.set_forkserver_preload([__name__])
    processes = mp.start_processes(
        _rank, (str(tmp_path),), 2, join=False, start_method="forkserver"
    ).processes
    for process in processes:
        process.join(60 + TIMEOUT)
    assert [process.exitcode for process in processes] == [3, -signal.SIGKILL]
    number, took, error = (tmp_path / "error").read_text().split("\n", 2)
    assert int(number) == ROUNDS
    assert float(took) < TIMEOUT + 2
    assert error
