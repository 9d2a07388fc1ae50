"""What tuning.py chooses, against its neighbours: `python -m benchmarks.choices`, a line each.

Loss and gradient in one launch with other tiles, warps and register caps, put in tuning's place in
this process. A choice whose answer differs from the default's is not timed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastkd

from . import machine
from .assembly import replaced
from .cases import case_of
from .measure import clock_for

PROBLEMS = (
    ("forward_kl", "llama3-8192"), ("jsd", "llama3-8192"), ("forward_kl", "gpt2-8192"),
    ("jsd", "gpt2-8192"), ("reverse_kl", "llama3-8192"), ("forward_kl", "llama3-64"),
    ("jsd", "llama3-64"),
)  # fmt: skip
REHEARSED = (("forward_kl", "1x260"),)
CALLS = 5
AGREE = 1e-5  # relative, of two losses


class Choice(NamedTuple):
    """None: tuning's own."""

    block: int | None = None  # columns of a tile
    warps: int | None = None
    cap: int | None = None  # registers of a thread; 0: no cap
    shared: int | None = None  # programs that share a row in one launch

    def __str__(self) -> str:
        words = (f"{name} {value}" for name, value in self._asdict().items() if value is not None)
        return ", ".join(words) or "tuning's"


CHOICES = (
    Choice(), *(Choice(cap=cap) for cap in (0, 64, 80, 96, 128)),
    Choice(2048, 4), Choice(2048, 4, 64), Choice(4096, 4), Choice(4096, 16, 64), Choice(8192, 8),
    Choice(8192, 16), Choice(8192, 16, 64), Choice(16384, 32, 64),
    *(Choice(shared=n) for n in (4, 8, 16)), Choice(cap=64, shared=8), Choice(cap=128, shared=8),
)  # fmt: skip


@contextmanager
def chosen(choice: Choice) -> Iterator[None]:
    """Sweeps take this choice, in place of one launch or of three."""
    from fastkd.kernels import logits, tuning
    from fastkd.kernels.arithmetic import INTERPRETED

    schedule, registers = logits.schedule, logits.registers

    def scheduled(*of: Any, **more: Any) -> Any:
        plan = schedule(*of, **more)
        if plan.kind != "sweep":
            return plan
        if choice.shared:  # in the interpreter a program waits for no other
            splits = 1 if INTERPRETED.value else choice.shared
            plan = plan._replace(kind="shared", splits=splits)
        lanes = plan.lanes if choice.block is None else choice.block // plan.vector
        return plan._replace(lanes=lanes, warps=choice.warps or plan.warps)

    def capped(device: torch.device, *of: Any) -> dict[str, Any]:
        if choice.cap is None or INTERPRETED.value:
            return registers(device, *of)
        return {"maxnreg": choice.cap or None}

    with ExitStack() as stack:
        stack.enter_context(replaced(logits, "schedule", scheduled))
        stack.enter_context(replaced(logits, "registers", capped))
        if choice.shared and choice.cap:
            stack.enter_context(replaced(tuning, "SHARED_REGISTERS", {}))
            stack.enter_context(replaced(tuning, "SHARED_OTHERS", (choice.cap, choice.cap)))
        yield


def call(divergence: str, student: Tensor, teacher: Tensor) -> Tensor:
    """Loss and gradient, which the loss holds."""
    kind = fastkd.Divergence.of_name(divergence)()
    loss = fastkd.distillation_loss(
        student, teacher, divergence=kind, temperature=2.0, gradient="forward", backend="triton"
    )
    assert isinstance(loss, Tensor)
    return loss.detach()


def milliseconds(action: Callable[[], object], device: torch.device) -> float:
    clock = clock_for(device)
    for _ in range(CALLS):
        clock.start()
        action()
        clock.stop()
    return statistics.median(clock.times())


def race(divergence: str, case: str, choices: Sequence[Choice], device: torch.device) -> None:
    shape = case_of(case)
    size = (shape.rows, shape.vocab)
    teacher = 2 * torch.randn(size, dtype=torch.bfloat16, device=device)
    student = (teacher + torch.randn(size, dtype=torch.bfloat16, device=device)).requires_grad_()
    action = partial(call, divergence, student, teacher)
    usual = right = 0.0
    for choice in choices:
        try:
            with chosen(choice):
                got = action().item()
                took = milliseconds(action, device)
        except Exception as error:  # a tile that does not fit, or registers that do not do
            said = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        else:
            usual, right = usual or took, right or got
            off = abs(got / right - 1)
            good = off <= AGREE
            said = f"{took:.4g} ms, x {took / usual:.3f}" if good else f"WRONG, off by {off:.1e}"
        print(f"{divergence} {case}, {choice}: {said}", flush=True)
        if not machine.answers(device):
            return


def races(small: bool) -> list[tuple[str, str, list[Choice]]]:
    """Programs that wait for each other come last: if they hang, the others are known."""
    first, *others = CHOICES[::5] if small else CHOICES
    parts = [[one for one in others if bool(one.shared) is waits] for waits in (False, True)]
    problems = REHEARSED if small else PROBLEMS
    return [(*problem, [first, *part]) for part in parts for problem in problems]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.choices", description=__doc__)
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--dry-run", action="store_true", help="a small shape, in the interpreter")
    parser.add_argument("--first", type=int, default=0, help="race, after others that are known")
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(given)
    device = machine.device_of(options.device or ("cpu" if options.dry_run else None))
    found = races(options.dry_run)
    for at, one in enumerate(found[options.first :], start=options.first + 1):
        race(*one, device)
        if not machine.answers(device):
            machine.begin_again("benchmarks.choices", [*given, "--first", str(at)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
