"""Faults put in on purpose, each of which the machine must report."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .cases import BF16, FORWARD_KL, FP32
from .gpu import Gpu
from .machine import Kernel
from .problems import loss


class Fault(NamedTuple):
    """expected: words of which one is in what is found."""

    name: str
    found: Callable[[Gpu], list[str]]
    expected: tuple[str, ...]


# --- kernels of their own ------------------------------------------------------------------------


@triton.jit
def reverse(X, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(X + n - 1 - at, mask=at < n)
    tl.store(X + at, x, mask=at < n)


@triton.jit
def overlap(X, Out, BLOCK: tl.constexpr):
    at = tl.program_id(0) * (BLOCK - 1) + tl.arange(0, BLOCK)
    tl.store(Out + at, tl.load(X + at) + tl.program_id(0))


@triton.jit
def load_beyond(X, Out, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(Out + at, tl.load(X + at, mask=at <= n), mask=at < n)


@triton.jit
def store_beyond(X, Out, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(Out + at, tl.load(X + at, mask=at < n, other=0.0), mask=at <= n)


@triton.jit
def row_sums(X, Out, stride, ROWS: tl.constexpr, PIECES: tl.constexpr, PIECE: tl.constexpr):
    """What Triton 3.7.1 adds up wrongly where a thread loads more than a piece has for it."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, PIECES)[:, None, None] * PIECE + tl.arange(0, PIECE)[None, None, :]
    x = tl.load(X + row[None, :, None] * stride + column).to(tl.float32)
    x = tl.reshape(tl.permute(x, [1, 0, 2]), [ROWS, PIECES * PIECE])
    tl.store(Out + row, tl.sum(x, 1))


def _launch(gpu: Gpu, kernel: object, grid: int, *arguments: object, warps: int = 1) -> list[str]:
    gpu.begin()
    kernel[(grid,)](*arguments, num_warps=warps)  # type: ignore[index]
    return list(gpu.findings)


def _own() -> Iterator[Fault]:
    def ramp(count: int) -> torch.Tensor:
        return torch.arange(float(count))

    yield Fault(
        "a tile reversed in place",
        lambda gpu: _launch(gpu, reverse, 1, ramp(1000), 1000, 1024, warps=4),
        ("write after read between warps",),
    )
    yield Fault(
        "programs whose outputs overlap by one entry",
        lambda gpu: _launch(gpu, overlap, 4, ramp(4096), torch.zeros(4096), 256, warps=2),
        ("write after write between programs",),
    )
    yield Fault(
        "a load one entry beyond the storage",
        lambda gpu: _launch(gpu, load_beyond, 1, ramp(100), torch.zeros(100), 100, 128),
        ("out of bounds",),
    )
    yield Fault(
        "a store one entry beyond the view",
        lambda gpu: _launch(gpu, store_beyond, 1, ramp(100), torch.zeros(104)[:100], 100, 128),
        ("outside the view",),
    )
    yield Fault(
        "a load of memory that nobody has written",
        lambda gpu: _launch_unwritten(gpu),
        ("unwritten",),
    )
    yield Fault(
        "a sum over lanes that are no neighbours",
        lambda gpu: _launch(
            gpu, row_sums, 1, torch.ones(512).half(), torch.zeros(4), 128, 4, 4, 32
        ),
        ("reduces 4x128xf32 by lane bits [0, 1, 4]",),
    )


def _launch_unwritten(gpu: Gpu) -> list[str]:
    gpu.begin()
    store_beyond[(1,)](torch.empty(100), torch.zeros(100), 99, 128, num_warps=1)
    return list(gpu.findings)


# --- fastkd's kernels, altered -------------------------------------------------------------------


def _problem(gpu: Gpu, kind: str, columns: int, dtype: torch.dtype = BF16) -> list[str]:
    gpu.begin()
    wrong = loss(FORWARD_KL, (1, 3, columns), dtype, "inplace", "plain", kind, 5)()
    return [*gpu.findings, *(f"mismatch: {one}" for one in wrong)]


