"""`kl_div`, a drop-in for `torch.nn.functional.kl_div`: one pass forward, one pass backward.

With p = target, or exp(target) for a target in log space, each entry has

    value = p (log p - input)    d value / d input = -p    d value / d target = log p - input + 1

(the last times p in log space), all 0 where p = 0. The operators below run the kernels of
`kernels/elementwise.py` on CUDA devices, and `eager/elementwise.py` elsewhere and in fp64.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction

from . import checks, tracing
from .eager import elementwise as eager
from .operators import caller, operator, readable

__all__ = ["kl_div"]

NONE, MEAN = _reduction.get_enum("none"), _reduction.get_enum("mean")
MEAN_WARNING = (
    "reduction: 'mean' divides the total loss by both the batch size and the support size. "
    "'batchmean' divides only by the batch size, and aligns with the KL div math definition."
)


def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    r"""Kullback-Leibler divergence of log-probabilities: torch.nn.functional.kl_div, fused.

    value = target * (log target - input), or exp(target) * (target - input) with log_target.

    The same values, gradients, dtypes, broadcasting and warnings as PyTorch's function, with two
    differences: a zero target (-inf in log space) contributes 0 to the value and to the gradients,
    whatever the input is, where PyTorch gives NaN; and bf16 and fp16 are summed in fp32 and rounded
    once.

    Args:
        input: log-probabilities, any shape that broadcasts with the target's, floating point.
        target: probabilities, or log-probabilities with `log_target`.
        size_average, reduce: deprecated, as in PyTorch; given, they override `reduction`.
        reduction: "none", "sum", "mean" (over all elements, with PyTorch's warning) or "batchmean"
            (the sum over `input.size(0)`), which is the mathematical definition for `[N, V]`.
        log_target: whether the target is in log space.

    Returns:
        A scalar, or the broadcast shape for "none", in the promoted dtype of both. Gradients flow
        to both, each in its own dtype.

    Raises:
        TypeError: an argument is not a tensor, or a reduction was given by position.
        ValueError: unknown reduction.
        RuntimeError: shapes that do not broadcast, or different devices.
        NotImplementedError: a dtype other than fp64, fp32, bf16, fp16; a tensor that is not dense.

    Source: Kullback & Leibler 1951, On Information and Sufficiency; torch.nn.functional.kl_div.

    Example:
        >>> import torch, fastkd
        >>> input = torch.tensor([[0.5, 0.5]]).log()
        >>> target = torch.tensor([[1.0, 0.0]])
        >>> round(fastkd.kl_div(input, target, reduction="batchmean").item(), 4)
        0.6931
    """
    shape = _check(input, target)
    checks.flag("kl_div: log_target", log_target)
    input, target = readable(input), readable(target)
    kind = _reduction_kind(size_average, reduce, reduction)
    dtype = _result_type(input, target)
    compute = eager.at_least_fp32(dtype)
    # The gradient of a repeated operand is summed before it is rounded.
    x, t = (o if o.shape == shape else o.to(compute).expand(shape) for o in (input, target))
    loss = caller(_KLDiv)(x, t, log_target, kind != NONE, dtype if kind == NONE else compute)
    if kind == MEAN:
        loss = loss / x.numel()
    if reduction == "batchmean" and input.dim() > 0:
        loss = loss / input.size(0)
    return loss.to(dtype)


def _reduction_kind(size_average: bool | None, reduce: bool | None, reduction: str) -> int:
    """PyTorch's number of the reduction, with its warnings; that of "sum" for "batchmean"."""
    warn = not torch.compiler.is_compiling()  # the compiler traces no warnings
    for name, flag in (("size_average", size_average), ("reduce", reduce)):
        if isinstance(flag, str):
            raise TypeError(
                f"kl_div: {name} must be a bool or None, got {flag!r}, which PyTorch reads as "
                f"True: write reduction={flag!r}"
            )
    if size_average is not None or reduce is not None:
        return _reduction.legacy_get_enum(size_average, reduce, emit_warning=warn)
    old = isinstance(reduction, str) and reduction == "elementwise_mean"
    if not old:  # PyTorch's old name of "mean", with its own warning
        checks.choice("reduction", reduction, checks.REDUCTIONS)
    if reduction == "mean" and warn:
        warnings.warn(MEAN_WARNING, stacklevel=3)
    return _reduction.get_enum("sum" if reduction == "batchmean" else reduction)


def _result_type(input: Tensor, target: Tensor) -> torch.dtype:
    """torch.result_type, which the compiler does not trace; fp32 at least under autocast."""
    device = input.device.type
    if (input.dim() > 0) == (target.dim() > 0):
        dtype = torch.promote_types(input.dtype, target.dtype)
    else:  # a 0-d tensor does not promote the other
        dtype = input.dtype if input.dim() > 0 else target.dtype
    return eager.at_least_fp32(dtype) if tracing.autocasts(device) else dtype


def _check(input: Tensor, target: Tensor) -> torch.Size:
    """The broadcast shape."""
    for name, operand in (("input", input), ("target", target)):
        if not isinstance(operand, Tensor):
            raise TypeError(f"kl_div: {name} must be a tensor, got {type(operand).__name__}")
        checks.dense(name, operand)
        if operand.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise NotImplementedError(
                f"kl_div: {name} must be fp64, fp32, bf16 or fp16, got {operand.dtype}; cast it"
            )
    if input.device != target.device:
        raise RuntimeError(
            f"kl_div: input and target must be on one device, got {input.device} and "
            f"{target.device}; move one"
        )
    try:
        return torch.broadcast_shapes(input.shape, target.shape)
    except RuntimeError:
        raise RuntimeError(
            f"kl_div: input and target must have shapes that broadcast, got {tuple(input.shape)} "
            f"and {tuple(target.shape)}; reshape one"
        ) from None


# --- the operators: opaque to the compiler, one body per backend -----------------------------


@operator(
    "fastkd::kl_div",
    "(Tensor input, Tensor target, bool log_target, bool reduce, ScalarType dtype) -> Tensor",
)
def _forward(
    input: Tensor, target: Tensor, log_target: bool, reduce: bool, dtype: torch.dtype
) -> Tensor:
    """The values in `dtype`, or with `reduce` their sum; operands of one shape."""
    out = None if reduce else input.new_empty(input.shape, dtype=dtype)
    backend = _backend(input, target)
    x, t, o = _laid_out(backend, input, target, out)
    total = backend.forward(x, t, o, log_target)
    return total if out is None else out


@_forward.register_fake
def _(input: Tensor, target: Tensor, log_target: bool, reduce: bool, dtype: torch.dtype) -> Tensor:
    return input.new_empty(() if reduce else input.shape, dtype=dtype)


@operator(
    "fastkd::kl_div_backward",
    "(Tensor upstream, Tensor? input, Tensor target, bool log_target, ScalarType? input_dtype)"
    " -> (Tensor, Tensor)",
)
def _backward(
    upstream: Tensor,
    input: Tensor | None,
    target: Tensor,
    log_target: bool,
    input_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """The input's gradient, if `input_dtype` is given, the target's, if `input` is; else empty."""
    to_input, to_target = _empty_gradients(upstream, input, target, log_target, input_dtype)
    backend = _backend(upstream, target)
    g, x, t, dx, dt = _laid_out(
        backend, upstream.expand(target.shape), input, target,
        None if input_dtype is None else to_input, None if input is None else to_target,
    )  # fmt: skip
    backend.backward(g, x, t, dx, dt, log_target)
    return to_input, to_target


@_backward.register_fake
def _empty_gradients(
    upstream: Tensor, input: Any, target: Tensor, log_target: bool, input_dtype: Any
) -> tuple[Tensor, Tensor]:
    return (
        target.new_empty(0 if input_dtype is None else target.shape, dtype=input_dtype),
        target.new_empty(0 if input is None else target.shape),
    )


def _backend(*matrices: Tensor) -> Any:
    """The module that computes them."""
    if not _on_triton(*matrices):
        return eager
    from .kernels import elementwise

    return elementwise


def _on_triton(*matrices: Tensor) -> bool:
    double = any(matrix.dtype == torch.float64 for matrix in matrices)
    return checks.HAS_TRITON and matrices[0].is_cuda and not double


def _laid_out(backend: Any, *tensors: Tensor | None) -> list[Any]:
    """[rows, columns] of each; a single row where all are contiguous or one value. Views, except
    of operands whose leading dimensions do not collapse into one stride, which are copied. PyTorch
    takes what is one piece as it is.
    """
    given = [t for t in tensors if t is not None]
    if backend is eager and eager.at_once(given[0]):
        return list(tensors)
    shape = given[0].shape
    flat = all(t.is_contiguous() or not any(t.stride()) for t in given)
    split = 0 if flat else -1
    sizes = math.prod(shape[:split]), math.prod(shape[split:])
    return [None if t is None else t.reshape(sizes) for t in tensors]


class _KLDiv(torch.autograd.Function):
    @staticmethod
    def forward(
        input: Tensor, target: Tensor, log_target: bool, reduce: bool, dtype: torch.dtype
    ) -> Tensor:
        return _forward(input, target, log_target, reduce, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, target, ctx.log_target, _, _ = inputs
        ctx.input_dtype = input.dtype if ctx.needs_input_grad[0] else None
        # The gradient of the input does not depend on the input.
        ctx.save_for_backward(input if ctx.needs_input_grad[1] else None, target)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        input, target = ctx.saved_tensors
        to_input = to_target = None
        if torch.is_grad_enabled():  # of differentiable operations, as it will be differentiated
            if ctx.input_dtype is not None:
                to_input = eager.to_input(-upstream, target, ctx.log_target).to(ctx.input_dtype)
            if input is not None:
                to_target = eager.to_target(-upstream, input, target, ctx.log_target)
        else:
            to_input, to_target = _backward(
                readable(upstream), input, target, ctx.log_target, ctx.input_dtype
            )
        to_input = None if ctx.input_dtype is None else to_input
        return to_input, None if input is None else to_target, None, None, None
