"""Problems that ask for a schedule, a launcher or another function: what `loss` does not reach."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import fastkd
from tests import oracle
from tests.schedules import forced

from .problems import (
    Run,
    Same,
    compared,
    leaves_of,
    logits,
    mismatch,
    outcome_of,
    placed,
    run_ours,
    run_truth,
    settings,
)

# --- shared rows ---------------------------------------------------------------------------------


def shared(
    divergence: fastkd.Divergence, shape: tuple[int, int, int], dtype: torch.dtype, mode: str,
    place: str, kind: str, seed: int, nature: str = "", bits: bool = True,
) -> Run:  # fmt: skip
    """Rows that four programs share, by two groups in turns.

    bits: whether three launches give the same ones; not where they sum in another order.
    """

    def run() -> list[str]:
        from fastkd.kernels import logits as launchers

        student, teacher = (x.to(dtype) for x in logits(shape, seed, nature))
        options = settings(kind, shape[:2], shape[2], seed)
        found = {}
        for plan in ("sweep", "shared"):
            z, y = placed(student, place, 0), placed(teacher, place, 1)
            vector = 16 // dtype.itemsize
            with (
                forced((plan, 1024 // vector, vector, 4, 2)),
                patch.object(launchers, "at_once", lambda *_: (8, {})),
            ):
                found[plan] = run_ours(z, y, divergence, dict(options), mode, shape[2], 1.0)
        truth = run_truth(student, teacher, divergence, options, mode, 1.0)
        wrong = compared(found["shared"], truth, shape[2])
        for name, ours in found["shared"].items():
            if bits and not torch.equal(ours.nan_to_num(), found["sweep"][name].nan_to_num()):
                wrong.append(f"{name} is not that of three launches")
        return wrong

    return run


class Recorded:
    """A kernel, and its launches as a graph would hold them: by what they were given."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches: list[tuple[Any, dict[str, Any]]] = []

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(**arguments: Any) -> None:
            self.launches.append((grid, arguments))
            self.kernel[grid](**arguments)

        return launch


def replayed(divergence: fastkd.Divergence, shape: tuple[int, int, int]) -> Run:
    """Shared rows in a graph: fills and launch again, twice, on other logits in the same memory.

    Words of the replay before have the flags of this one: none may be left.
    """

    def run() -> list[str]:
        from fastkd.kernels import logits as launchers
        from fastkd.problem import Coefficients
        from tests.test_kernels import problem_of

        rows = shape[0] * shape[1]
        batches = [[x.bfloat16() for x in logits(shape, seed)] for seed in range(3)]
        z, y = (x.clone() for x in batches[0])
        problem = problem_of(z, y, divergence, torch.full((rows,), 2.0))
        factors = Coefficients(torch.full((rows,), 1.25), None, None)
        fills: list[Tensor] = []
        zeros, recorded = torch.zeros, Recorded(launchers.shared)

        def filled(*size: int, **options: Any) -> Tensor:
            fills.append(zeros(*size, **options))
            return fills[-1]

        def call(plan: str) -> tuple[Tensor, Tensor]:
            with (
                forced((plan, 128, 8, 4, 2)),
                patch.object(launchers, "at_once", lambda *_: (8, {})),
                patch.object(launchers, "shared", recorded),
                patch.object(torch, "zeros", filled),
            ):
                loss, _, gradient = launchers.fused(problem, factors, False, None)
            return loss, gradient

        found = call("shared")
        ((grid, arguments),) = recorded.launches
        wrong = []
        for batch in batches[1:]:
            z.copy_(batch[0])
            y.copy_(batch[1])
            for fill in fills:
                fill.zero_()
            for x in found:
                x.fill_(float("nan"))
            recorded.kernel[grid](**arguments)
            for ours, expected in zip(found, call("sweep"), strict=True):
                if not torch.equal(ours, expected):
                    wrong.append("a replay is not what three launches are")
        return wrong

    return run


# --- teachers that list columns ------------------------------------------------------------------


def listed(
    divergence: fastkd.Divergence, shape: tuple[int, int, int], dtype: torch.dtype, mode: str,
    place: str, count: int, tail: str,
) -> Run:  # fmt: skip
    """Beside a teacher that lists columns; the truth is the oracle's, of events as columns."""

    def run() -> list[str]:
        student, other = logits(shape, shape[2])
        student = student.to(dtype)
        teacher = fastkd.TopK.from_logits(other, count, tail=tail)
        temperature = torch.linspace(0.8, 1.6, shape[0] * shape[1]).view(shape[:2])
        options = {
            "divergence": divergence, "temperature": temperature, "teacher_temperature": 1.0,
            "scale_by_temperature": False, "reduction": "none" if mode == "all" else "mean",
        }  # fmt: skip
        leaves = leaves_of(placed(student, place, 0), other, options, "backward", torch.float32)
        leaves = {name: x.requires_grad_() for name, x in leaves.items()}
        if mode == "all":
            leaves["temperature"] = temperature.clone().requires_grad_()
        z = leaves["student"]
        value = fastkd.distillation_loss(
            Same.apply(z) if mode == "inplace" else z, teacher, backend="triton",
            inplace=mode == "inplace", gradient="backward" if mode == "all" else "forward",
            vocab_size=shape[2], **{**options, **{k: x for k, x in leaves.items() if k in options}},
        )  # fmt: skip
        exact = {"student": student.double().requires_grad_()}
        exact["temperature"] = temperature.double().requires_grad_()
        scaled = exact["student"] / exact["temperature"][..., None]
        rest = scaled.scatter(-1, teacher.indices, -torch.inf).logsumexp(-1, keepdim=True)
        q = torch.cat([scaled.gather(-1, teacher.indices), rest], -1)
        last = torch.full_like(rest, -torch.inf)
        if tail == "bucket":
            last = teacher.tail_log_prob.double()[..., None]
        true, _ = oracle.distillation_loss(
            q, torch.cat([teacher.log_probs.double(), last], -1), reduction=options["reduction"],
            divergence=(divergence.name, dataclasses.asdict(divergence)),
        )  # fmt: skip
        exact = {name: x for name, x in exact.items() if name in leaves}
        return compared(
            outcome_of(value, None, leaves, mode, 1.0), outcome_of(true, None, exact, mode, 1.0),
            shape[2],
        )  # fmt: skip

    return run


