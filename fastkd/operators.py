"""The backends, and what a tracer sees of them: one operator for each of their functions.

The operators are opaque to the compiler, which therefore sees neither the row blocks of the eager
path nor the kernels. Where nothing traces, the functions are called without the dispatcher, whose
Python is slow after large tensors have swept the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import tracing
from .divergences import Divergence
from .forms import Events, Head, sources
from .problem import Coefficients, Problem, unpacked_numbers
from .sharding import of, run, together


class Operator:
    """A function that a tracer sees as one call."""

    def __init__(
        self, name: str, function: Callable[..., Any], schema: str, mutates: tuple[str, ...]
    ) -> None:
        self.function = function
        self.traced = torch.library.custom_op(name, function, mutates_args=mutates, schema=schema)
        self.register_fake = self.traced.register_fake

    def __call__(self, *arguments: Any) -> Any:
        watched = tracing.watched() or tracing.opaque(arguments[0])
        return (self.traced if watched else self.function)(*arguments)


def operator(
    name: str, schema: str, mutates: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], Operator]:
    return lambda function: Operator(name, function, schema, mutates)


# --- the backends ----------------------------------------------------------------------------

Gradients = list[Tensor]  # one for each source of the student


def backend(name: str, problem: Problem) -> Any:
    """What computes the problem: a module, or its operators where a tracer looks on."""
    return Traced(name) if _traced(problem) else _module(name, problem)


def _traced(problem: Problem) -> bool:
    return tracing.watched() or tracing.opaque(sources(problem.student)[0])


@cache
def _loaded(module: str) -> Any:
    return import_module(module)


def _module(name: str, problem: Problem) -> Any:
    rows = Divergence.of_name(problem.divergence).rows
    module = _loaded((SHARDED if problem.merge else MODULES)[name, rows])
    if _in_kernels(name, problem):
        module = _loaded("fastkd.kernels.events")
    elif isinstance(problem.teacher, Events):
        module = _loaded("fastkd.events").Listed(module)
    if problem.soft:
        module = _loaded("fastkd.soft_labels").SoftLabels(module)
    if problem.soft or problem.makes_logits:
        module = _loaded("fastkd.chunks").Chunked(module, name)
    return module


def _in_kernels(name: str, problem: Problem) -> bool:
    """Whether a teacher that lists some entries comes to the kernels as it is."""
    listed = name == "triton" and isinstance(problem.teacher, Events)
    return listed and _loaded("fastkd.kernels.events").serves(problem)


MODULES = {
    ("torch", "logits"): "fastkd.eager.logits",
    ("torch", "bernoulli"): "fastkd.eager.bernoulli",
    ("triton", "logits"): "fastkd.kernels.logits",
    ("triton", "bernoulli"): "fastkd.kernels.bernoulli",
}
SHARDED = {  # those of rows whose columns are spread over processes
    ("torch", "logits"): "fastkd.eager.shards",
    ("torch", "bernoulli"): "fastkd.eager.bernoulli",
    ("triton", "logits"): "fastkd.kernels.logits",
    ("triton", "bernoulli"): "fastkd.kernels.bernoulli",
}


class Traced(NamedTuple):
    """A backend's functions (see problem.py) as operators."""

    name: str

    def backward(
        self,
        problem: Problem,
        state: Tensor,
        upstream: Coefficients,
        gradient: bool,
        temperature: bool,
    ) -> tuple[Any, Tensor]:
        return _backward(*problem.pack(), state, *upstream, gradient, temperature, self.name)

    def fused(
        self, problem: Problem, coefficients: Coefficients, metrics: bool, out: Tensor | None
    ) -> tuple[Tensor, Tensor, Any]:
        rest = (*coefficients.rows(problem), metrics, self.name)
        if out is None:
            return _fused(*problem.pack(), *rest)
        tensors, *others = problem.pack()
        loss, values = _fused_(out, tensors[1:], *others, *rest)
        return loss, values, out


PROBLEM = "Tensor?[] tensors, Tensor numbers, SymInt vocab_size, str spec"
COEFFICIENTS = "Tensor kd, Tensor? ce, Tensor? entropy"
SIZE = 4  # of a Packed
EXACT = torch.float64  # of what is kept of several owners' rows


def _split(arguments: Sequence[Any]) -> tuple[Problem, Sequence[Any]]:
    return Problem.unpack(*arguments[:SIZE]), arguments[SIZE:]


def _new_gradients(problem: Problem) -> Gradients:
    student = problem.student
    trains = student.trains if isinstance(student, Head) else (True,)
    like = problem.student_temperature
    return [
        x.new_empty(x.shape) if wanted else like.new_empty(0)
        for x, wanted in zip(sources(student), trains, strict=True)
    ]


