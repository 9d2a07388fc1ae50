"""How a sweep walks over a row, tile by tile."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Stretch(NamedTuple):
    """A program's columns of a row: full tiles, and a masked one of what these leave."""

    begin: Any
    end: Any
    shift: Any  # the position of the row's first column
    before: Any  # positions before the full tiles, in a tuple; (): never any
    full: Any  # tiles
    tail: Any
    offsets: Any  # of a tile
    block: Any  # their number


@triton.jit
def stretch_of(split, span, shift, columns, LANES: tl.constexpr, VECTOR: tl.constexpr,
               SHIFTED: tl.constexpr):  # fmt: skip
    BLOCK: tl.constexpr = LANES * VECTOR
    begin = split * span
    end = tl.minimum(begin + span, shift + columns)
    first, before = begin, ()  # Triton 3.6 returns no tuple that holds None
    if SHIFTED:
        some = tl.where((shift > 0) & (split == 0), VECTOR, 0)
        first, before = first + some, (some,)  # type: ignore[assignment]  # none, or one
    full = tl.maximum(end - first, 0) // BLOCK
    offsets = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    return Stretch(begin, end, shift, before, full, first + full * BLOCK, offsets, BLOCK)


@triton.jit
def with_tiles(stretch, full, end):
    """The same with fewer tiles, or without its tail."""
    return Stretch(
        stretch.begin, end, stretch.shift, stretch.before, full, stretch.tail, stretch.offsets,
        stretch.block,
    )  # fmt: skip


@triton.jit
def walk(
    state, sides, known, stretch, STEP: tl.constexpr, WANT: tl.constexpr,
    DIVERGENCE: tl.constexpr, SAME: tl.constexpr, FORWARD: tl.constexpr,
):  # fmt: skip
    """STEP(state, at, inside, sides, known, WANT, DIVERGENCE, SAME) for each tile in turn.

    at: its positions; inside: which are the row's, None: all.
    """
    state = _left_over(state, sides, known, stretch, STEP, WANT, DIVERGENCE, SAME)
    return full_tiles(state, sides, known, stretch, STEP, WANT, DIVERGENCE, SAME, FORWARD)


@triton.jit
def _left_over(
    state, sides, known, stretch, STEP: tl.constexpr, WANT: tl.constexpr,
    DIVERGENCE: tl.constexpr, SAME: tl.constexpr,
):  # fmt: skip
    """The masked tile. Of a row that does not begin at position 0, the vector with its first
    columns stands before the last ones in it; where they do not fit there are two.
    """
    if len(stretch.before) == 0:
        if stretch.tail < stretch.end:
            at = stretch.tail + stretch.offsets
            state = STEP(state, at, at < stretch.end, sides, known, WANT, DIVERGENCE, SAME)
    else:
        first = stretch.tail - stretch.before[0]
        for i in range((stretch.end - first + stretch.block - 1) // stretch.block):
            at = first + i * stretch.block + stretch.offsets
            at += tl.where(at < stretch.tail, stretch.begin - first, 0)
            inside = (at >= stretch.shift) & (at < stretch.end)
            state = STEP(state, at, inside, sides, known, WANT, DIVERGENCE, SAME)
    return state


@triton.jit
def full_tiles(
    state, sides, known, stretch, STEP: tl.constexpr, WANT: tl.constexpr,
    DIVERGENCE: tl.constexpr, SAME: tl.constexpr, FORWARD: tl.constexpr,
):  # fmt: skip
    if FORWARD:
        first, step = stretch.tail - stretch.full * stretch.block, stretch.block
    else:
        first, step = stretch.tail - stretch.block, -stretch.block
    for i in range(stretch.full):
        at = first + i * step + stretch.offsets
        state = STEP(state, at, None, sides, known, WANT, DIVERGENCE, SAME)
    return state
