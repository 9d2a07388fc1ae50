"""The autograd Functions and the operators they call: rows saved, launchers called, nothing else.

The operators are opaque to the compiler, which therefore sees neither the row blocks of the eager
path nor the kernels. Numbers that may change from step to step come in a tensor on the CPU: as
plain floats they would make it compile again for each value.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import bernoulli, eager
from .divergences import Bernoulli
from .operators import operator, readable, signed
from .problem import CE, ENTROPY, KD, Coefficients, Problem

# --- operators -------------------------------------------------------------------------------

PROBLEM = (
    "Tensor student, Tensor teacher, Tensor student_temperature, Tensor? teacher_temperature, "
    "Tensor? labels, Tensor? counted, Tensor? moments, Tensor numbers, str divergence, "
    "SymInt vocab_size"
)
COEFFICIENTS = "Tensor kd, Tensor? ce, Tensor? entropy"


class Arguments(NamedTuple):
    """A Problem as the operators take it: `numbers` is (label_smoothing, a, b), fp64 on the CPU."""

    student: Tensor
    teacher: Tensor
    student_temperature: Tensor
    teacher_temperature: Tensor | None
    labels: Tensor | None
    counted: Tensor | None
    moments: Tensor | None
    numbers: Tensor
    divergence: str
    vocab_size: int

    def problem(self) -> Problem:
        label_smoothing, a, b = self.numbers.tolist()
        return Problem(
            *self[:6], label_smoothing, self.divergence, a, b, self.vocab_size, self.moments
        )


SIZE = len(Arguments._fields)


def _backend(name: str, divergence: str) -> ModuleType:
    heads = divergence == Bernoulli.name
    if name == "torch":
        return bernoulli if heads else eager
    return import_module(f"fastkd.kernels.{'bernoulli' if heads else 'logits'}")


@operator(
    "fastkd::forward", f"({PROBLEM}, bool entropy, bool metrics, str backend) -> (Tensor, Tensor)"
)
def _forward(*arguments):
    entropy, metrics, backend = arguments[SIZE:]
    problem = Arguments(*arguments[:SIZE]).problem()
    return _backend(backend, problem.divergence).forward(problem, entropy, metrics)


@_forward.register_fake
def _(*arguments):
    inputs, (entropy, metrics, backend) = Arguments(*arguments[:SIZE]), arguments[SIZE:]
    kinds = 5 if metrics else 3 if entropy or inputs.labels is not None else 1
    saved = 9 if inputs.moments is not None else 5 if kinds == 1 else 7
    if backend == "torch" or inputs.divergence == Bernoulli.name:
        saved = 0
    rows = inputs.student_temperature
    return rows.new_empty(kinds, rows.size(0)), rows.new_empty(saved, rows.size(0))


@operator(
    "fastkd::backward",
    f"({PROBLEM}, Tensor state, {COEFFICIENTS}, bool gradient, bool temperature, str backend)"
    " -> (Tensor, Tensor)",
)
def _backward(*arguments):
    inputs = Arguments(*arguments[:SIZE])
    state, kd, ce, entropy, gradient, temperature, backend = arguments[SIZE:]
    upstream = Coefficients(kd, ce, entropy)
    out, heat = _backend(backend, inputs.divergence).backward(
        inputs.problem(), state, upstream, gradient, temperature
    )
    return (
        kd.new_empty(0) if out is None else out.view(inputs.student.shape),
        kd.new_empty(0) if heat is None else heat,
    )


@_backward.register_fake
def _(*arguments):
    inputs = Arguments(*arguments[:SIZE])
    _, kd, _, _, gradient, temperature, _ = arguments[SIZE:]
    return (
        inputs.student.new_empty(inputs.student.shape) if gradient else kd.new_empty(0),
        kd.new_empty(kd.shape if temperature else 0),
    )


def _run_fused(arguments, out: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    inputs = Arguments(*arguments[:SIZE])
    kd, ce, entropy, metrics, backend = arguments[SIZE:]
    loss, values, gradient = _backend(backend, inputs.divergence).fused(
        inputs.problem(), Coefficients(kd, ce, entropy), metrics, out
    )
    return loss, kd.new_empty(0) if values is None else values, gradient


def _fake_fused(arguments) -> tuple[Tensor, Tensor]:
    kd, metrics = arguments[SIZE], arguments[SIZE + 3]
    return kd.new_empty(kd.shape), kd.new_empty((5, kd.size(0)) if metrics else 0)


@operator(
    "fastkd::fused",
    f"({PROBLEM}, {COEFFICIENTS}, bool metrics, str backend) -> (Tensor, Tensor, Tensor)",
)
def _fused(*arguments):
    loss, values, gradient = _run_fused(arguments, None)
    return loss, values, gradient.view(arguments[0].shape)


@_fused.register_fake
def _(*arguments):
    return *_fake_fused(arguments), arguments[0].new_empty(arguments[0].shape)


# Always through the dispatcher, which counts a new version of the logits.
@torch.library.custom_op(
    "fastkd::fused_",
    mutates_args=("student",),
    schema=(
        f"({PROBLEM.replace('Tensor student,', 'Tensor(a!) student,')}, {COEFFICIENTS}, "
        "bool metrics, str backend) -> (Tensor, Tensor)"
    ),
)
def _fused_(*arguments):
    return _run_fused(arguments, arguments[0])[:2]


@_fused_.register_fake
def _(*arguments):
    return _fake_fused(arguments)


@operator(
    "fastkd::scale_", "(Tensor(a!) gradient, Tensor upstream, str backend) -> ()", ("gradient",)
)
def _scale_(gradient: Tensor, upstream: Tensor, backend: str) -> None:
    _backend(backend, "").scale_(gradient, upstream)


# --- autograd --------------------------------------------------------------------------------


class Dual(NamedTuple):
    """D(p, q) = factor * divergence(q, p): how the teacher's gradient is had."""

    divergence: str
    numbers: Tensor
    factor: float


