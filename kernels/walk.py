"""How a row is walked over, tile by tile: by sweeps, moments and entry by entry alike.

A STEP is a function that a tile is given to, with pointers to the row (`sides`), what is known of
it, and what the compiler knows (FACTS).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastkd.kernels import memory as M


class Stretch(NamedTuple):
    """A program's columns of a row: full tiles, and a masked one of what these leave."""

    begin: Any
    end: Any
    shift: Any  # the position of the row's first column
    before: Any  # positions before the full tiles, in a tuple; (): never any
    full: Any  # tiles
    tail: Any
    lanes: Any  # of a tile, where each lane begins
    offsets: Any  # and all of its positions
    block: Any  # their number


class Tile(NamedTuple):
    """Positions [lanes, vector]; a lane's lie side by side, from `first` on."""

    at: Any
    inside: Any  # which of them are the row's; None: all
    first: Any = None  # [lanes, 1]


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
    lanes = tl.arange(0, LANES)[:, None] * VECTOR
    offsets = lanes + tl.arange(0, VECTOR)[None, :]
    return Stretch(
        begin=begin, end=end, shift=shift, before=before, full=full, tail=first + full * BLOCK,
        lanes=lanes, offsets=offsets, block=BLOCK,
    )  # fmt: skip


@triton.jit
def walk(state, stretch, sides, known, FACTS: tl.constexpr, STEP: tl.constexpr,
         FORWARD: tl.constexpr):  # fmt: skip
    """STEP(state, tile, sides, known, FACTS) for each tile in turn."""
    state = _left_over(state, stretch, sides, known, FACTS, STEP)
    return full_tiles(state, stretch, sides, known, FACTS, STEP, FORWARD)


@triton.jit
def _left_over(state, stretch, sides, known, FACTS: tl.constexpr, STEP: tl.constexpr):
    """The masked tile. Of a row that does not begin at position 0, the vector with its first
    columns stands before the last ones in it; where they do not fit there are two.
    """
    if len(stretch.before) == 0:
        if stretch.tail < stretch.end:
            at = stretch.tail + stretch.offsets
            tile = Tile(at, at < stretch.end, stretch.tail + stretch.lanes)
            state = STEP(state, tile, sides, known, FACTS)
    else:
        first = stretch.tail - stretch.before[0]
        for i in range((stretch.end - first + stretch.block - 1) // stretch.block):
            begin = first + i * stretch.block
            lane, at = begin + stretch.lanes, begin + stretch.offsets
            # Lanes before the tail hold the first columns, `stretch.begin` and those after it.
            lane += tl.where(lane < stretch.tail, stretch.begin - first, 0)
            at += tl.where(at < stretch.tail, stretch.begin - first, 0)
            inside = (at >= stretch.shift) & (at < stretch.end)
            state = STEP(state, Tile(at, inside, lane), sides, known, FACTS)
    return state


@triton.jit
def full_tiles(state, stretch, sides, known, FACTS: tl.constexpr, STEP: tl.constexpr,
               FORWARD: tl.constexpr):  # fmt: skip
    if FORWARD:
        first, step = stretch.tail - stretch.full * stretch.block, stretch.block
    else:
        first, step = stretch.tail - stretch.block, -stretch.block
    for i in range(stretch.full):
        begin = first + i * step
        at = begin + stretch.offsets
        state = STEP(state, Tile(at, None, begin + stretch.lanes), sides, known, FACTS)
    return state


@triton.jit
def only_tile(columns, sides, known, FACTS: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """STEP(tile, sides, known, FACTS) for the first BLOCK columns, or all where they are fewer."""
    at = tl.arange(0, BLOCK)
    if columns >= BLOCK:
        STEP(Tile(at, None), sides, known, FACTS)
    else:
        STEP(Tile(at, at < columns), sides, known, FACTS)


# --- where a row lies ------------------------------------------------------------------------


@triton.jit
def start(index, student, teacher, gradient, extent, TILE: tl.constexpr):
    """Where the sides' position 0 lies, and the row's first column."""
    ALIGN: tl.constexpr = TILE.align
    VECTOR: tl.constexpr = TILE.vector
    SHIFTED: tl.constexpr = TILE.shifted
    student_at = M.row_at(index, student, extent.inner, ALIGN)
    teacher_at = M.row_at(index, teacher, extent.inner, ALIGN)
    gradient_at = M.row_at(index, gradient, extent.inner, ALIGN)
    shift = 0
    if SHIFTED:
        shift = ((student_at if SHIFTED & 1 else teacher_at) % VECTOR).to(tl.int32)
    student_at = M.aligned(student_at - shift, VECTOR if SHIFTED & 1 else ALIGN)
    teacher_at = M.aligned(teacher_at - shift, VECTOR if SHIFTED & 2 else ALIGN)
    gradient_at = M.aligned(gradient_at - shift, VECTOR if SHIFTED & 4 else ALIGN)
    return student_at, teacher_at, gradient_at, shift


@triton.jit
def blank(index, split, student, teacher, gradient, extent, TILE: tl.constexpr):
    """A gradient of 0 of a piece of a row that does not count, and what is beyond the row."""
    if gradient.pointer is not None:
        _, _, at, shift = start(index, student, teacher, gradient, extent, TILE)
        stretch = stretch_of(
            split, extent.span, shift, extent.columns, TILE.lanes, TILE.vector, TILE.shifted
        )
        BLOCK: tl.constexpr = TILE.lanes * TILE.vector
        pointer = gradient.pointer + at
        M.fill_zero(pointer, tl.maximum(stretch.begin, shift), stretch.end, BLOCK)
        if split == 0:
            M.fill_beyond(pointer, shift, extent, BLOCK)
