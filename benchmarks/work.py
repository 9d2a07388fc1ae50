"""What a compiled kernel does for each logit position, and the bytes that it moves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from . import model
from .assembly import Binary, Counts
from .configurations import Measured


class Work(NamedTuple):
    """Per logit position, over the sweeps of one kernel; positions that pad a row count."""

    loads: list[float]  # bytes, by sweep
    stored: float
    instructions: float
    exp2: float
    log2: float
    special: float


def tile_of(binary: Binary) -> tuple[int, ...]:
    """Of a resident row what its parts hold together."""
    held = sum(columns for _, columns in binary.constants.get("parts", ())) or None
    sizes = [binary.constants.get(name) for name in ("lanes", "vector", "block")]
    return tuple(size for size in (sizes[0], held, *sizes[1:]) if size is not None)


def way(loops: Sequence[Counts], known: bool) -> list[Counts]:
    """What a row takes: of several loops that store its gradient one.

    known: the shortest, which serves where the first sweep's sums give the value.
    """
    storing = [loop for loop in loops if loop.stored]
    chosen = (min if known else max)(storing, key=lambda loop: loop.instructions, default=None)
    return [loop for loop in loops if not loop.stored or loop is chosen]


def work(binary: Binary, entry: int, width: int, known: bool = False) -> Work:
    """A resident kernel has no loop: all of it is spread over its tile."""
    if binary.loops:
        loops = way(binary.loops, known)
        loads = [entry] * len(loops)
        parts = [(loop, loop.loaded / entry) for loop in loops]
    else:
        tile = math.prod(tile_of(binary))
        parts = [(binary.main, tile / (width * binary.warps * binary.blocks))]
        # What a row needs once is loaded by each of its threads, but moved once.
        whole_rows = "lanes" in binary.constants
        loads = [entry if whole_rows else sum(part.loaded / n for part, n in parts)]

    def total(name: str) -> float:
        return sum(getattr(counts, name) / positions for counts, positions in parts)

    return Work(loads, *(total(name) for name in Work._fields[1:]))


def traffic(gpu: model.Gpu, kernels: Sequence[Measured], columns: int, rows: int) -> model.Traffic:
    """Of the kernels that work off the same rows, one after the other."""
    done = [work(one.binary, one.entry, gpu.width) for one in kernels]
    binary = kernels[0].binary
    programs = gpu.processors * min(
        model.occupancy(gpu, b.registers, b.shared, b.warps) for b in (k.binary for k in kernels)
    )
    return model.traffic(
        gpu, [n for part in done for n in part.loads], sum(part.stored for part in done),
        kernels[0].entry * columns, rows, programs // binary.constants.get("splits", 1),
        len(kernels) > 1,
    )  # fmt: skip