def _as_gradients(problem: Problem, found: Any, rows: Tensor) -> Gradients:
    """One tensor for each source; empty where none was wanted."""
    if isinstance(problem.student, Head):
        return [rows.new_empty(0) if x is None else x for x in found]
    return [rows.new_empty(0) if found is None else found.view(problem.student.shape)]


def forward(problem: Problem, entropy: bool, metrics: bool, name: str) -> tuple[Tensor, Tensor]:
    """`values` and `state`, with all gathers."""
    if _traced(problem):
        return _forward(*problem.pack(), entropy, metrics, name)
    return _gathering(problem, entropy, metrics, name)


def _gathering(problem: Problem, entropy: bool, metrics: bool, name: str) -> tuple[Tensor, Tensor]:
    module = _module(name, problem)
    if problem.merge and (problem.soft or problem.makes_logits):  # chunks, whose gathers overlap
        return module.forward(problem, entropy, metrics)
    return run(problem.merge, module.phases(problem, entropy, metrics))


@torch.library.custom_op(
    "fastkd::forward",
    mutates_args=(),
    schema=f"({PROBLEM}, bool entropy, bool metrics, str backend) -> (Tensor, Tensor)",
)
def _forward(*arguments: Any) -> Any:
    problem, (entropy, metrics, name) = _split(arguments)
    return _gathering(problem, entropy, metrics, name)


@_forward.register_fake
def _(*arguments: Any) -> Any:
    problem, (entropy, metrics, name) = _split(arguments)
    return _fake_forward(problem, entropy, metrics, name)


def _fake_forward(
    problem: Problem, entropy: bool, metrics: bool, name: str
) -> tuple[Tensor, Tensor]:
    new = problem.student_temperature.new_empty
    rows, dtype = _state(problem, entropy, metrics, name)
    chunks = _loaded("fastkd.chunks")
    rows += chunks.MOMENTS * chunks.keeps_moments(problem)
    values = new(problem.kinds(entropy, metrics), problem.rows)
    return values, new(rows, problem.rows, dtype=dtype)


def _state(problem: Problem, entropy: bool, metrics: bool, name: str) -> tuple[int, torch.dtype]:
    """How many rows the state of a forward has, and their dtype."""
    sharded, long = problem.merge != "", problem.kinds(entropy, metrics) > 1
    if sharded and problem.soft:
        assert problem.labels is not None
        rows, dtype = _state(problem._replace(labels=problem.labels[:, 0]), entropy, metrics, name)
        return rows + _loaded("fastkd.soft_labels").KEPT, dtype
    if isinstance(problem.teacher, Events) and not _in_kernels(name, problem):
        alone = problem._replace(teacher=None)
        rows, dtype = _state(alone, entropy, metrics, name) if long else (0, problem.dtype)
        if not sharded:
            return rows, dtype
        return rows + problem.teacher.indices.size(1) + _loaded("fastkd.events").SHARES, EXACT
    if Divergence.of_name(problem.divergence).rows == "bernoulli":
        kept = sharded and (problem.temperature_trains or name == "triton")
        return 2 * kept, EXACT if sharded and name == "torch" else problem.dtype
    if name == "torch":
        if not sharded:
            return 0, problem.dtype
        return _loaded("fastkd.eager.shards").state_rows(problem, entropy), EXACT
    return problem.state_rows(problem.kinds(entropy, metrics)), problem.dtype


def forward_of_both(
    problem: Problem, dual: str, dual_numbers: Tensor, entropy: bool, metrics: bool, name: str
) -> tuple[Tensor, Tensor, Tensor]:
    """A forward, and the state of that with the roles exchanged: see autograd.Rows.

    In one operator, so that both gather at once, and a compiler leaves both to the forward.
    """
    if _traced(problem):
        return _forward_of_both(*problem.pack(), dual, dual_numbers, entropy, metrics, name)
    return _run_both(problem, dual, dual_numbers, entropy, metrics, name)


def _run_both(
    problem: Problem, dual: str, dual_numbers: Tensor, entropy: bool, metrics: bool, name: str
) -> tuple[Tensor, Tensor, Tensor]:
    exchanged = _exchanged(problem, dual, dual_numbers)
    calls = (problem, entropy, metrics), (exchanged, False, False)
    modules = [_module(name, one) for one, *_ in calls]
    phases = (module.phases(*call) for module, call in zip(modules, calls, strict=True))
    (values, state), (_, other) = together(of(problem.merge), *phases)
    return values, state, other


def _exchanged(problem: Problem, dual: str, dual_numbers: Tensor) -> Problem:
    a, b, _ = unpacked_numbers(dual_numbers)
    return problem.exchanged(dual, a, b)


@torch.library.custom_op(
    "fastkd::forward_of_both",
    mutates_args=(),
    schema=f"({PROBLEM}, str dual, Tensor dual_numbers, bool entropy, bool metrics, str backend)"
    " -> (Tensor, Tensor, Tensor)",
)
def _forward_of_both(*arguments: Any) -> Any:
    problem, rest = _split(arguments)
    return _run_both(problem, *rest)


