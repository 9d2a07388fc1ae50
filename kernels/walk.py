"""How a sweep walks over a row, tile by tile: the place of head, full tiles and tail."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Stretch(NamedTuple):
    """A program's columns of a row: a masked tile where it does not begin at position 0, full
    tiles, and a masked tail."""

    begin: Any
    end: Any
    shift: Any  # the position of the row's first column
    headed: Any  # whether there is a masked tile before `head`; None: never
    head: Any
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
    head, headed = begin, None
    if SHIFTED:
        headed = (shift > 0) & (split == 0)
        head += BLOCK * headed.to(tl.int32)
    full = tl.maximum(end - head, 0) // BLOCK
    offsets = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    return Stretch(begin, end, shift, headed, head, full, head + full * BLOCK, offsets, BLOCK)


@triton.jit
def with_tiles(stretch, full, end):
    """The same with fewer tiles, or without its tail."""
    return Stretch(
        stretch.begin, end, stretch.shift, stretch.headed, stretch.head, full, stretch.tail,
        stretch.offsets, stretch.block,
    )  # fmt: skip


@triton.jit
def walk(
    state, sides, known, stretch, STEP: tl.constexpr, WANT: tl.constexpr,
    DIVERGENCE: tl.constexpr, SAME: tl.constexpr, FORWARD: tl.constexpr,
):  # fmt: skip
    """STEP(state, at, inside, sides, known, WANT, DIVERGENCE, SAME) for each tile in turn.

    at: its positions; inside: which are the row's, None: all.
    """
    if stretch.tail < stretch.end:
        at = stretch.tail + stretch.offsets
        state = STEP(state, at, at < stretch.end, sides, known, WANT, DIVERGENCE, SAME)
    state = full_tiles(state, sides, known, stretch, STEP, WANT, DIVERGENCE, SAME, FORWARD)
    if stretch.headed is not None:
        if stretch.headed:
            at = stretch.begin + stretch.offsets
            inside = (at >= stretch.shift) & (at < stretch.end)
            state = STEP(state, at, inside, sides, known, WANT, DIVERGENCE, SAME)
    return state


@triton.jit
def full_tiles(
    state, sides, known, stretch, STEP: tl.constexpr, WANT: tl.constexpr,
    DIVERGENCE: tl.constexpr, SAME: tl.constexpr, FORWARD: tl.constexpr,
):  # fmt: skip
    if FORWARD:
        first, step = stretch.head, stretch.block
    else:
        first, step = stretch.tail - stretch.block, -stretch.block
    for i in range(stretch.full):
        at = first + i * step + stretch.offsets
        state = STEP(state, at, None, sides, known, WANT, DIVERGENCE, SAME)
    return state
