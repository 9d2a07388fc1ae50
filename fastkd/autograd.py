"""The autograd Functions and the operators they call: rows saved, launchers called, nothing else."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import eager
from .problem import CE, ENTROPY, KD, Coefficients, Problem

# --- operators: opaque to the compiler, one body per backend -----------------------------------


def _backend(name: str) -> ModuleType:
    if name == "torch":
        return eager
    from .kernels import logits

    return logits


def _kinds(labels: Tensor | None, entropy: bool, metrics: bool) -> int:
    return 5 if metrics else 3 if entropy or labels is not None else 1


@torch.library.custom_op("fastkd::forward", mutates_args=())
def _forward(
    student: Tensor,
    teacher: Tensor,
    student_temperature: Tensor,
    teacher_temperature: Tensor | None,
    labels: Tensor | None,
    counted: Tensor | None,
    label_smoothing: float,
    divergence: str,
    a: float,
    b: float,
    vocab_size: int,
    entropy: bool,
    metrics: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    problem = Problem(
        student, teacher, student_temperature, teacher_temperature, labels, counted,
        label_smoothing, divergence, a, b, vocab_size,
    )  # fmt: skip
    return _backend(backend).forward(problem, entropy, metrics)


@_forward.register_fake
def _(
    student, teacher, student_temperature, teacher_temperature, labels, counted,
    label_smoothing, divergence, a, b, vocab_size, entropy, metrics, backend,
):  # fmt: skip
    rows, dtype = student_temperature.size(0), student_temperature.dtype
    kinds = _kinds(labels, entropy, metrics)
    saved = 0 if backend == "torch" else 5 if kinds == 1 else 7
    return (
        student.new_empty(kinds, rows, dtype=dtype),
        student.new_empty(saved, rows, dtype=dtype),
    )


@torch.library.custom_op("fastkd::backward", mutates_args=())
def _backward(
    student: Tensor,
    teacher: Tensor,
    student_temperature: Tensor,
    teacher_temperature: Tensor | None,
    labels: Tensor | None,
    counted: Tensor | None,
    label_smoothing: float,
    divergence: str,
    a: float,
    b: float,
    vocab_size: int,
    state: Tensor,
    kd: Tensor,
    ce: Tensor | None,
    entropy: Tensor | None,
    gradient: bool,
    temperature: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    problem = Problem(
        student, teacher, student_temperature, teacher_temperature, labels, counted,
        label_smoothing, divergence, a, b, vocab_size,
    )  # fmt: skip
    upstream = Coefficients(kd, ce, entropy)
    grad, heat = _backend(backend).backward(problem, state, upstream, gradient, temperature)
    return (
        student.new_empty(0) if grad is None else grad.view(student.shape),
        kd.new_empty(0) if heat is None else heat,
    )


@_backward.register_fake
def _(
    student, teacher, student_temperature, teacher_temperature, labels, counted,
    label_smoothing, divergence, a, b, vocab_size, state, kd, ce, entropy,
    gradient, temperature, backend,
):  # fmt: skip
    return (
        student.new_empty(student.shape if gradient else 0),
        kd.new_empty(kd.shape if temperature else 0),
    )


@torch.library.custom_op("fastkd::fused", mutates_args=())
def _fused(
    student: Tensor,
    teacher: Tensor,
    student_temperature: Tensor,
    teacher_temperature: Tensor | None,
    labels: Tensor | None,
    counted: Tensor | None,
    label_smoothing: float,
    divergence: str,
    a: float,
    b: float,
    vocab_size: int,
    kd: Tensor,
    ce: Tensor | None,
    entropy: Tensor | None,
    metrics: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    problem = Problem(
        student, teacher, student_temperature, teacher_temperature, labels, counted,
        label_smoothing, divergence, a, b, vocab_size,
    )  # fmt: skip
    coefficients = Coefficients(kd, ce, entropy)
    loss, values, grad = _backend(backend).fused(problem, coefficients, metrics, None)
    return loss, kd.new_empty(0) if values is None else values, grad.view(student.shape)


@_fused.register_fake
def _(
    student, teacher, student_temperature, teacher_temperature, labels, counted,
    label_smoothing, divergence, a, b, vocab_size, kd, ce, entropy, metrics, backend,
):  # fmt: skip
    rows, dtype = student_temperature.size(0), student_temperature.dtype
    return (
        student.new_empty(rows, dtype=dtype),
        student.new_empty((5, rows) if metrics else 0, dtype=dtype),
        student.new_empty(student.shape),
    )


@torch.library.custom_op("fastkd::fused_", mutates_args=("student",))
def _fused_inplace(
    student: Tensor,
    teacher: Tensor,
    student_temperature: Tensor,
    teacher_temperature: Tensor | None,
    labels: Tensor | None,
    counted: Tensor | None,
    label_smoothing: float,
    divergence: str,
    a: float,
    b: float,
    vocab_size: int,
    kd: Tensor,
    ce: Tensor | None,
    entropy: Tensor | None,
    metrics: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    problem = Problem(
        student, teacher, student_temperature, teacher_temperature, labels, counted,
        label_smoothing, divergence, a, b, vocab_size,
    )  # fmt: skip
    coefficients = Coefficients(kd, ce, entropy)
    loss, values, _ = _backend(backend).fused(problem, coefficients, metrics, student)
    return loss, kd.new_empty(0) if values is None else values


@_fused_inplace.register_fake
def _(
    student, teacher, student_temperature, teacher_temperature, labels, counted,
    label_smoothing, divergence, a, b, vocab_size, kd, ce, entropy, metrics, backend,
):  # fmt: skip
    rows, dtype = student_temperature.size(0), student_temperature.dtype
    return (
        student.new_empty(rows, dtype=dtype),
        student.new_empty((5, rows) if metrics else 0, dtype=dtype),
    )


@torch.library.custom_op("fastkd::scale_", mutates_args=("gradient",))
def _scale_(gradient: Tensor, upstream: Tensor, backend: str) -> None:
    if backend == "torch":
        gradient.mul_(upstream)
    else:
        _backend(backend).scale_(gradient, upstream)


# --- autograd ------------------------------------------------------------------------------------


class Dual(NamedTuple):
    """D(p, q) = factor * divergence(q, p): how the teacher's gradient is had."""

    divergence: str
    a: float
    b: float
    factor: float


