"""The backends, and what a tracer sees of them: one operator for each of their functions.

The operators are opaque to the compiler, which therefore sees neither the row blocks of the eager
path nor the kernels. Where nothing traces, the functions are called without the dispatcher, whose
Python is slow after large tensors have swept the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import tracing
from .divergences import Divergence
from .forms import Events, Head, sources
from .problem import Coefficients, Problem, unpacked_numbers
from .sharding import run, together


class Operator:
    """A function that a tracer sees as one call."""

    def __init__(
        self, name: str, function: Callable[..., Any], schema: str, mutates: tuple[str, ...]
    ) -> None:
        self.function = function
        self.traced = torch.library.custom_op(name, function, mutates_args=mutates, schema=schema)
        self.register_fake: Callable[[Callable[..., Any]], Any] = self.traced.register_fake

    def __call__(self, *arguments: Any) -> Any:
        return self.caller(arguments[0])(*arguments)

    def caller(self, first: Any) -> Callable[..., Any]:
        """What calls it with this first argument: its function where no tracer looks on."""
        if not (tracing.watched() or tracing.opaque(first)):
            return self.function
        _refuse_transforms()
        return self.traced


PROBLEM = "Tensor?[] tensors, Tensor numbers, SymInt vocab_size, str spec"
COEFFICIENTS = "Tensor? kd, Tensor? ce, Tensor? entropy"  # kd None: the number 0
SIZE = 4  # of a Packed


class OfProblem(Operator):
    """An operator of a Problem and what follows it: f(problem, *rest).

    Nothing that a tracer sees is None: an empty tensor stands for it in what is given back.
    """

    def __init__(
        self, name: str, function: Callable[..., Any], schema: str, mutates: tuple[str, ...]
    ) -> None:
        super().__init__(name, _of_packed(function), f"({PROBLEM}, {schema}", mutates)
        self.function = function
        self.register_fake = lambda fake: self.traced.register_fake(_of_packed(fake))

    def caller(self, first: Problem) -> Callable[..., Any]:
        if not _traced(first):
            return self.function
        _refuse_transforms()
        return self.packed

    def packed(self, problem: Problem, *rest: Any) -> Any:
        return self.traced(*problem.pack(), *rest)


def _traced(problem: Problem) -> bool:
    return tracing.watched() or tracing.opaque(sources(problem.student)[0])


def _of_packed(function: Callable[..., Any]) -> Callable[..., Any]:
    def packed(*arguments: Any) -> Any:
        problem = Problem.unpack(*arguments[:SIZE])
        found = function(problem, *arguments[SIZE:])
        return _filled(found, problem.student_temperature)

    return packed


def _filled(found: Any, like: Tensor) -> Any:
    if isinstance(found, (tuple, list)):
        return type(found)(_filled(one, like) for one in found)
    return like.new_empty(0) if found is None else found


def operator(
    name: str, schema: str, mutates: tuple[str, ...] = (), kind: type[Operator] = Operator
) -> Callable[[Callable[..., Any]], Operator]:
    return lambda function: kind(name, function, schema, mutates)


# --- the backends ----------------------------------------------------------------------------


@cache
def _loaded(module: str) -> Any:
    return import_module(module)


def backend(name: str, problem: Problem) -> Any:
    """What computes the problem, with the functions that problem.py names: a module, or where a
    tracer looks on its operators.
    """
    return Traced(name) if _traced(problem) else _module(name, problem)


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
# The modules of rows whose columns are spread over processes.
SHARDED = MODULES | {("torch", "logits"): "fastkd.eager.shards"}


class Traced(NamedTuple):
    """A backend's functions as operators."""

    name: str

    def backward(
        self, problem: Problem, state: Tensor, upstream: Coefficients, gradient: bool, *rest: Any
    ) -> tuple[list[Tensor], Tensor]:
        return _backward(problem, state, *upstream, gradient, *rest, self.name)

    def fused(
        self, problem: Problem, coefficients: Coefficients, metrics: bool, out: Tensor | None
    ) -> tuple[Tensor, Tensor, Any]:
        kd, ce, entropy = coefficients.rows(problem)
        if coefficients.of_no_divergence:  # of a tensor the operator would not know it
            kd = None
        rest = kd, ce, entropy, metrics, self.name
        if out is None:
            return _fused(problem, *rest)
        alone = problem._replace(student=None)  # which is given once, as it is overwritten
        return *_fused_.traced(*alone.pack(), out, *rest), out


# --- the operators ---------------------------------------------------------------------------

EXACT = torch.float64  # of what is kept of several owners' rows


