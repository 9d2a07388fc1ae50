"""Are the kernels right on this device? `python -m benchmarks.verify`: a line per case.

The schedules that users get, against the formulas in fp64 (tests/oracle.py) on some rows of each
case: loss and gradient at once, and one after the other with an upstream gradient of its own for
each row; all rows finite, none left out; results in memory that held NaN; two runs equal in every
bit.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastkd
from fastkd.divergences import BUILT_IN
from tests import oracle
from tests.closeness import assert_close, assert_zero

from . import machine

KINDS = {name: kind() for name, kind in BUILT_IN.items()}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# (rows, columns), the most telling first.
SHAPES = ((4096, 128256), (4096, 1000), (4096, 50257), (4096, 10), (64, 128256))
ODD = (512, 50257)
BEYOND = (16500, 131072)  # more than 2^31 logits
CHECKED = 24  # rows, spread over all
IGNORED = -100


class Case(NamedTuple):
    divergence: str
    dtype: str
    rows: int
    columns: int
    place: str = "plain"  # "padded", the columns beyond hold NaN; "sliced" rows begin anywhere
    kind: str = ""  # "in place"; "everything": all options at once, and masked columns

    def __str__(self) -> str:
        words = (self.divergence, self.dtype, f"{self.rows}x{self.columns}", self.place, self.kind)
        return " ".join(word for word in words if word)


def cases() -> Iterator[Case]:
    for dtype in DTYPES:
        yield Case("forward_kl", dtype, *SHAPES[0])
    for shape in SHAPES:
        for name in KINDS:
            for dtype in DTYPES:
                if (name, shape) != ("forward_kl", SHAPES[0]):
                    yield Case(name, dtype, *shape)
        if shape == SHAPES[0]:
            for name in ("forward_kl", "jsd"):
                for dtype in DTYPES:
                    yield Case(name, dtype, *ODD, "padded")
                    yield Case(name, dtype, *ODD, "sliced")
                    yield Case(name, dtype, *ODD, kind="everything")
            yield from in_place()
            yield Case("forward_kl", "bf16", *BEYOND, kind="in place")


def in_place() -> Iterator[Case]:
    """The gradient written over the student's logits, by each schedule."""
    for rows, columns in SHAPES:
        for place in ("plain", "sliced"):
            yield Case("jsd", "bf16", min(rows, 512), columns, place, "in place")


# Under a tool that makes everything slow: short rows, split ones, swept ones.
FEW = tuple(
    Case("jsd", "bf16", *shape, kind="in place")
    for shape in ((64, 10), (64, 1000), (8, 128256), (280, 20001))
)
# For the interpreter: resident rows, and one that is swept.
REHEARSED = (
    Case("forward_kl", "bf16", 2, 40), Case("forward_kl", "fp32", 2, 300, "padded"),
    Case("jsd", "fp32", 2, 41, "sliced", "in place"),
    Case("jsd", "bf16", 2, 40, kind="everything"),
)  # fmt: skip


# --- a case --------------------------------------------------------------------------------------


class Operands(NamedTuple):
    student: Tensor
    teacher: Tensor
    labels: Tensor | None
    options: dict[str, Any]


def operands(case: Case, device: torch.device) -> Operands:
    generator = torch.Generator(device).manual_seed(0)
    shape, dtype = (case.rows, case.columns), DTYPES[case.dtype]
    # In the logits' dtype: those beyond 2^31 would take four times the memory.
    teacher = 2 * torch.randn(shape, generator=generator, device=device, dtype=dtype)
    student = teacher + torch.randn(shape, generator=generator, device=device, dtype=dtype)
    options: dict[str, Any] = {"temperature": 2.0}
    labels = None
    if case.kind == "everything":
        rows = torch.rand(case.rows, generator=generator, device=device)
        labels = torch.randint(case.columns, shape[:1], generator=generator, device=device)
        masked = torch.arange(1, case.columns, 7, device=device)
        student[:, masked] = teacher[:, masked] = -torch.inf
        labels[labels % 7 == 1] = 0
        labels[::5] = IGNORED
        options = {"temperature": rows + 1, "alpha": 0.6, "label_smoothing": 0.0}
        options |= {"teacher_temperature": 3 - rows, "entropy_weight": 0.05}
    if case.place == "padded":
        student, teacher = (_inside(x, 0, 64 - case.columns % 64) for x in (student, teacher))
        options["vocab_size"] = case.columns
    elif case.place == "sliced":
        student, teacher = _inside(student, 1, 1)[:, 1:-1], _inside(teacher, 3, 1)[:, 3:-1]
    return Operands(student, teacher, labels, options)


def _inside(x: Tensor, before: int, after: int) -> Tensor:
    """In a wider tensor that is NaN elsewhere."""
    wide = x.new_full((len(x), before + x.size(1) + after), torch.nan)
    wide[:, before : before + x.size(1)] = x
    return wide


