"""Problems that are put through fastkd's API or its launchers, and compared with the oracle."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import mmap
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import fastkd
from tests import oracle
from tests.closeness import assert_close, assert_zero
from tests.schedules import forced

# What a case runs: mismatches, as sentences.
Run = Callable[[], list[str]]

# --- operands ------------------------------------------------------------------------------------


def logits(shape: tuple[int, ...], seed: int, nature: str = "") -> tuple[Tensor, Tensor]:
    """Student and teacher in fp32.

    nature: "masked", a tenth of the columns of a row are -inf on both sides; "saturated", the
    student of every other row has all but 1e-5 of its probability on one column.
    """
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(shape, generator=generator) * 2
    student = teacher + torch.randn(shape, generator=generator)
    if nature == "saturated":
        rows = student.view(-1, shape[-1])[::2]
        rows[:, shape[-1] // 3] = rows.logsumexp(-1) + math.log(1e5)
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


class _Same(torch.autograd.Function):
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
    """mode: what the student gets; see `_ours`."""

    def run() -> list[str]:
        student, teacher = logits(shape, seed, nature)
        student, teacher = student.to(dtype), teacher.to(teacher_dtype or dtype)
        options = settings(kind, shape[:2], shape[2], seed)
        z, y = placed(student, place, 0), placed(teacher, place, 1)
        before = y.view(torch.int16).clone()
        ours = _ours(z, y, divergence, options, mode, shape[2], upstream)
        truth = _truth(student, teacher, divergence, options, mode, upstream)
        wrong = compared(ours, truth, shape[2])
        if not torch.equal(y.detach().view(torch.int16), before):
            wrong.append("the teacher's logits have changed")
        return wrong

    return run


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
                found[plan] = _ours(z, y, divergence, dict(options), mode, shape[2], 1.0)
        truth = _truth(student, teacher, divergence, options, mode, 1.0)
        wrong = compared(found["shared"], truth, shape[2])
        for name, ours in found["shared"].items():
            if bits and not torch.equal(ours.nan_to_num(), found["sweep"][name].nan_to_num()):
                wrong.append(f"{name} is not that of three launches")
        return wrong

    return run


def _ours(
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
    leaves = _leaves(z, y, options, mode, torch.float32)
    z = leaves.get("student", z)
    if mode == "inplace":
        z, options["inplace"] = _Same.apply(z), True
    if mode == "all":
        options["teacher_grad"] = True
    with torch.no_grad() if mode == "forward" else contextlib.nullcontext():
        labels = options.pop("labels", None)
        found = fastkd.distillation_loss(
            z, leaves.get("teacher", y), labels, divergence=divergence, backend="triton",
            **{**options, **{k: x for k, x in leaves.items() if k in options}},
        )  # fmt: skip
    value, metrics = found if options.get("return_metrics") else (found, None)
    return _outcome(value, metrics, leaves, mode, upstream)


def _truth(
    z: Tensor, y: Tensor, divergence: fastkd.Divergence, options: dict[str, Any], mode: str,
    upstream: float,
) -> dict[str, Tensor]:  # fmt: skip
    options = {**options, "reduction": "none" if mode in ("forward", "backward", "all") else "mean"}
    shown = options.pop("return_metrics", False)
    leaves = _leaves(z.double(), y.double(), options, mode, torch.float64)
    value, metrics = oracle.distillation_loss(
        leaves.get("student", z), leaves.get("teacher", y), options.pop("labels", None),
        divergence=(divergence.name, dataclasses.asdict(divergence)),
        **{**options, **{k: x for k, x in leaves.items() if k in options}},
    )  # fmt: skip
    return _outcome(value, metrics if shown else None, leaves, mode, upstream)


def _leaves(
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


def _outcome(
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
        leaves = _leaves(placed(student, place, 0), other, options, "backward", torch.float32)
        leaves = {name: x.requires_grad_() for name, x in leaves.items()}
        if mode == "all":
            leaves["temperature"] = temperature.clone().requires_grad_()
        z = leaves["student"]
        value = fastkd.distillation_loss(
            _Same.apply(z) if mode == "inplace" else z, teacher, backend="triton",
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
            _outcome(value, None, leaves, mode, 1.0), _outcome(true, None, exact, mode, 1.0),
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