@_forward_of_both.register_fake
def _(*arguments: Any) -> Any:
    problem, (dual, dual_numbers, entropy, metrics, name) = _split(arguments)
    exchanged = _exchanged(problem, dual, dual_numbers)
    _, other = _fake_forward(exchanged, False, False, name)
    return *_fake_forward(problem, entropy, metrics, name), other


@torch.library.custom_op(
    "fastkd::backward",
    mutates_args=(),
    schema=f"({PROBLEM}, Tensor state, {COEFFICIENTS}, bool gradient, bool temperature, "
    "str backend) -> (Tensor[], Tensor)",
)
def _backward(*arguments: Any) -> Any:
    problem, (state, kd, ce, entropy, gradient, temperature, name) = _split(arguments)
    out, temperature_grad = _module(name, problem).backward(
        problem, state, Coefficients(kd, ce, entropy), gradient, temperature
    )
    if temperature_grad is None:
        temperature_grad = kd.new_empty(0)
    return _as_gradients(problem, out, kd), temperature_grad


@_backward.register_fake
def _(*arguments: Any) -> Any:
    problem, (_, kd, _, _, gradient, temperature, _) = _split(arguments)
    gradients = _new_gradients(problem) if gradient else [kd.new_empty(0)]
    return gradients, kd.new_empty(kd.shape if temperature else 0)


def _run_fused(problem: Problem, rest: Sequence[Any], out: Tensor | None) -> Any:
    kd, ce, entropy, metrics, name = rest
    loss, values, found = _module(name, problem).fused(
        problem, Coefficients(kd, ce, entropy), metrics, out
    )
    return loss, kd.new_empty(0) if values is None else values, found


def _fake_fused(rest: Sequence[Any]) -> Any:
    kd, _, _, metrics, _ = rest
    return kd.new_empty(kd.shape), kd.new_empty((5, kd.size(0)) if metrics else 0)


@torch.library.custom_op(
    "fastkd::fused",
    mutates_args=(),
    schema=f"({PROBLEM}, {COEFFICIENTS}, bool metrics, str backend) -> (Tensor, Tensor, Tensor[])",
)
def _fused(*arguments: Any) -> Any:
    problem, rest = _split(arguments)
    loss, values, found = _run_fused(problem, rest, None)
    return loss, values, _as_gradients(problem, found, rest[0])


@_fused.register_fake
def _(*arguments: Any) -> Any:
    problem, rest = _split(arguments)
    return *_fake_fused(rest), _new_gradients(problem)


# The student, which the gradient overwrites, has a place of its own before the other tensors.
@torch.library.custom_op(
    "fastkd::fused_",
    mutates_args=("student",),
    schema=f"(Tensor(a!) student, {PROBLEM}, {COEFFICIENTS}, bool metrics, str backend)"
    " -> (Tensor, Tensor)",
)
def _fused_(student: Tensor, tensors: Any, *arguments: Any) -> Any:
    problem, rest = _split(([student, *tensors], *arguments))
    return _run_fused(problem, rest, student)[:2]


@_fused_.register_fake
def _(*arguments: Any) -> Any:
    return _fake_fused(arguments[SIZE + 1 :])


@operator(
    "fastkd::scale_", "(Tensor(a!) gradient, Tensor upstream, str backend) -> ()", ("gradient",)
)
def scale_(gradient: Tensor, upstream: Tensor, name: str) -> None:
    """Multiplies a gradient by a 0-d tensor, in place."""
    _loaded(MODULES[name, "logits"]).scale_(gradient, upstream)


# --- calls -----------------------------------------------------------------------------------


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """function.apply(*arguments), none of which has a default.

    In each call it looks for the signature of `forward`, and binds names to it, which takes 30 us,
    and 100 when the cache is cold. Transforms alone need more than what it comes to then.
    """
    if tracing.traced():
        return function.apply(*arguments)
    if not torch.is_grad_enabled():  # nothing is to be saved
        return function.forward(*arguments)
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


def readable(value: Any) -> Any:
    """A tensor as a kernel may read it and autograd may save it; anything else as it is.

    A lazily negated tensor has its sign in a flag, which a kernel does not see. Autograd saves no
    tensor from inference mode; of its memory another tensor is made.
    """
    if not isinstance(value, Tensor) or torch.compiler.is_compiling():
        return value
    if value.is_neg():
        value = value.resolve_neg()
    if not value.is_inference() or torch.is_inference_mode_enabled():
        return value
    if tracing.opaque(value):
        return value.clone()
    alias = torch.empty(0, dtype=value.dtype, device=value.device)
    return alias.set_(value.untyped_storage(), value.storage_offset(), value.size(), value.stride())