class Rows(torch.autograd.Function):
    """gradient="backward": per-row values, recomputed in the backward from the saved logits."""

    @staticmethod
    def forward(
        student, teacher, student_temperature, teacher_temperature, labels, counted,
        label_smoothing, divergence, a, b, vocab_size, entropy, metrics, dual, backend,
    ):  # fmt: skip
        return _forward(
            student, teacher, student_temperature, teacher_temperature, labels, counted,
            label_smoothing, divergence, a, b, vocab_size, entropy, metrics, backend,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.label_smoothing, ctx.divergence, ctx.a, ctx.b, ctx.vocab_size = inputs[:11]
        ctx.entropy, _, ctx.dual, ctx.backend = inputs[11:]
        ctx.save_for_backward(*tensors, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _):
        *tensors, state = ctx.saved_tensors
        student, teacher, student_temperature, teacher_temperature, labels, counted = tensors
        need_student, need_teacher, need_heat, need_teacher_heat = ctx.needs_input_grad[:4]
        shared = teacher_temperature is None
        grad_student = grad_teacher = heat = teacher_heat = None

        if need_student or need_heat:
            grad_student, heat = _backward(
                *tensors, ctx.label_smoothing, ctx.divergence, ctx.a, ctx.b, ctx.vocab_size,
                state, upstream[KD], None if labels is None else upstream[CE],
                upstream[ENTROPY] if ctx.entropy else None,
                need_student, need_heat, ctx.backend,
            )  # fmt: skip

        if need_teacher or need_teacher_heat or (shared and need_heat):
            dual = ctx.dual
            roles = (
                teacher, student,
                student_temperature if shared else teacher_temperature,
                None if shared else student_temperature,
                None, counted, 0.0, dual.divergence, dual.a, dual.b, ctx.vocab_size,
            )  # fmt: skip
            _, state = _forward(*roles, False, False, ctx.backend)
            grad_teacher, teacher_heat = _backward(
                *roles, state, upstream[KD] * dual.factor, None, None,
                need_teacher, need_teacher_heat or (shared and need_heat), ctx.backend,
            )  # fmt: skip
            if shared and need_heat:
                heat = heat + teacher_heat

        return (
            grad_student if need_student else None,
            grad_teacher if need_teacher else None,
            heat if need_heat else None,
            teacher_heat if need_teacher_heat else None,
            *[None] * 11,
        )


class Fused(torch.autograd.Function):
    """gradient="forward": the weighted loss and its gradient at once; the backward only scales."""

    @staticmethod
    def forward(student, inplace, *arguments):
        if inplace:
            buffer = student.detach()
            loss, values = _fused_inplace(buffer, *arguments)
            return loss.sum(), values, buffer
        loss, values, gradient = _fused(student, *arguments)
        return loss.sum(), values, gradient

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.arguments, ctx.backend, ctx.spent = len(inputs), inputs[-1], False
        ctx.save_for_backward(output[2])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_):
        if ctx.spent:
            raise RuntimeError(
                "gradient='forward' holds one gradient, which the first backward has used: "
                "pass gradient='backward' to call backward more than once"
            )
        ctx.spent = True
        (gradient,) = ctx.saved_tensors
        _scale_(gradient, upstream, ctx.backend)
        return gradient, *[None] * (ctx.arguments - 1)
