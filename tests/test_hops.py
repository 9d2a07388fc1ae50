"""How far it is from the public call to the launch of a kernel, and to a formula on the CPU."""

from __future__ import annotations

import sys

import pytest
import torch

import fastkd
from tests.conftest import DEVICE


class Reached(Exception):
    """With the functions of fastkd that lie between the call and this place."""


def reached(*_, **__):
    frame, names = sys._getframe(1), []
    while frame.f_code.co_name != "distillation_loss":
        names.append(frame.f_code.co_name)
        frame = frame.f_back
    raise Reached(names[::-1])


class Kernel:
    def __getitem__(self, grid):
        return reached


class Formula(fastkd.ForwardKL):
    name = "formula_at_the_end_of_the_way"
    by_name = False

    @classmethod
    def value_and_descent(cls, pair, a, b):
        reached()


def functions(device, **settings):
    student, teacher = torch.randn(2, 4, 7, device=device).unbind()
    with pytest.raises(Reached) as found:
        fastkd.distillation_loss(student.requires_grad_(), teacher, **settings)
    return found.value.args[0]


@pytest.mark.parametrize(("gradient", "most"), [("forward", 4), ("backward", 5)])
def test_few_functions_lie_before_a_launch(gradient, most, monkeypatch):
    pytest.importorskip("triton")
    from fastkd.kernels import logits

    monkeypatch.setattr(logits, "resident", Kernel())
    way = functions(DEVICE, backend="triton", gradient=gradient)
    assert len(way) <= most, way


@pytest.mark.parametrize(("gradient", "most"), [("forward", 4), ("backward", 6)])
def test_few_functions_lie_before_a_formula(gradient, most):
    *way, _ = functions("cpu", divergence=Formula(), gradient=gradient)
    assert len(way) <= most, way
