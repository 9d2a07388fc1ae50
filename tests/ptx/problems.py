"""Operands, settings and what is compared; `loss` puts a problem through distillation_loss."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import mmap
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastkd
from tests import oracle
from tests.closeness import assert_close, assert_zero

# What a case runs: mismatches, as sentences.
Run = Callable[[], list[str]]

# --- operands ------------------------------------------------------------------------------------


def logits(shape: tuple[int, ...], seed: int, nature: str = "") -> tuple[Tensor, Tensor]:
    """Student and teacher in fp32.

    nature: "masked", a tenth of the columns of a row are -inf on both sides; "saturated", the
    student of every other row has all but 1e-5 of its probability on one column; "apart", a column
    is -inf on the teacher's side alone.
    """
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(shape, generator=generator) * 2
    student = teacher + torch.randn(shape, generator=generator)
    if nature == "saturated":
        rows = student.view(-1, shape[-1])[::2]
        rows[:, shape[-1] // 3] = rows.logsumexp(-1) + math.log(1e5)
    if nature == "apart":
        teacher[..., 7] = -torch.inf
    if nature == "masked":
        mask = torch.rand(shape, generator=generator) < 0.1
        mask[..., 0] = mask[..., -1] = False
        student[mask] = teacher[mask] = -torch.inf
    return student, teacher


def placed(clean: Tensor, place: str, side: int) -> Tensor:
    """The rows [O, I, V] in memory that is NaN elsewhere; the last dimension may be wider."""
    o, i, v = clean.shape
    nan = functools.partial(torch.full, fill_value=float("nan"), dtype=clean.dtype)
    if place.startswith("far"):  # rows 2^30 or 2^31 entries apart, in memory that is not there
        stride = (1 << int(place[3:])) + 16
        size = ((o * i - 1) * stride + v) * clean.element_size()
        no_reserve = 0x4000
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
        whole = torch.frombuffer(memory, dtype=clean.dtype)
        view = whole.as_strided((o, i, v), (i * stride, stride, 1))
    else:
        view = {
            "plain": lambda: nan((o, i, v)),
            "slice": lambda: nan((o, i, v + 1))[..., 1:],  # rows begin at an odd entry
            "slice3": lambda: nan((o, i, v + 5))[..., 1 + 2 * side : 1 + 2 * side + v],
            # As a language model's logits are shifted against its labels.
            "shifted": lambda: nan((o, i + 1, v))[:, side : side + i],
            "transposed": lambda: nan((i, o, v)).transpose(0, 1),
            "wide": lambda: nan((o, i, v + 3 * (1 + side))),
            "wide8": lambda: nan((o, i, v + 8)),
            "pad16": lambda: nan((o, i, v // 16 * 16 + 16)),  # as vocabularies are padded
            "teacher16": lambda: nan((o, i, v + side * (16 - v % 16))),
            "stride16": lambda: nan((o, i, -(-v // 16) * 16))[..., :v],
        }[place]()
    view[..., :v] = clean
    return view


class Same(torch.autograd.Function):
    """The leaf's own memory, as a tensor that is no leaf and no view."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        whole = torch.tensor([], dtype=x.dtype)
        return whole.set_(x.untyped_storage(), x.storage_offset(), x.size(), x.stride())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clone()


# --- comparison ----------------------------------------------------------------------------------


def mismatch(name: str, ours: Tensor, truth: Tensor, kind: str) -> list[str]:
    try:
        if truth.count_nonzero():
            assert_close(ours, truth, kind)
        else:
            assert_zero(ours)
    except AssertionError as error:
        return [f"{name}: {error}"]
    return []


def compared(ours: dict[str, Tensor], truth: dict[str, Tensor], columns: int = 0) -> list[str]:
    """Values and gradients by name; a gradient beyond the columns must be 0."""
    wrong = []
    for name, true in truth.items():
        mine, kind = ours[name], "gradient" if name.startswith("gradient") else "value"
        whole = columns and name in ("gradient of student", "gradient of teacher")
        if whole and mine.size(-1) > columns:
            wrong += mismatch(f"{name}, padding", mine[..., columns:], torch.zeros(1), kind)
            mine = mine[..., :columns]
        wrong += mismatch(name, mine, true, kind)
    return wrong


# --- distillation_loss ---------------------------------------------------------------------------


