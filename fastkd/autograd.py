"""The autograd Functions: what is saved, and which of a backend's functions give the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import operators, tracing
from .forms import sources
from .operators import readable
from .problem import CE, ENTROPY, KD, Coefficients, Problem, unpacked_numbers


class Rows(torch.autograd.Function):
    """gradient="backward": per-row values, recomputed in the backward from the saved logits.

    rows(entropy, metrics, backend, dual, dual_numbers, *problem.flat()) -> values. `dual` is the
    name of the divergence with the roles exchanged, and its numbers are a, b and the factor:
    D(p, q) = factor * dual(q, p). "": nothing needs it.
    """

    @staticmethod
    def forward(
        entropy: bool,
        metrics: bool,
        name: str,
        dual: str,
        dual_numbers: Tensor | None,
        numbers: Tensor | Problem,
        vocab_size: int,
        spec: str,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        problem = Problem.unpack(tensors, numbers, vocab_size, spec)
        forward = operators.forward.caller(problem)
        return forward(problem, entropy, metrics, name, dual, dual_numbers)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.entropy, _, ctx.name, ctx.dual, dual_numbers = inputs[:5]
        packed: Sequence[Any] = inputs[5:8]
        if isinstance(packed[0], Problem):
            _, *packed = packed[0].pack()
        numbers, ctx.vocab_size, ctx.spec = packed
        ctx.set_materialize_grads(False)  # or zeros are made for what has no gradient
        ctx.save_for_backward(dual_numbers, numbers, *output[1:], *inputs[8:])
        ctx.mark_non_differentiable(*(x for x in output[1:] if x is not None))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        dual_numbers, numbers, state, other, *tensors = ctx.saved_tensors
        with torch.no_grad():
            problem = Problem.unpack(tensors, numbers, ctx.vocab_size, ctx.spec)
            first = len(sources(problem.student))
            last = first + len(sources(problem.teacher))
            wanted = ctx.needs_input_grad[8:]
            of_student, of_teacher = any(wanted[:first]), any(wanted[first:last])
            of_temperature, of_teachers = wanted[last : last + 2]
            coefficients = Coefficients(
                upstream[KD],
                None if problem.labels is None else upstream[CE],
                upstream[ENTROPY] if ctx.entropy else None,
            )
            student, temperature = _gradients(
                ctx.name, problem, state, coefficients, of_student, of_temperature
            )
            teacher, teacher_temperature = [None] * (last - first), None
            if dual_numbers is not None:
                a, b, factor = unpacked_numbers(dual_numbers)
                shared = problem.teacher_temperature is None
                teacher, teacher_temperature = _gradients(
                    ctx.name, problem.exchanged(ctx.dual, a, b), other,
                    Coefficients(upstream[KD] * factor, None, None), of_teacher,
                    of_temperature if shared else of_teachers,
                )  # fmt: skip
                if shared and teacher_temperature is not None:
                    temperature, teacher_temperature = temperature + teacher_temperature, None
        gradients = *student, *teacher, temperature, teacher_temperature, None, None, None
        return *[None] * 8, *map(_once, gradients, tensors)


def _gradients(
    name: str,
    problem: Problem,
    state: Tensor,
    upstream: Coefficients,
    student: bool,
    temperature: bool,
) -> tuple[list[Any], Any]:
    """Gradients of the student's sources and of its temperatures; None where not wanted."""
    found = temperature_grad = None
    if student or temperature:
        found, temperature_grad = operators.backend(name, problem).backward(
            problem, state, upstream, student, temperature
        )
    found = operators.gradients(found if student else None, problem.student)
    return found, temperature_grad if temperature else None


class Fused(torch.autograd.Function):
    """gradient="forward": the weighted loss and its gradient at once; the backward only scales.

    fused(inplace, metrics, backend, *coefficients, *problem.flat()) -> loss, values, *gradients.
    """

    @staticmethod
    def forward(
        inplace: bool,
        metrics: bool,
        name: str,
        kd: float | Tensor,
        ce: float | Tensor | None,
        entropy: float | Tensor | None,
        numbers: Tensor | Problem,
        vocab_size: int,
        spec: str,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        problem = Problem.unpack(tensors, numbers, vocab_size, spec)
        out = None
        if inplace:
            out = problem.student.detach()
            problem = problem._replace(student=out)
        loss, values, found = operators.backend(name, problem).fused(
            problem, Coefficients(kd, ce, entropy), metrics, out
        )
        if out is not None and not tracing.watched():  # a kernel does not count a new version
            torch.autograd.graph.increment_version(out)
        values = loss if values is None else values
        return loss.sum(), values, *operators.gradients(found, problem.student)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, values, *gradients = output
        ctx.inputs, ctx.name, ctx.spent = len(inputs), inputs[2], False
        ctx.count = len(gradients)
        ctx.set_materialize_grads(False)  # or a tensor of zeros as large as the gradient is made
        ctx.save_for_backward(*gradients, *map(_origin, inputs[9 : 9 + ctx.count]))
        ctx.mark_non_differentiable(values, *(x for x in gradients if x is not None))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * ctx.inputs
        if ctx.spent:
            raise RuntimeError(
                "gradient='forward' holds one gradient, which the first backward has used: "
                "pass gradient='backward' to call backward more than once"
            )
        ctx.spent = True
        saved = ctx.saved_tensors
        gradients, origins = saved[: ctx.count], saved[ctx.count :]
        for gradient in (x for x in gradients if x is not None):
            rows = gradient if gradient.dim() > 1 else gradient[None]
            operators.scale_(rows, readable(upstream), ctx.name)
        rest = ctx.inputs - 9 - ctx.count
        return *[None] * 9, *map(_once, gradients, origins), *[None] * rest


def _origin(source: Tensor | None) -> Tensor | None:
    """An empty tensor where the source is in the graph, which keeps nothing of its memory."""
    if source is None or tracing.traced():
        return source
    with torch.enable_grad():
        return source.repeat(0, *[1] * (source.dim() - 1))


class _Once(torch.autograd.Function):
    """Passes a gradient on; its own derivative, which would be wrongly 0, is refused."""

    @staticmethod
    def forward(gradient: Tensor, origin: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        raise NotImplementedError(
            "fastkd's gradient has no derivative of its own: pass backend='reference', which has"
        )


def _once(gradient: Tensor | None, origin: Tensor | None) -> Any:
    if origin is None:  # of which an operator gives an empty tensor
        return None
    second = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return _Once.apply(gradient, origin) if second and gradient is not None else gradient
