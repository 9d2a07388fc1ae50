"""Losses and gradients of any backend, and the fp64 truth they are held against."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd.checks import HAS_TRITON
from tests import oracle
from tests.cases import DIVERGENCES, KINDS
from tests.closeness import assert_close, assert_zero
from tests.conftest import DEVICE

NO_TRITON = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
FUSED = ["torch", pytest.param("triton", marks=NO_TRITON)]
BACKENDS = ["reference", *FUSED]
# Every divergence on the backends, but on Triton, where the interpreter runs it, one of a class.
_EVERY = [(divergence, "torch") for divergence in DIVERGENCES] + [
    pytest.param(divergence, "triton", marks=NO_TRITON) for divergence in KINDS
]
_NAIVE = [(divergence, "reference") for divergence in DIVERGENCES]
EVERY = pytest.mark.parametrize(("divergence", "backend"), _EVERY, ids=str)
EVERY_AND_REFERENCE = pytest.mark.parametrize(("divergence", "backend"), _NAIVE + _EVERY, ids=str)
# Settings that choose how a loss is computed, and mean nothing to what it is.
PATH = {"backend", "gradient", "inplace", "teacher_grad", "return_metrics"}


def run(student: Tensor, teacher: Tensor, *rest, upstream: Tensor | None = None, **settings):
    """Loss and gradient to the student, at a given upstream gradient."""
    student = student.detach().to(DEVICE).clone().requires_grad_()
    settings = {name: _move(value) for name, value in settings.items()}
    loss = fastkd.distillation_loss(student, _move(teacher), *map(_move, rest), **settings)
    loss.backward(torch.ones_like(loss) if upstream is None else upstream.to(loss))
    return loss.detach(), student.grad


def defined(*tensors, divergence="forward_kl", **settings) -> tuple[Tensor, oracle.Metrics]:
    """Loss and metrics by definition, whatever path the settings choose; differentiable."""
    settings = {name: value for name, value in settings.items() if name not in PATH}
    return oracle.distillation_loss(*tensors, divergence=_definition(divergence), **settings)


def truth(student: Tensor, teacher: Tensor, *rest, upstream: Tensor | None = None, **settings):
    """What `run` should give, in fp64, on the very inputs that the backend saw."""
    student = student.detach().to(DEVICE, torch.float64).requires_grad_()
    settings = {name: _move(value) for name, value in settings.items()}
    loss, _ = defined(student, *map(_move, (teacher, *rest)), **settings)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss)
    (gradient,) = torch.autograd.grad(loss, student, upstream)
    return loss.detach(), gradient


def check(student: Tensor, teacher: Tensor, *rest, backend: str, **settings) -> None:
    """Value and gradient of a backend against the truth."""
    loss, gradient = run(student, teacher, *rest, backend=backend, **settings)
    true_loss, true_gradient = truth(student, teacher, *rest, **settings)
    eager_loss = eager_gradient = None
    if student.dtype in (torch.float16, torch.bfloat16):
        eager_loss, eager_gradient = run(
            student, teacher, *rest, backend="reference", **settings | {"gradient": "auto"}
        )
    assert_close(loss, true_loss, "value", eager_loss)
    assert_close(gradient, true_gradient, "gradient", eager_gradient)


def check_everything(student: Tensor, teacher: Tensor, *rest, backend: str, **settings) -> None:
    """Value, metrics, and the gradients to both sides, temperatures and weight, at an upstream
    gradient that differs from row to row.
    """
    ours, true = (
        everything(student, teacher, *rest, backend=name, **settings) for name in (backend, None)
    )
    assert_everything_close(ours, true)


def assert_everything_close(ours: dict[str, Tensor], true: dict[str, Tensor]) -> None:
    """Of results that `everything` names; where all is zero, zero."""
    assert ours.keys() == true.keys()
    for name, one in ours.items():
        kind = "gradient" if name.startswith("to ") else "value"
        if true[name].count_nonzero():
            assert_close(one, true[name], kind)
        else:
            assert_zero(one)


def everything(student: Tensor, teacher: Tensor, *rest, backend: str | None, **settings):
    """Loss, metrics, and the gradients "to ..." by name; by definition without a backend."""
    dtype = torch.float64 if backend in (None, "reference") else torch.float32
    given = {"student": student, "teacher": teacher} | settings
    given = {name: _move(value) for name, value in given.items()}
    leaves = {
        name: value.detach().to(dtype).requires_grad_()
        for name, value in given.items()
        if isinstance(value, Tensor) and value.is_floating_point() and name != "num_items"
    }
    given |= leaves
    sides = given.pop("student"), given.pop("teacher"), *map(_move, rest)
    if backend is None:
        loss, metrics = defined(*sides, **given)
    else:
        loss, metrics = fastkd.distillation_loss(
            *sides, teacher_grad=True, return_metrics=True, backend=backend, **given
        )
    upstream = -torch.linspace(0.3, 2.0, max(loss.numel(), 1), device=loss.device)
    found = torch.autograd.grad(
        loss, list(leaves.values()), upstream.view(loss.shape).to(loss), materialize_grads=True
    )
    values = {"loss": loss.detach(), **metrics._asdict()}
    gradients = {f"to {name}": g for name, g in zip(leaves, found, strict=True)}
    return {name: x for name, x in (values | gradients).items() if x is not None}


def _move(value):
    return value.to(DEVICE) if isinstance(value, Tensor) else value


def _definition(divergence):
    """A divergence as the oracle knows it: by name and parameters, or a test's own by its terms."""
    if isinstance(divergence, str):
        return divergence
    if divergence.name in oracle.DIVERGENCES:
        return divergence.name, asdict(divergence)
    return lambda lp, lq: divergence.value(lp, lq, *divergence.parameters)
