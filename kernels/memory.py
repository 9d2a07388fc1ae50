"""Rows in memory: where they begin, and tiles and numbers of them read and written."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

from fastkd.kernels import arithmetic as A
from fastkd.kernels.arguments import multiple, number

PINNED = tl.constexpr(not A.INTERPRETED.value and triton.__version__.startswith("3.6."))


@triton.jit
def widen(x):
    """In fp32: two instructions for two bf16 in a register, where the compiler makes three."""
    if not A.INTERPRETED and is_cuda() and x.dtype == tl.bfloat16:
        pair: tl.constexpr = "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;"
        return tl.inline_asm_elementwise(pair, "=r,=r,r", [x], tl.float32, True, 2)
    else:
        return x.to(tl.float32)


@triton.jit
def load(pointer, at, inside, EVICT: tl.constexpr):
    """A tile in fp32, -inf outside."""
    if inside is None:
        return widen(tl.load(pointer + at, eviction_policy=EVICT))
    else:
        x = tl.load(pointer + at, mask=inside, other=-float("inf"), eviction_policy=EVICT)
        return widen(x)


@triton.jit
def load_beside(x, pointer, at, inside, EVICT: tl.constexpr):
    """The same tile of the other side; x itself where there is none, of which nothing is read."""
    if pointer is None:
        return x
    else:
        return load(pointer, at, inside, EVICT)


@triton.jit
def aligned(x, ALIGN: tl.constexpr):
    """x, which the launcher found to be a multiple of ALIGN: the compiler learns it here."""
    return x // ALIGN * ALIGN


@triton.jit
def rows_of(rows, counted, LANES: tl.constexpr):
    """The rows [LANES, 1] of a program: their indices, which exist, and which of these count."""
    index = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)[:, None]
    exists = index < rows
    live = exists
    if counted is not None:
        live &= tl.load(counted + index, mask=exists, other=0) != 0
    return index, exists, live


@triton.jit
def row_at(index, operand, inner, ALIGN: tl.constexpr):
    """Where row `index` of an Operand begins, in 64 bits; divided in 32 bits."""
    if operand.pointer is None:
        return index.to(tl.int64) * 0
    else:
        if inner is None:
            at = index.to(tl.int64) * multiple(operand.inner, ALIGN)
        else:
            size = number(inner).to(tl.uint32)
            o = index.to(tl.uint32) // size
            i = (index.to(tl.uint32) - o * size).to(tl.int64)
            at = o.to(tl.int64) * multiple(operand.outer, ALIGN)
            at += i * multiple(operand.inner, ALIGN)
        if operand.first is not None:
            at += number(operand.first)
        return at


@triton.jit
def row_load(pointer, at, live, other):
    """One number per row; `live` None: the row is there."""
    if live is None:
        return tl.load(pointer + at)
    else:
        return tl.load(pointer + at, mask=live, other=other)


@triton.jit
def row_store(pointer, x, index, live):
    """One number per row. Triton 3.6 fails where it moves what changes a number's layout to before
    the operations that made it, hence there none is seen."""
    if PINNED:
        move: tl.constexpr = "mov.b32 $0, $1;" if is_cuda() else "v_mov_b32 $0, $1"
        place: tl.constexpr = "=r,r" if is_cuda() else "=v,v"
        x = tl.inline_asm_elementwise(move, place, [tl.cast(x, tl.float32)], tl.float32, False, 1)
    tl.store(pointer + index, x, mask=live)


@triton.jit
def fill_zero(pointer, begin, end, BLOCK: tl.constexpr):
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        zero = tl.zeros([BLOCK], pointer.dtype.element_ty)
        tl.store(pointer + at, zero, mask=at < end)


@triton.jit
def fill_beyond(pointer, shift, extent, BLOCK: tl.constexpr):
    """Zeros in the gradient's columns beyond the row's; its column 0 has position `shift`."""
    if extent.width is not None:
        fill_zero(pointer, shift + extent.columns, shift + extent.width, BLOCK)
