"""Losses and gradients of any backend, and the fp64 truth they are held against."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd.checks import HAS_TRITON
from tests.closeness import assert_close
from tests.conftest import DEVICE

NO_TRITON = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
FUSED = ["torch", pytest.param("triton", marks=NO_TRITON)]
BACKENDS = ["reference", *FUSED]


def run(student: Tensor, teacher: Tensor, *rest, upstream: Tensor | None = None, **settings):
    """Loss and gradient to the student, at a given upstream gradient."""
    student = student.detach().to(DEVICE).clone().requires_grad_()
    loss = fastkd.distillation_loss(student, _move(teacher), *map(_move, rest), **settings)
    loss.backward(torch.ones_like(loss) if upstream is None else upstream.to(loss))
    return loss.detach(), student.grad


def truth(student: Tensor, teacher: Tensor, *rest, **settings):
    """The same in fp64 by the reference, on the very inputs that the backend saw."""
    settings = {name: _double(value) for name, value in settings.items()}
    settings |= {"backend": "reference", "gradient": "auto"}
    return run(student.double(), teacher.double(), *rest, **settings)


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


def _move(value):
    return value.to(DEVICE) if isinstance(value, Tensor) else value


def _double(value):
    if isinstance(value, Tensor) and value.dtype.is_floating_point:
        return value.double()
    return value