# --- launchers -----------------------------------------------------------------------------------


def in_place(
    divergence: fastkd.Divergence, shape: tuple[int, int, int], dtype: torch.dtype, place: str,
    labelled: bool,
) -> Run:  # fmt: skip
    """`logits.fused` in the student's own slice; nothing beside it may change."""

    def run() -> list[str]:
        from fastkd.kernels import logits as launchers
        from fastkd.problem import Coefficients
        from tests.test_kernels import problem_of

        (o, i, columns), rows = shape, shape[0] * shape[1]
        student, teacher = (x.to(dtype) for x in logits(shape, 0))
        z, y = placed(student, place, 0), placed(teacher, place, 1)
        memory = torch.tensor([], dtype=dtype).set_(z.untyped_storage())
        beside = torch.ones(len(memory), dtype=torch.bool)
        beside.as_strided(z.size(), z.stride(), z.storage_offset())[...] = False
        memory[beside] = 7.0
        labels = torch.arange(rows) * (columns // rows) if labelled else None
        counted = torch.arange(rows) % 3 != 1 if labelled else None
        temperature = torch.full((rows,), 2.0)
        problem = problem_of(
            z, y, divergence, temperature, None, labels, counted, 0.1 if labelled else 0.0
        )
        kd, ce = torch.full((rows,), 1.25), torch.full((rows,), 0.5) if labelled else None
        value, _, gradient = launchers.fused(problem, Coefficients(kd, ce, None), False, z)

        leaf = student.double().requires_grad_()
        true, _ = oracle.distillation_loss(
            leaf, teacher, None if labels is None else labels.view(o, i),
            divergence=(divergence.name, dataclasses.asdict(divergence)), temperature=2.0,
            alpha=1.25 / 1.75 if labelled else 1.0, scale_by_temperature=False,
            label_smoothing=0.1 if labelled else 0.0, reduction="none",
            weight=None if counted is None else counted.view(o, i).double(),
        )  # fmt: skip
        true = true.flatten() * (1.75 if labelled else 1.25)
        true.sum().backward()
        assert leaf.grad is not None
        wrong = mismatch("loss", value, true, "value")
        wrong += mismatch("gradient", gradient.view(shape), leaf.grad, "gradient")
        wrong += mismatch("memory beside the slice", memory[beside] - 7, torch.zeros(1), "value")
        return wrong

    return run


def shards(
    divergence: fastkd.Divergence, edges: tuple[int, ...], options: dict[str, Any]
) -> Run:  # fmt: skip
    """Owners of columns, who gather between the launches: see tests/test_shards.py."""

    def run() -> list[str]:
        from tests import test_shards

        torch.manual_seed(0)
        student, teacher, temperature = test_shards.rows(2)
        case = test_shards.Case(divergence, student, teacher, temperature, **options)
        try:
            test_shards.hold(case, edges, "triton")
        except AssertionError as error:
            return [str(error)]
        return []

    return run


# --- kl_div --------------------------------------------------------------------------------------


def kl_div(
    shape: tuple[int, ...], target_shape: tuple[int, ...], dtype: torch.dtype, log_target: bool,
    reduction: str, trains: str, place: str = "plain",
) -> Run:  # fmt: skip
    """trains: which of x, the input, and t, the target, get a gradient."""

    def run() -> list[str]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(shape, generator=generator).log_softmax(-1).to(dtype)
        t = torch.randn(target_shape, generator=generator).log_softmax(-1)
        t = (t if log_target else t.exp()).to(dtype)
        if not log_target:
            t.view(-1)[:: max(t.numel() // 3, 1)] = 0
        if place == "slice":
            wide = torch.full((*shape[:-1], shape[-1] + 3), float("nan"), dtype=dtype)
            wide[..., 1:-2] = x
            x = wide[..., 1:-2]
        elif place == "transposed":
            x = x.transpose(0, 1).contiguous().transpose(0, 1)

        def outcome(function: Any, a: Tensor, b: Tensor) -> dict[str, Tensor]:
            leaves = {"x": a.detach(), "t": b.detach()}
            for name in trains:
                leaves[name].requires_grad_()
            value = function(*leaves.values(), reduction=reduction, log_target=log_target)
            if trains:
                value.backward(torch.full_like(value, 1.5))
            grads = {f"gradient of {name}": leaves[name].grad for name in trains}
            return {"loss": value.detach()} | {k: x for k, x in grads.items() if x is not None}

        return compared(
            outcome(fastkd.kl_div, x, t), outcome(oracle.kl_div, x.double(), t.double())
        )

    return run
