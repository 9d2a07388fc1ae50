"""A student's training steps, eager and with fastkd: `python -m benchmarks.training`.

Small GPTs with a real vocabulary, the teacher with random weights, which a student can learn as
well as any. Same batches, same first weights: the losses must agree, time and memory are the loss's
doing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from fastkd.distill.gpt import GPT, Shape, optimizer
from fastkd.distill.measure import now

from . import machine

TEMPERATURE = 2.0
TEACHER, STUDENT = Shape(128256, 512, 1024, 4, 16), Shape(128256, 512, 512, 4, 8)
BATCH, STEPS = (16, 512), 30
SMALL, SMALL_BATCH, SMALL_STEPS = Shape(300, 16, 32, 1, 2), (2, 16), 2
WARM = 2  # steps that are not timed


def eager(student: Tensor, teacher: Tensor) -> Tensor:
    q = F.log_softmax(student / TEMPERATURE, -1)
    p = F.softmax(teacher / TEMPERATURE, -1)
    return F.kl_div(q, p, reduction="batchmean") * TEMPERATURE**2


def ours(student: Tensor, teacher: Tensor) -> Tensor:
    loss = fastkd.distillation_loss(student, teacher, temperature=TEMPERATURE)
    assert isinstance(loss, Tensor)
    return loss


def in_place(student: Tensor, teacher: Tensor) -> Tensor:
    loss = fastkd.distillation_loss(student, teacher, temperature=TEMPERATURE, inplace=True)
    assert isinstance(loss, Tensor)
    return loss


def run(name: str, device: torch.device, small: bool) -> None:
    """A line every few steps, and one with the time of a step and the peak of memory."""
    torch.manual_seed(0)
    of_teacher, of_student = (SMALL, SMALL) if small else (TEACHER, STUDENT)
    batch, steps = (SMALL_BATCH, SMALL_STEPS) if small else (BATCH, STEPS)
    dtype = torch.float32 if small else torch.bfloat16
    with device:  # 200 million weights that a GPU draws at once, and one thread in seconds
        teacher, student = GPT(of_teacher), GPT(of_student)
    teacher.requires_grad_(False)
    teacher.tokens.weight.mul_(10)  # or its distributions would be flat
    stepper, loss_of = optimizer(student, 1e-3), LOSSES[name]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    took = []
    for step in range(steps):
        ids = torch.randint(of_student.vocabulary, batch, device=device)
        began = now(device)
        with torch.autocast(device.type, dtype, enabled=not small):
            taught, learned = teacher(ids).flatten(0, 1), student(ids).flatten(0, 1)
        loss = loss_of(learned, taught)
        loss.backward()
        stepper.step()
        stepper.zero_grad()
        took.append(now(device) - began)
        if step % 5 == 0 or step == steps - 1:
            print(f"{name}, step {step}: loss {loss.item():.6g}", flush=True)
    usual = sorted(took[WARM:] or took)[len(took[WARM:] or took) // 2]
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    print(f"{name}: {1e3 * usual:.4g} ms a step, peak {peak:.2f} GiB", flush=True)


LOSSES = {"fastkd": ours, "fastkd in place": in_place, "eager": eager}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.training", description=__doc__)
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--dry-run", action="store_true", help="tiny models: rehearse only")
    options = parser.parse_args(arguments)
    device = machine.device_of(options.device or ("cpu" if options.dry_run else None))
    began = time.monotonic()
    for name in LOSSES:
        run(name, device, options.dry_run)
    print(f"{time.monotonic() - began:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
