"""`--suite host`: what a call costs beyond its arithmetic, in microseconds of one thread.

On the CPU 16 x 200 logits, whose arithmetic is small. Of a call on a GPU all but the device's work:
tensors lie on the CPU, and kernels are specialised and launched as on a GPU, by launches that do
nothing (stub.py). What the driver and a device's allocator take comes on top; so a step's launches
are counted, the kernels' and those of PyTorch's operators.
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
HEAD = (
    "path", "N x V", "divergence", "gradient", "loss, us", "backward, us", "both, us", "20 %",
    "operators", "launches",
)  # fmt: skip
# Operators that find memory, make a view or ask a tensor what it is: a device does nothing for
# them, but for what they call.
IDLE = frozenset(
    f"aten::{name}"
    for name in (
        "empty", "empty_like", "empty_strided", "new_empty", "as_strided", "expand", "unsqueeze",
        "squeeze", "select", "slice", "unflatten", "view", "reshape", "unbind", "detach", "detach_",
        "to", "lift_fresh", "promote_types", "result_type", "resolve_conj", "resolve_neg",
        "select_backward",
    )
)  # fmt: skip


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


def counts(step: Callable[[], object]) -> tuple[int, int]:
    """How many of PyTorch's operators a step calls, and how many launches a GPU would see."""
    step()  # what is kept is there
    stub.Launcher.calls = 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    events = [event for event in profile.events() if event.cpu_parent is None]
    return sum(map(_called, events)), stub.Launcher.calls + sum(map(_working, events))


def _called(event: Any) -> int:
    return 1 if event.name.startswith("aten::") else sum(map(_called, event.cpu_children))


def _working(event: Any) -> int:
    if event.name.startswith("aten::") and event.name not in IDLE:
        return 1
    return sum(map(_working, event.cpu_children))


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


def step(student: Tensor, teacher: Tensor, name: str, gradient: str, backend: str) -> None:
    backward(student, call(student, teacher, name, gradient, backend))


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
            called, launched = counts(partial(step, student, teacher, name, gradient, backend))
            figures = (f"{x:.0f}" for x in (loss, after, loss + after, low, called))
            launches = str(launched) if backend == "triton" else "-"
            yield [PATHS[backend], f"{rows} x {columns}", name, gradient, *figures, launches]


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