def loss_and_gradient(
    case: Case, given: Operands, upstream: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """The mean, by one launch; with an upstream gradient for each row, the rows by two."""
    student = given.student.detach().clone() if case.kind == "in place" else given.student.detach()
    student.requires_grad_()
    inplace = case.kind == "in place" and upstream is None
    loss = fastkd.distillation_loss(
        student.view_as(student) if inplace else student, given.teacher, given.labels,
        divergence=KINDS[case.divergence], backend="triton", inplace=inplace,
        reduction="mean" if upstream is None else "none", **given.options, **options,
    )  # fmt: skip
    assert isinstance(loss, Tensor)
    (gradient,) = torch.autograd.grad(loss, student, upstream)
    return loss.detach(), gradient


def faults(case: Case, device: torch.device) -> list[str]:
    """What is wrong, as sentences; an empty list says that all is well."""
    given = operands(case, device)
    upstream = torch.linspace(0.5, 1.5, case.rows, device=device)
    runs = [[loss_and_gradient(case, given, u) for _ in range(2)] for u in (None, upstream)]
    (mean, of_mean), (values, of_values) = (run[0] for run in runs)
    counted = torch.ones_like(upstream, dtype=torch.bool)
    if given.labels is not None:
        counted = given.labels != IGNORED
    found = [
        f"two runs differ ({what})"
        for what, (one, other) in zip(("mean", "rows"), runs, strict=True)
        if not all(map(torch.equal, one, other))
    ]
    del runs
    width = case.columns
    for what, gradient in (("mean", of_mean), ("rows", of_values)):
        largest = gradient.abs().amax(-1)
        if not largest.isfinite().all():
            found.append(f"a gradient is not finite ({what})")
        if not torch.equal(largest > 0, counted):
            found.append(f"a row was left out, or one that does not count was not ({what})")
        if gradient[:, width:].any():
            found.append(f"a padding column has a gradient ({what})")
    rows = torch.linspace(0, case.rows - 1, min(CHECKED, case.rows), device=device).long().unique()
    truth, of_truth = _truth(case, given, rows)
    n = int(counted.sum())
    for what, ours, right, kind in (
        ("mean", mean, values.double().sum() / n, "value"),
        ("rows", values[rows], truth, "value"),
        ("gradient of mean", of_mean[rows, :width], of_truth / n, "gradient"),
        ("gradient of rows", of_values[rows, :width], upstream[rows, None] * of_truth, "gradient"),
    ):  # fmt: skip
        found += _mismatch(what, ours, right, kind)
    return found


def _truth(case: Case, given: Operands, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of some rows: their values, and the gradient of the values' sum."""
    student = given.student.detach()[rows].double().requires_grad_()
    options = {
        name: value[rows] if isinstance(value, Tensor) else value
        for name, value in given.options.items()
    }
    kind = KINDS[case.divergence]
    values, _ = oracle.distillation_loss(
        student, given.teacher[rows].double(), None if given.labels is None else given.labels[rows],
        divergence=(case.divergence, dataclasses.asdict(kind)), reduction="none", **options,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(values.sum(), student)
    return values.detach(), gradient[:, : case.columns]


def _mismatch(what: str, ours: Tensor, truth: Tensor, kind: str) -> list[str]:
    try:
        assert_close(ours, truth, kind) if truth.any() else assert_zero(ours)
    except AssertionError as error:
        return [f"{what}: {error}"]
    return []


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.verify", description=__doc__)
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument(
        "--in-place", action="store_true", help="a small such case of each schedule"
    )
    parser.add_argument("--dry-run", action="store_true", help="small shapes, in the interpreter")
    parser.add_argument("--first", type=int, default=0, help="case, after others that are known")
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(given)
    device = machine.device_of(options.device or ("cpu" if options.dry_run else None))
    # What PyTorch allocates without a value is NaN from here on.
    torch.use_deterministic_algorithms(True, warn_only=True)
    chosen = REHEARSED if options.dry_run else tuple(cases())
    if options.in_place:
        chosen = REHEARSED[2:3] if options.dry_run else FEW
    wrong = options.first  # where one has broken the device, it goes on after it
    for at, case in enumerate(chosen[options.first :], start=options.first + 1):
        began = time.monotonic()
        try:
            found = faults(case, device)
        except Exception as error:  # what a driver or a compiler raises is the finding
            found = [f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"]
        wrong += bool(found)
        took = f"{time.monotonic() - began:.2f} s"
        print(f"{'WRONG' if found else 'ok':6}{case}: {'; '.join([*found, took])}", flush=True)
        if found and not machine.answers(device):
            machine.begin_again("benchmarks.verify", [*given, "--first", str(at)])
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
