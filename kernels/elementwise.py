"""Kullback-Leibler divergence of log-probabilities, entry by entry: `kl_div` forward and backward.

Operands are matrices [rows, columns] whose columns lie side by side, or are one value repeated
(stride 0). A program owns one tile of BLOCK columns of one row; callers pass a single row where
they can, so that tiles are full.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import is_cuda

from fastkd.kernels import walk as W
from fastkd.kernels.arithmetic import INTERPRETED, LN2
from fastkd.kernels.tuning import elementwise

__all__ = ["backward", "forward"]


class Matrix(NamedTuple):
    """[rows, columns] in memory; none by default."""

    pointer: Any = None
    stride: Any = None  # of rows
    STEP: Any = None  # of columns: 1, or 0 where a row is one value repeated


class Operands(NamedTuple):
    """A Matrix each, where it is read or written."""

    input: Any
    target: Any
    upstream: Any = None
    value: Any = None
    input_grad: Any = None
    target_grad: Any = None


class Facts(NamedTuple):
    """What the compiler knows."""

    LOG_TARGET: Any
    REDUCE: Any = False


@triton.jit
def _load(matrix, tile):
    """A tile in fp32; only tiles that are not full are masked, which would narrow the loads."""
    if matrix.STEP == 0:
        values = tl.broadcast_to(tl.load(matrix.pointer), tile.at.shape)
    elif tile.inside is None:
        values = tl.load(matrix.pointer + tile.at)
    else:
        values = tl.load(matrix.pointer + tile.at, mask=tile.inside, other=0.0)
    return values.to(tl.float32)


@triton.jit
def _store(matrix, values, tile):
    values = values.to(matrix.pointer.dtype.element_ty)
    tl.store(matrix.pointer + tile.at, values, mask=tile.inside)


@triton.jit
def _log(t, FAST: tl.constexpr):
    """FAST: to an absolute 2^-22 near 1, at 4 instructions where tl.log takes 25; unlike
    rows.fast_log2 of denormal numbers too, which probabilities may be."""
    if FAST and not INTERPRETED and is_cuda():
        lg2: tl.constexpr = "lg2.approx.f32 $0, $1;"
        return tl.inline_asm_elementwise(lg2, "=f,f", [t], tl.float32, True, 1) * LN2
    else:
        return tl.log(t)


@triton.jit
def _narrow(input, target):
    """Whether both have 16 bits: reading them then takes less time than tl.log does."""
    x: tl.constexpr = input.pointer.dtype.element_ty.primitive_bitwidth
    return x + target.pointer.dtype.element_ty.primitive_bitwidth == 32


@triton.jit
def _log_ratio(x, t, LOG_TARGET: tl.constexpr, FAST: tl.constexpr):
    """p and log p - x, which is 0 where p is 0."""
    if LOG_TARGET:
        p = tl.exp(t)
        log_p = t
    else:
        p = t
        log_p = _log(t, FAST)
    return p, tl.where(p == 0, 0.0, log_p - x)


@triton.jit
def _from(matrix, blocks, BLOCK: tl.constexpr):
    """A Matrix from the program's tile on, of which a row has `blocks`."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    pointer = matrix.pointer + (row * matrix.stride + column * matrix.STEP)
    return Matrix(pointer, matrix.stride, matrix.STEP)


@triton.jit
def _left(columns, blocks, BLOCK: tl.constexpr):
    """Of a row, from that tile on."""
    return columns - (tl.program_id(0) % blocks).to(tl.int64) * BLOCK


@triton.jit
def _value(tile, operands, known, FACTS: tl.constexpr):
    x, t = _load(operands.input, tile), _load(operands.target, tile)
    fast: tl.constexpr = _narrow(operands.input, operands.target)
    p, log_ratio = _log_ratio(x, t, FACTS.LOG_TARGET, fast)
    value = p * log_ratio
    if FACTS.REDUCE:
        if tile.inside is not None:
            value = tl.where(tile.inside, value, 0.0)
        tl.store(operands.value.pointer + tl.program_id(0), tl.sum(value))
    else:
        _store(operands.value, value, tile)