@operator(
    "fastkd::forward",
    "bool entropy, bool metrics, str backend, str dual='', Tensor? dual_numbers=None)"
    " -> (Tensor, Tensor, Tensor)",
    kind=OfProblem,
)
def forward(
    problem: Problem, entropy: bool, metrics: bool, name: str,
    dual: str = "", dual_numbers: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """`values` and `state`, with all gathers; and the state of the problem with the roles
    exchanged, where `dual` names its divergence: see autograd.Rows.

    In one operator, so that both gather at once, and a compiler leaves both to the forward.
    """
    module = _module(name, problem)
    if dual_numbers is not None:
        other = _exchanged(problem, dual, dual_numbers)
        both = together(
            module.phases(problem, entropy, metrics),
            _module(name, other).phases(other, False, False),
        )
        found = run(problem.merge, both)
        return *found[0], found[1][1]
    if problem.merge and (problem.soft or problem.makes_logits):  # chunks, whose gathers overlap
        return *module.forward(problem, entropy, metrics), None
    return *run(problem.merge, module.phases(problem, entropy, metrics)), None


@forward.register_fake
def _(
    problem: Problem, entropy: bool, metrics: bool, name: str,
    dual: str = "", dual_numbers: Tensor | None = None,
) -> Any:  # fmt: skip
    found = _fake_forward(problem, entropy, metrics, name)
    if dual_numbers is None:
        return *found, None
    return *found, _fake_forward(_exchanged(problem, dual, dual_numbers), False, False, name)[1]


def _exchanged(problem: Problem, dual: str, dual_numbers: Tensor) -> Problem:
    a, b, _ = unpacked_numbers(dual_numbers)
    return problem.exchanged(dual, a, b)


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
        return _loaded("fastkd.eager.joins").state_rows(problem, entropy), EXACT
    return problem.state_rows(problem.kinds(entropy, metrics)), problem.dtype


@operator(
    "fastkd::backward",
    f"Tensor state, {COEFFICIENTS}, bool gradient, bool temperature, str backend)"
    " -> (Tensor[], Tensor)",
    kind=OfProblem,
)
def _backward(
    problem: Problem, state: Tensor, kd: Tensor, ce: Any, entropy: Any, gradient: bool,
    temperature: bool, name: str,
) -> tuple[list[Any], Tensor | None]:  # fmt: skip
    found, temperature_grad = _module(name, problem).backward(
        problem, state, Coefficients(kd, ce, entropy), gradient, temperature
    )
    return gradients(found, problem.student), temperature_grad


@_backward.register_fake
def _(
    problem: Problem, state: Tensor, kd: Tensor, ce: Any, entropy: Any, gradient: bool,
    temperature: bool, name: str,
) -> tuple[list[Any], Tensor | None]:  # fmt: skip
    found = _new_gradients(problem.student) if gradient else gradients(None, problem.student)
    return found, kd.new_empty(kd.shape) if temperature else None


@operator(
    "fastkd::fused",
    f"{COEFFICIENTS}, bool metrics, str backend) -> (Tensor, Tensor, Tensor[])",
    kind=OfProblem,
)
def _fused(
    problem: Problem, kd: Tensor | None, ce: Any, entropy: Any, metrics: bool, name: str,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, list[Any]]:  # fmt: skip
    coefficients = Coefficients(0.0 if kd is None else kd, ce, entropy)
    loss, values, found = _module(name, problem).fused(problem, coefficients, metrics, out)
    return loss, values, gradients(found, problem.student)


@_fused.register_fake
def _(problem: Problem, kd: Any, ce: Any, entropy: Any, metrics: bool, name: str) -> Any:
    return *_new_rows(problem, metrics), _new_gradients(problem.student)


@operator(
    "fastkd::fused_",
    f"Tensor(a!) out, {COEFFICIENTS}, bool metrics, str backend) -> (Tensor, Tensor)",
    ("out",),
    OfProblem,
)
def _fused_(problem: Problem, out: Tensor, *rest: Any) -> tuple[Tensor, Tensor | None]:
    return _fused.function(problem._replace(student=out), *rest, out)[:2]


@_fused_.register_fake
def _(problem: Problem, out: Tensor, kd: Any, ce: Any, entropy: Any, *rest: Any) -> Any:
    metrics, _ = rest
    return _new_rows(problem, metrics)


def _new_rows(problem: Problem, metrics: bool) -> tuple[Tensor, Tensor | None]:
    new, rows = problem.student_temperature.new_empty, problem.rows
    return new(rows), new(5, rows) if metrics else None


def gradients(found: Any, side: Any) -> list[Any]:
    """A gradient for each source of a side, None where it is not wanted."""
    if found is None:
        return [None] * len(sources(side))
    if isinstance(found, Tensor):  # of logits, in the layout that the backend prefers
        return [found if found.shape == side.shape else found.view(side.shape)]
    return found


def _new_gradients(side: Any) -> list[Any]:
    trains = side.trains if isinstance(side, Head) else (True,)
    return [
        x.new_empty(x.shape) if wanted else None
        for x, wanted in zip(sources(side), trains, strict=True)
    ]


@operator(
    "fastkd::scale_", "(Tensor(a!) gradient, Tensor upstream, str backend) -> ()", ("gradient",)
)
def scale_(gradient: Tensor, upstream: Tensor, name: str) -> None:
    """Multiplies a gradient by a 0-d tensor, in place."""
    _loaded(MODULES[name, "logits"]).scale_(gradient, upstream)


def caller(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """function.apply, of arguments none of which has a default.

    In each call it looks for the signature of `forward`, and binds names to it, which takes 30 us,
    and 100 when the cache is cold. Transforms alone need more than what it comes to then.
    """
    if tracing.traced():
        _refuse_transforms()
        return lambda *arguments: _apply_traced(function, arguments)
    if not torch.is_grad_enabled():  # nothing is to be saved
        return function.forward
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def _apply_traced(function: type[torch.autograd.Function], arguments: tuple[Any, ...]) -> Any:
    """function.apply; where nothing trains `forward`, to which Dynamo would hand a context more."""
    if torch.compiler.is_compiling() and not any(map(tracing.trains, arguments)):
        return function.forward(*arguments)
    return function.apply(*arguments)


def _refuse_transforms() -> None:
    found = tracing.transforms()
    if "Vmap" in found:
        raise NotImplementedError(
            "torch.func.vmap, and what is made of it, as jacrev, has no rule for a fused loss: it "
            "takes all rows at once, and reduction='none' gives the loss of each"
        )
    if "Jvp" in found:
        raise NotImplementedError(
            "torch.func.jvp, and what is made of it, as hessian, has no rule for a fused loss: it "
            "has the reverse mode of torch.func.grad and vjp alone"
        )


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