def _without_barriers(gpu: Gpu, kind: str, columns: int) -> list[str]:
    gpu.dropped = lambda kernel: -2
    try:
        return _problem(gpu, kind, columns)
    finally:
        gpu.dropped = lambda kernel: -1


def _one_barrier(kernel: Kernel, place: int) -> Callable[[Kernel], int]:
    return lambda one: place if one is kernel else -1


def _each_barrier(gpu: Gpu) -> list[str]:
    """Each barrier of a sweep by itself; some of them may be superfluous."""
    _problem(gpu, "full", 5000)
    kernel = gpu.last["sweep"]
    places, seen = kernel.places("BAR"), 0
    for place in places:
        gpu.dropped = _one_barrier(kernel, place)
        seen += bool(_problem(gpu, "full", 5000))
    gpu.dropped = lambda one: -1
    return [f"{'most' if 2 * seen >= len(places) else 'few'} seen: {seen} of {len(places)}"]


def _altered(
    pattern: str, by: str, kernel: str, columns: int, dtype: torch.dtype = BF16, which: int = 0
) -> Callable[[Gpu], list[str]]:
    """With one place in the text of a kernel changed, of those that match the one of a number."""

    def run(gpu: Gpu) -> list[str]:
        changed = []

        def change(text: str) -> str:
            places = list(re.finditer(pattern, text))
            if f".entry {kernel}(" not in text or not places:
                return text
            place = places[which]
            changed.append(place[0])
            return text[: place.start()] + place.expand(by) + text[place.end() :]

        gpu.mutate = change
        try:
            found = _problem(gpu, "plain", columns, dtype)
        finally:
            gpu.mutate = lambda text: text
        assert changed, f"{pattern} is not in the text of {kernel}"
        return found

    return run


_STORE = r"st\.global\.v4\.b32 \[ (%rd\d+) \+ 0 \]"
_LOAD = r"ld\.global(\S*)\.v4\.b32 (\{[^}]*\}), \[ (%rd\d+) \+ 0 \]"
_LESS = r"setp\.lt\.s32(\s+%p\d+, %r\d+, %r\d+);"


def _alterations() -> Iterator[Fault]:
    anything = ("",)
    yield Fault(
        "no barriers: a sweep in place with labels",
        lambda gpu: _without_barriers(gpu, "full", 5000),
        ("write after read between warps",),
    )
    yield Fault(
        "no barriers: a resident row of two warps in place with labels",
        lambda gpu: _without_barriers(gpu, "full", 1000),
        ("between warps",),
    )
    yield Fault("no barrier, of a sweep's each by itself", _each_barrier, ("most seen",))
    yield Fault(
        "a store moved by one vector",
        _altered(_STORE, r"st.global.v4.b32 [ \1 + 16 ]", "sweep", 5000),
        ("outside the view", "write after", "out of bounds", "mismatch"),
    )
    yield Fault(
        "a store moved by one entry",
        _altered(_STORE, r"st.global.v4.b32 [ \1 + 2 ]", "sweep", 5000),
        ("misaligned",),
    )
    yield Fault(
        "a load moved by one vector",
        _altered(_LOAD, r"ld.global\1.v4.b32 \2, [ \3 + 16 ]", "sweep", 5000, FP32),
        ("out of bounds", "mismatch"),
    )
    yield Fault(
        "log2(e) off by 1e-4",
        _altered("0f3FB8AA3B", "0f3FB8B1DB", "sweep", 5000, FP32),
        ("mismatch",),
    )
    yield Fault(
        "a maximum for a sum", _altered(r"add\.f32", "max.f32", "sweep", 5000, which=20), anything
    )
    for kernel, columns, which in (("sweep", 5001, 0), ("resident", 9, 4)):
        yield Fault(
            f"a mask of {kernel} that lets one entry more through",
            _altered(_LESS, r"setp.le.s32\1;", kernel, columns, FP32, which),
            ("outside the view", "out of bounds", "write after", "mismatch"),
        )


FAULTS = (*_own(), *_alterations())