@signed
class Rows(torch.autograd.Function):
    """gradient="backward": per-row values, recomputed in the backward from the saved logits."""

    @staticmethod
    def forward(*arguments):
        *inputs, entropy, metrics, backend, _, _, _ = arguments
        return _forward(*inputs, entropy, metrics, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        arguments, dual = Arguments(*inputs[:SIZE]), Dual(*inputs[SIZE + 3 :])
        ctx.divergence, ctx.vocab_size = arguments.divergence, arguments.vocab_size
        ctx.entropy, _, ctx.backend = inputs[SIZE : SIZE + 3]
        ctx.dual, ctx.factor = dual.divergence, dual.factor
        ctx.save_for_backward(*arguments[:8], output[1], dual.numbers)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, upstream, _):
        tensors = ctx.saved_tensors
        with torch.no_grad():
            gradients = Rows.gradients(ctx, upstream, *tensors)
        return *map(_once, gradients, tensors), *[None] * (SIZE + 2)

    @staticmethod
    def gradients(ctx, upstream, *tensors):
        """Of student, teacher and both temperatures; None where none is asked for."""
        *tensors, state, dual_numbers = tensors
        student, teacher, student_temperature, teacher_temperature, labels, *_ = tensors
        counted, moments = tensors[5:7]
        need_student, need_teacher, need_heat, need_teacher_heat = ctx.needs_input_grad[:4]
        shared = teacher_temperature is None
        grad_student = grad_teacher = heat = teacher_heat = None

        if need_student or need_heat:
            grad_student, heat = _backward(
                *tensors, ctx.divergence, ctx.vocab_size, state,
                upstream[KD],
                None if labels is None else upstream[CE],
                upstream[ENTROPY] if ctx.entropy else None,
                need_student, need_heat, ctx.backend,
            )  # fmt: skip

        if need_teacher or need_teacher_heat or (shared and need_heat):
            roles = Arguments(
                teacher, student,
                student_temperature if shared else teacher_temperature,
                None if shared else student_temperature,
                None, counted, None if moments is None else moments.flip(0),
                dual_numbers, ctx.dual, ctx.vocab_size,
            )  # fmt: skip
            _, state = _forward(*roles, False, False, ctx.backend)
            grad_teacher, teacher_heat = _backward(
                *roles, state, upstream[KD] * ctx.factor, None, None,
                need_teacher, need_teacher_heat or need_heat, ctx.backend,
            )  # fmt: skip
            if shared and need_heat:
                heat = heat + teacher_heat

        return (
            grad_student if need_student else None,
            grad_teacher if need_teacher else None,
            heat if need_heat else None,
            teacher_heat if need_teacher_heat else None,
        )


@signed
class Fused(torch.autograd.Function):
    """gradient="forward": the weighted loss and its gradient at once; the backward only scales."""

    @staticmethod
    def forward(inplace, student, *arguments):
        if inplace:
            gradient = student.detach()
            loss, values = _fused_(gradient, *arguments)
        else:
            loss, values, gradient = _fused(student, *arguments)
        return loss.sum(), values, gradient

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.inputs, ctx.backend, ctx.spent = len(inputs), inputs[-1], False
        ctx.set_materialize_grads(False)  # or a tensor of zeros as large as the gradient is made
        ctx.save_for_backward(output[2], inputs[1])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx, upstream, *_):
        if ctx.spent:
            raise RuntimeError(
                "gradient='forward' holds one gradient, which the first backward has used: "
                "pass gradient='backward' to call backward more than once"
            )
        ctx.spent = True
        gradient, student = ctx.saved_tensors
        _scale_(gradient, readable(upstream), ctx.backend)
        return None, _once(gradient, student), *[None] * (ctx.inputs - 2)


class _Once(torch.autograd.Function):
    """Passes a gradient on; its own derivative, which would be wrongly 0, is refused."""

    @staticmethod
    def forward(gradient, source):
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, _):
        raise NotImplementedError(
            "fastkd's gradient has no derivative of its own: pass backend='reference', which has"
        )


def _once(gradient: Tensor | None, source: Tensor) -> Tensor | None:
    second = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return _Once.apply(gradient, source) if second and gradient is not None else gradient