@triton.jit
def _gradient(tile, operands, known, FACTS: tl.constexpr):
    g, t = _load(operands.upstream, tile), _load(operands.target, tile)
    if operands.input_grad.pointer is not None:
        p = tl.exp(t) if FACTS.LOG_TARGET else t
        _store(operands.input_grad, -p * g, tile)
    if operands.target_grad.pointer is not None:
        x = _load(operands.input, tile)
        fast: tl.constexpr = _narrow(operands.input, operands.target)
        p, log_ratio = _log_ratio(x, t, FACTS.LOG_TARGET, fast)
        slope = p * (log_ratio + 1) if FACTS.LOG_TARGET else tl.where(p == 0, 0.0, log_ratio + 1)
        _store(operands.target_grad, slope * g, tile)


@triton.jit
def _forward(
    input, target, value, blocks, columns,
    LOG_TARGET: tl.constexpr, REDUCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A value per entry, or with REDUCE the sum of each tile, [rows * blocks]."""
    W.only_tile(
        _left(columns, blocks, BLOCK),
        Operands(
            _from(input, blocks, BLOCK), _from(target, blocks, BLOCK),
            value=value if REDUCE else _from(value, blocks, BLOCK),
        ),
        None, Facts(LOG_TARGET, REDUCE), _value, BLOCK,
    )  # fmt: skip


@triton.jit
def _backward(
    upstream, input, target, input_grad, target_grad, blocks, columns,
    LOG_TARGET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of input and target, each where it has a pointer; input for the latter."""
    W.only_tile(
        _left(columns, blocks, BLOCK),
        Operands(
            input if input.pointer is None else _from(input, blocks, BLOCK),
            _from(target, blocks, BLOCK),
            upstream=_from(upstream, blocks, BLOCK),
            input_grad=input_grad if input_grad.pointer is None
            else _from(input_grad, blocks, BLOCK),
            target_grad=target_grad if target_grad.pointer is None
            else _from(target_grad, blocks, BLOCK),
        ),
        None, Facts(LOG_TARGET), _gradient, BLOCK,
    )  # fmt: skip


def forward(input: Tensor, target: Tensor, out: Tensor | None, log_target: bool) -> Tensor:
    """Values into `out`, contiguous; where that is None, their sum in fp32."""
    rows, columns = input.shape
    block, warps = elementwise(target.device)
    blocks = triton.cdiv(columns, block)
    # One partial sum per program, added in a fixed order: two runs agree in every bit.
    result = (
        torch.empty(rows * blocks, dtype=torch.float32, device=input.device) if out is None else out
    )
    if rows * blocks:
        with torch.cuda.device_of(input):
            _forward[(rows * blocks,)](
                _read(input), _read(target), _written(result, rows, columns), blocks, columns,
                LOG_TARGET=log_target, REDUCE=out is None, BLOCK=block,
                num_warps=warps, enable_fp_fusion=True,
            )  # fmt: skip
    return result.sum() if out is None else out


def backward(
    upstream: Tensor, input: Tensor | None, target: Tensor,
    input_grad: Tensor | None, target_grad: Tensor | None, log_target: bool,
) -> None:  # fmt: skip
    """Gradients into `input_grad` and `target_grad`, contiguous or None; `input` for the latter."""
    rows, columns = target.shape
    block, warps = elementwise(target.device)
    blocks = triton.cdiv(columns, block)
    if rows * blocks:
        with torch.cuda.device_of(target):
            _backward[(rows * blocks,)](
                _read(upstream), _read(input), _read(target),
                _written(input_grad, rows, columns), _written(target_grad, rows, columns),
                blocks, columns, LOG_TARGET=log_target, BLOCK=block,
                num_warps=warps, enable_fp_fusion=True,
            )  # fmt: skip


def _read(matrix: Tensor | None) -> Matrix:
    """An operand, copied if its columns lie apart."""
    if matrix is None:
        return Matrix()
    rows, columns = matrix.shape
    if columns > 1 and matrix.stride(1) > 1:
        matrix = matrix.contiguous()
    # A single row has stride 0, which is divisible by 16 and keeps the loads wide.
    row_stride = matrix.stride(0) if rows > 1 else 0
    return Matrix(matrix, row_stride, tl.constexpr(int(columns == 1 or matrix.stride(1) == 1)))


def _written(result: Tensor | None, rows: int, columns: int) -> Matrix:
    """Contiguous."""
    return (
        Matrix() if result is None else Matrix(result, columns if rows > 1 else 0, tl.constexpr(1))
    )
