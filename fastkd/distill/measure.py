"""What a loss costs: its time in a training step, and the memory that it takes at its peak."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .methods import Loss


def now(device: torch.device) -> float:
    """Seconds, after all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def gradient(loss: Loss, student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """A loss and its gradient with respect to the student's logits [N, V]."""
    leaf = student.detach().requires_grad_()
    value = loss(leaf, teacher, labels)
    (result,) = torch.autograd.grad(value, leaf)
    return value.detach(), result


def peak_memory(call: Callable[[], Any], device: torch.device) -> int:
    """The most bytes that PyTorch's allocator held at once in a call, beyond those held before.

    On a CPU, from the profiler's record of every allocation: exact, unlike the resident set. What
    a first call allocates for good is counted too: call once before.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with (
        _quiet(),
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profiler,
    ):
        call()
    # The allocator's own account: positive when it gives memory, negative when it takes it back.
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [e for e in events if e.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Some builds of the profiler write to the terminal, past Python's sys.stderr."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
