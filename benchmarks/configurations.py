"""Calls of the launchers, and the kernels that are compiled for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch

import fastkd
from fastkd.divergences import BUILT_IN, ROW_LOSSES
from fastkd.forms import Events
from fastkd.kernels import tuning
from fastkd.problem import Coefficients, Problem
from fastkd.sharding import run

from . import model
from .assembly import Binary, compiled, read

TARGETS = tuple(model.GPUS)
NAMES = tuple(BUILT_IN)
ROWS = tuple(kind.name for kind in ROW_LOSSES if kind.has_device_function)
EVERYTHING = (*NAMES, *ROWS, "kl_div")
BF16, FP32 = torch.bfloat16, torch.float32


class Configuration(NamedTuple):
    """A call of a launcher; `everything`: all options at once, for kl_div log_target."""

    name: str
    launcher: str
    rows: int
    columns: int
    dtype: torch.dtype = BF16
    everything: bool = False
    cluster: int = 0  # tuning.COLUMNS
    shared: int = 0  # tuning.SHARED
    first: int = 0  # columns of a wider tensor before these
    beyond: int = 0  # and after them


# How much is compiled: all, what stands for it in CI, and what does in haste.
PARTS = ("all", "few", "quick")
# The divergences of CI: one of each kind of row constant on sm_90, on the other targets a dear one.
FEW = {"sm_90": ("forward_kl", "reverse_kl", "jsd", "renyi", "kl_div")}
OTHER_FEW = ("jsd",)

# Those of every target and divergence.
MAIN = (
    Configuration("sweep", "fused", 4096, 128256),
    Configuration("resident", "fused", 4096, 1000),
    Configuration("ten columns", "fused", 65536, 10),
    Configuration("hundred columns", "fused", 65536, 100),
    Configuration("everything", "fused", 4096, 128256, everything=True),
)
# Those of every divergence on sm_90.
MORE = (
    Configuration("forward", "forward", 4096, 128256),
    Configuration("backward", "backward", 4096, 128256),
    Configuration("split", "fused", 64, 128256),
    Configuration("fp32", "fused", 4096, 128256, FP32),
    Configuration("odd", "fused", 8192, 50257),
    Configuration("everything resident", "fused", 4096, 1000, everything=True),
    Configuration("everything, ten columns", "fused", 65536, 10, everything=True),
    Configuration("everything, hundred columns", "fused", 65536, 100, everything=True),
)
# Of every divergence on sm_90, of a few on NVIDIA's later targets; in CI of forward KL, as Triton
# takes up to half a minute for one.
SHARED = Configuration("shared", "fused", 4096, 128256, shared=8)
CLUSTER = Configuration("cluster", "fused", 4096, 128256, cluster=tuning.CLUSTER * tuning.SHARE)
# Those of forward KL on sm_90: what it shares with every other, and heads of sigmoids.
OTHERS = (
    Configuration("slices", "in place", 8192, 50257, first=3),
    Configuration("slices split", "in place", 64, 128253, first=3),
    Configuration("slices fp32", "in place", 8192, 50257, FP32, first=3),
    Configuration("slices, own gradient", "fused", 8192, 50257, first=3),
    Configuration("padded, 252 columns", "fused", 4, 252, beyond=4),
    Configuration("padded fp32, 250 columns", "fused", 4, 250, FP32, beyond=6),
    Configuration("standardized", "standardized", 4096, 128256),
    Configuration("standardized resident", "standardized", 4096, 1000),
    Configuration("multi-label", "multi-label", 4096, 32000),
    Configuration("multi-label resident", "multi-label", 4096, 1000),
    Configuration("multi-label everything", "multi-label", 4096, 32000, everything=True),
)
# Beside a teacher that lists LISTED columns: of every target, and on sm_90.
LISTED = 64
OF_LISTED = {
    "forward_kl": (Configuration("listed", "listed", 4096, 128256),),
    "jsd": (Configuration("listed, everything", "listed", 4096, 128256, everything=True),),
}
MORE_LISTED = (
    Configuration("listed, split", "listed", 64, 128256),
    Configuration("listed, odd", "listed", 8192, 50257),
)
# Every width that a resident row can have; on sm_90.
WIDTHS = tuple(
    Configuration(f"resident {width}", "fused", 65536, width)
    for width in (5, 16, 32, 37, 64, 128, 256, 512, 1024, 2048, 4096)
)
ALL_WIDTHS = ("forward_kl", "jsd")  # in CI of the former


# kl_div: per entry a value or their sum, and the gradients of one side or of both.
KL_DIV = tuple(
    Configuration(f"{launcher}{of} {name}", launcher, 1, 1 << 24, dtype, everything=bool(of))
    for launcher in ("values", "sum", "input's gradient", "both gradients")
    for name, dtype in (("bf16", BF16), ("fp32", FP32))
    for of in ("", " of logs")
)


class Measured(NamedTuple):
    """A kernel of a configuration."""

    target: str
    divergence: str
    configuration: str
    binary: Binary
    entry: int  # bytes of a logit of each side together


def configurations(target: str, name: str, part: str = "all") -> Iterator[Configuration]:
    if name == "kl_div":
        yield from KL_DIV
        return
    yield from MAIN
    yield from OF_LISTED.get(name, ())
    if has_clusters() and (target == "sm_90" or (target == "sm_100" and name in ALL_WIDTHS)):
        yield CLUSTER
    shared = NAMES if target == "sm_90" else ALL_WIDTHS if target == "sm_100" else ()
    if name in shared and (part == "all" or name == "forward_kl"):
        yield SHARED
    if target == "sm_90":
        yield from MORE
        if name == "forward_kl":
            yield from OTHERS
            yield from MORE_LISTED
        if name in ALL_WIDTHS and (part == "all" or (part, name) == ("few", "forward_kl")):
            yield from WIDTHS


def has_clusters() -> bool:
    """Whether this Triton compiles for them."""
    return tuning.TRITON >= tuning.CLUSTERS


def tasks(part: str = "all") -> list[tuple[str, str]]:
    """(target, divergence)."""
    if part == "quick":
        names = ("forward_kl", "jsd", "kl_div")
        return [*(("sm_90", name) for name in names), ("gfx942", "jsd")]
    return [
        (target, name)
        for target in TARGETS
        for name in (EVERYTHING if part == "all" else FEW.get(target, OTHER_FEW))
    ]


def measure(target: str, name: str, chosen: Iterable[Configuration]) -> list[Measured]:
    processors = model.GPUS[target].processors
    kernels = [
        (one, kernel)
        for one in chosen
        for kernel in compiled(target, call_of(name, one), processors, one.cluster, one.shared)
    ]
    return [
        Measured(
            target, name, one.name, binary, (2 - (one.launcher == "listed")) * one.dtype.itemsize
        )
        for (one, _), binary in zip(kernels, read(target, [k for _, k in kernels]), strict=True)
    ]


def call_of(name: str, one: Configuration) -> Callable[[], object]:
    """The launcher on tensors that have a shape and nothing else."""
    from fastkd.kernels import bernoulli, elementwise, events, logits, moments

    rows, full = one.rows, one.everything

    def meta(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    if name == "kl_div":
        x, t, u, w = (meta(rows, one.columns, dtype=one.dtype) for _ in range(4))
        if one.launcher in ("values", "sum"):
            out = u if one.launcher == "values" else None
            return partial(elementwise.forward, x, t, out, full)
        upstream = meta(1, 1, dtype=one.dtype).expand_as(x)
        if one.launcher == "both gradients":
            return partial(elementwise.backward, upstream, x, t, u, w, full)
        return partial(elementwise.backward, upstream, None, t, u, None, full)
    wide = one.first + one.columns + one.beyond
    inside = slice(one.first, one.first + one.columns)
    z, y = (meta(1, rows, wide, dtype=one.dtype)[..., inside] for _ in range(2))
    kind = fastkd.Divergence.of_name(name)
    labels = meta(rows, dtype=torch.int64) if full or kind.label_aware else None
    counted = meta(rows, dtype=torch.bool) if full else None
    problem = Problem(
        z, y, meta(rows), None, labels, counted, 0.1 if full else 0.0, name, *kind().parameters,
        one.columns,
    )  # fmt: skip
    factors = Coefficients(meta(rows), *((meta(rows),) * 2 if full else (None, None)))
    if one.launcher == "multi-label":
        heads = fastkd.Bernoulli(1, 1 if full else 0)
        problem = problem._replace(
            labels=meta(rows, one.columns) if full else None, divergence=heads.name,
            a=heads.forward, b=heads.reverse,
        )  # fmt: skip
        return partial(bernoulli.fused, problem, factors, full, None)
    if one.launcher == "standardized":
        problem = problem._replace(moments=meta(2, 3, rows))

        def call() -> None:
            moments.fill(problem.moments, z, y, counted, one.columns)
            logits.fused(problem, factors, full, None)

        return call
    if one.launcher == "listed":
        exact = partial(meta, rows, dtype=torch.float64)
        teacher = Events(meta(rows, LISTED, dtype=torch.int64), exact(LISTED), exact())
        return partial(events.fused, problem._replace(teacher=teacher), factors, full, None)
    if one.launcher in ("fused", "in place"):
        out = z if one.launcher == "in place" else None
        return partial(logits.fused, problem, factors, full, out)
    if one.launcher == "forward":
        return lambda: run("", logits.phases(problem, False, False))
    return partial(logits.backward, problem, meta(5, rows), factors, True, False)