def settings(kind: str, rows: tuple[int, int], columns: int, seed: int) -> dict[str, Any]:
    """Options of `distillation_loss` for rows of such columns."""
    generator = torch.Generator().manual_seed(seed)

    def each() -> Tensor:
        return torch.rand(rows, generator=generator) + 0.8

    labels = torch.randint(0, columns, rows, generator=generator)
    flat = labels.view(-1)
    flat[0] = columns - 1
    if flat.numel() > 2:
        flat[1], flat[flat.numel() // 2] = 0, -100
    everything = {
        "labels": labels, "label_smoothing": 0.1, "alpha": 0.6, "entropy_weight": 0.05,
        "return_metrics": True,
    }  # fmt: skip
    made: dict[str, Callable[[], dict[str, Any]]] = {
        "plain": lambda: {"temperature": 2.0},
        "rows": lambda: {"temperature": each(), "scale_by_temperature": False},
        "labels": lambda: {"temperature": 1.0, "labels": labels.int(), "alpha": 0.5},
        "full": lambda: {**everything, "temperature": each(), "teacher_temperature": each() + 0.2},
        # Scaled by T^2, the loss hardly depends on T: two terms of its derivative would cancel.
        "std": lambda: {"temperature": 2.0, "standardize": True, "scale_by_temperature": False},
        "stdfull": lambda: {
            **everything, "temperature": 1.5, "teacher_temperature": 2.5, "standardize": True,
        },
        "heads": lambda: {"temperature": 2.0},
        "heads full": lambda: {
            "labels": (torch.rand((*rows, columns), generator=generator) < 0.3).float(),
            "alpha": 0.6, "entropy_weight": 0.05, "return_metrics": True, "temperature": each(),
            "teacher_temperature": each() + 0.2,
            "weight": (torch.arange(flat.numel()) % 3 != 1).float().view(rows),
        },
    }  # fmt: skip
    return made[kind]()


def loss(
    divergence: fastkd.Divergence, shape: tuple[int, int, int], dtype: torch.dtype, mode: str,
    place: str, kind: str, seed: int, nature: str = "", upstream: float = 1.0,
    teacher_dtype: torch.dtype | None = None,
) -> Run:  # fmt: skip
    """mode: what the student gets; see `run_ours`."""

    def run() -> list[str]:
        student, teacher = logits(shape, seed, nature)
        student, teacher = student.to(dtype), teacher.to(teacher_dtype or dtype)
        options = settings(kind, shape[:2], shape[2], seed)
        z, y = placed(student, place, 0), placed(teacher, place, 1)
        before = y.view(torch.int16).clone()
        ours = run_ours(z, y, divergence, options, mode, shape[2], upstream)
        truth = run_truth(student, teacher, divergence, options, mode, upstream)
        wrong = compared(ours, truth, shape[2])
        if not torch.equal(y.detach().view(torch.int16), before):
            wrong.append("the teacher's logits have changed")
        return wrong

    return run


def run_ours(
    z: Tensor, y: Tensor, divergence: fastkd.Divergence, options: dict[str, Any], mode: str,
    columns: int, upstream: float,
) -> dict[str, Tensor]:  # fmt: skip
    """mode: "forward" the loss alone, "backward" with a gradient by a launch of its own, "all"
    with those of the teacher and the temperatures too, "fused" in one launch, "inplace" likewise
    where the logits are."""
    rows = mode in ("forward", "backward", "all")
    gradient = {"forward": "auto", "backward": "backward", "all": "backward"}.get(mode, "forward")
    options = {**options, "gradient": gradient, "reduction": "none" if rows else "mean"}
    if z.size(-1) != columns or y.size(-1) != columns:
        options["vocab_size"] = columns
    leaves = leaves_of(z, y, options, mode, torch.float32)
    z = leaves.get("student", z)
    if mode == "inplace":
        z, options["inplace"] = Same.apply(z), True
    if mode == "all":
        options["teacher_grad"] = True
    with torch.no_grad() if mode == "forward" else contextlib.nullcontext():
        labels = options.pop("labels", None)
        found = fastkd.distillation_loss(
            z, leaves.get("teacher", y), labels, divergence=divergence, backend="triton",
            **{**options, **{k: x for k, x in leaves.items() if k in options}},
        )  # fmt: skip
    value, metrics = found if options.get("return_metrics") else (found, None)
    return outcome_of(value, metrics, leaves, mode, upstream)


def run_truth(
    z: Tensor, y: Tensor, divergence: fastkd.Divergence, options: dict[str, Any], mode: str,
    upstream: float,
) -> dict[str, Tensor]:  # fmt: skip
    options = {**options, "reduction": "none" if mode in ("forward", "backward", "all") else "mean"}
    shown = options.pop("return_metrics", False)
    leaves = leaves_of(z.double(), y.double(), options, mode, torch.float64)
    value, metrics = oracle.distillation_loss(
        leaves.get("student", z), leaves.get("teacher", y), options.pop("labels", None),
        divergence=(divergence.name, dataclasses.asdict(divergence)),
        **{**options, **{k: x for k, x in leaves.items() if k in options}},
    )  # fmt: skip
    return outcome_of(value, metrics if shown else None, leaves, mode, upstream)


def leaves_of(
    z: Tensor, y: Tensor, options: dict[str, Any], mode: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """What gets a gradient, by name."""
    if mode == "forward":
        return {}
    leaves = {"student": z}
    if mode == "all":
        leaves["teacher"] = y
        for name in ("temperature", "teacher_temperature"):
            if name in options:
                leaves[name] = torch.as_tensor(options[name]).to(dtype).clone()
    return {name: x.detach().requires_grad_() for name, x in leaves.items()}


def outcome_of(
    value: Tensor, metrics: Any, leaves: dict[str, Tensor], mode: str, upstream: float
) -> dict[str, Tensor]:
    if leaves and value.dim():
        weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view(value.shape)
        if mode == "backward" and value.numel() > 3:
            weights.view(-1)[-1] = 0  # a row that the backward may skip
        value.backward(weights)
    elif leaves:
        (value * upstream).backward()
    found = {"loss": value.detach()}
    if metrics is not None:
        shown = metrics._asdict().items()
        found |= {f"metric {name}": x for name, x in shown if x is not None}
    grads = {f"gradient of {name}": x.grad for name, x in leaves.items()}
    return found | {name: x for name, x in grads.items() if x is not None}
