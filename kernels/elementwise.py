"""Kullback-Leibler divergence of log-probabilities, entry by entry: `kl_div` forward and backward.

Operands are matrices [rows, columns] whose columns lie side by side, or are one value repeated
(stride 0). A program owns one tile of BLOCK columns of one row; callers pass a single row where
they can, so that tiles are full.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import is_cuda

from fastkd.kernels.arithmetic import INTERPRETED, LN2
from fastkd.kernels.tuning import elementwise

__all__ = ["backward", "forward"]


@triton.jit
def _load(pointer, column, columns, STEP: tl.constexpr, WHOLE: tl.constexpr):
    """A tile in fp32; only tiles that are not WHOLE are masked, which would narrow the loads."""
    if STEP == 0:
        values = tl.broadcast_to(tl.load(pointer), column.shape)
    elif WHOLE:
        values = tl.load(pointer + column)
    else:
        values = tl.load(pointer + column, mask=column < columns, other=0.0)
    return values.to(tl.float32)


@triton.jit
def _store(pointer, values, column, columns, WHOLE: tl.constexpr):
    values = values.to(pointer.dtype.element_ty)
    if WHOLE:
        tl.store(pointer + column, values)
    else:
        tl.store(pointer + column, values, mask=column < columns)


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
def _narrow(X, T):
    """Whether both have 16 bits: reading them then takes less time than tl.log does."""
    return X.dtype.element_ty.primitive_bitwidth + T.dtype.element_ty.primitive_bitwidth == 32


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
def _forward_tile(
    X, T, Out, columns,
    X_STEP: tl.constexpr, T_STEP: tl.constexpr, LOG_TARGET: tl.constexpr, REDUCE: tl.constexpr,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    x = _load(X, column, columns, X_STEP, WHOLE)
    t = _load(T, column, columns, T_STEP, WHOLE)
    p, log_ratio = _log_ratio(x, t, LOG_TARGET, _narrow(X, T))
    value = p * log_ratio
    if REDUCE:
        if not WHOLE:
            value = tl.where(column < columns, value, 0.0)
        tl.store(Out, tl.sum(value))
    else:
        _store(Out, value, column, columns, WHOLE)


@triton.jit
def _forward(
    X, T, Out, blocks, columns, x_stride, t_stride, out_stride,
    X_STEP: tl.constexpr, T_STEP: tl.constexpr, LOG_TARGET: tl.constexpr, REDUCE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Out: a value per entry, or with REDUCE the sum of each tile, [rows * blocks]."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    X += row * x_stride + start * X_STEP
    T += row * t_stride + start * T_STEP
    Out += tl.program_id(0) if REDUCE else row * out_stride + start
    left = columns - start
    if left >= BLOCK:
        _forward_tile(X, T, Out, left, X_STEP, T_STEP, LOG_TARGET, REDUCE, BLOCK, True)
    else:
        _forward_tile(X, T, Out, left, X_STEP, T_STEP, LOG_TARGET, REDUCE, BLOCK, False)


@triton.jit
def _backward_tile(
    G, X, T, DX, DT, columns,
    G_STEP: tl.constexpr, X_STEP: tl.constexpr, T_STEP: tl.constexpr, LOG_TARGET: tl.constexpr,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    g = _load(G, column, columns, G_STEP, WHOLE)
    t = _load(T, column, columns, T_STEP, WHOLE)
    if DX is not None:
        _store(DX, -(tl.exp(t) if LOG_TARGET else t) * g, column, columns, WHOLE)
    if DT is not None:
        x = _load(X, column, columns, X_STEP, WHOLE)
        p, log_ratio = _log_ratio(x, t, LOG_TARGET, _narrow(X, T))
        slope = p * (log_ratio + 1) if LOG_TARGET else tl.where(p == 0, 0.0, log_ratio + 1)
        _store(DT, slope * g, column, columns, WHOLE)


@triton.jit
def _backward(
    G, X, T, DX, DT, blocks, columns, g_stride, x_stride, t_stride, out_stride,
    G_STEP: tl.constexpr, X_STEP: tl.constexpr, T_STEP: tl.constexpr, LOG_TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """DX, DT: the gradients of input and target under the upstream gradient G; None: not wanted."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    G += row * g_stride + start * G_STEP
    T += row * t_stride + start * T_STEP
    if DX is not None:
        DX += row * out_stride + start
    if DT is not None:
        X += row * x_stride + start * X_STEP
        DT += row * out_stride + start
    left = columns - start
    if left >= BLOCK:
        _backward_tile(G, X, T, DX, DT, left, G_STEP, X_STEP, T_STEP, LOG_TARGET, BLOCK, True)
    else:
        _backward_tile(G, X, T, DX, DT, left, G_STEP, X_STEP, T_STEP, LOG_TARGET, BLOCK, False)


def forward(input: Tensor, target: Tensor, out: Tensor | None, log_target: bool) -> Tensor:
    """Values into `out`, contiguous; where that is None, their sum in fp32."""
    rows, columns = input.shape
    block, warps = elementwise(target.device)
    blocks = triton.cdiv(columns, block)
    # One partial sum per program, added in a fixed order: two runs agree in every bit.
    result = (
        torch.empty(rows * blocks, dtype=torch.float32, device=input.device) if out is None else out
    )
    (x, x_stride, x_step), (t, t_stride, t_step) = _operand(input), _operand(target)
    if rows * blocks:
        with torch.cuda.device_of(input):
            _forward[(rows * blocks,)](
                x, t, result, blocks, columns,
                x_stride, t_stride, columns if rows > 1 else 0,
                x_step, t_step, log_target, out is None, block,
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
    (g, g_stride, g_step), (t, t_stride, t_step) = _operand(upstream), _operand(target)
    x, x_stride, x_step = (None, 0, 0) if input is None else _operand(input)
    if rows * blocks:
        with torch.cuda.device_of(target):
            _backward[(rows * blocks,)](
                g, x, t, input_grad, target_grad, blocks, columns,
                g_stride, x_stride, t_stride, columns if rows > 1 else 0,
                g_step, x_step, t_step, log_target, block,
                num_warps=warps, enable_fp_fusion=True,
            )  # fmt: skip


def _operand(matrix: Tensor) -> tuple[Tensor, int, int]:
    """The matrix, copied if its columns lie apart, its row stride and its column step, 0 or 1."""
    rows, columns = matrix.shape
    if columns > 1 and matrix.stride(1) > 1:
        matrix = matrix.contiguous()
    # A single row has stride 0, which is divisible by 16 and keeps the loads wide.
    row_stride = matrix.stride(0) if rows > 1 else 0
    return matrix, row_stride, int(columns == 1 or matrix.stride(1) == 1)
