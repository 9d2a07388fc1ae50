"""`--suite host`: what a call costs beyond its arithmetic, in microseconds of one thread.

On the CPU 16 x 200 logits, whose arithmetic is small. Of a call on a GPU all but the device's work:
tensors lie on the CPU, and kernels are specialised and launched as on a GPU, by launches that do
nothing (stub.py). What the driver and a device's allocator take comes on top.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastkd

from . import machine, stub
from .report import table

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
# (rows, columns) of each path; those of the GPU take a resident row, a sweep, and one in pieces.
CASES = {"torch": ((16, 200),), "triton": ((16, 200), (512, 32000), (64, 128256))}
PATHS = {"torch": "CPU", "triton": "GPU, host alone"}
BLOCKS, CALLS, WARM = 40, 25, 20
HEAD = ("path", "N x V", "divergence", "gradient", "loss, us", "backward, us", "both, us", "20 %")


def measure(before: Callable[[], Any], after: Callable[[Any], Any]) -> tuple[float, float, float]:
    """The medians of both, and the lower fifth of their sum, over blocks of calls."""
    losses, backwards = [], []
    for block in range(BLOCKS + WARM):
        found, began = [], time.thread_time()
        for _ in range(CALLS):
            found.append(before())
        between = time.thread_time()
        for loss in found:
            after(loss)
        if block >= WARM:
            losses.append(1e6 * (between - began) / CALLS)
            backwards.append(1e6 * (time.thread_time() - between) / CALLS)
    both = [sum(pair) for pair in zip(losses, backwards, strict=True)]
    low = statistics.quantiles(both, n=5, method="inclusive")[0]
    return statistics.median(losses), statistics.median(backwards), low


def call(student: Tensor, teacher: Tensor, name: str, gradient: str, backend: str) -> Tensor:
    loss = fastkd.distillation_loss(
        student, teacher, divergence=fastkd.Divergence.of_name(name)(), temperature=2.0,
        gradient=gradient, backend=backend,
    )  # fmt: skip
    assert isinstance(loss, Tensor)
    return loss


def backward(student: Tensor, loss: Tensor) -> None:
    student.grad = None
    loss.backward()


def lines(backend: str) -> Iterator[list[str]]:
    dtype = torch.float32 if backend == "torch" else torch.bfloat16
    for rows, columns in CASES[backend]:
        student, teacher = (torch.zeros(rows, columns, dtype=dtype) for _ in range(2))
        if backend == "torch":
            student, teacher = torch.randn(2, rows, columns).unbind()
        student.requires_grad_()
        for name, gradient in product(DIVERGENCES, ("forward", "backward")):
            loss, after, low = measure(
                partial(call, student, teacher, name, gradient, backend),
                partial(backward, student),
            )
            figures = (f"{x:.0f}" for x in (loss, after, loss + after, low))
            yield [PATHS[backend], f"{rows} x {columns}", name, gradient, *figures]


def run(out: Path | None, commit: str | None) -> int:
    """Prints the table; host.md and host.json in the folder."""
    torch.set_num_threads(1)
    header = machine.header(torch.device("cpu"), ("--suite", "host"), commit)
    rows = list(lines("torch"))
    stub.install()
    rows += lines("triton")
    about = [f"# Host time, {header['date']}", ""]
    about += [f"- {name}: {header['device'][name]}" for name in header["device"]]
    about += [f"- {name} {found}" for name, found in header["versions"].items() if found]
    about += [f"- fastkd at commit {header['commit']}", f"- `{header['command']}`", ""]
    text = "\n".join([*about, table((HEAD, *rows)), ""])
    print(text)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out / "host.md").write_text(text)
        found = {"header": header, "rows": [dict(zip(HEAD, row, strict=True)) for row in rows]}
        (out / "host.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0
