"""A divergence of the user's own: whose name it may take, and what becomes of one defined again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import fastkd
from fastkd.divergences import Divergence
from tests.cases import logits
from tests.closeness import assert_close

STUDENT, TEACHER = logits(4, 10)


def _define(taken: str, factor: float) -> type[Divergence]:
    class Square(fastkd.Divergence):
        name = taken

        @staticmethod
        def value(lp, lq, a, b):
            return factor * (lp.exp() - 2 * lq.exp()) ** 2

    return Square


@pytest.mark.parametrize("name", ["jsd", "forward_kl", "bernoulli", "alpha"])
def test_a_name_of_the_library_is_refused(name):
    before = Divergence.of_name(name)
    with pytest.raises(ValueError, match=rf"{name}.*fastkd\.divergences.*give it another"):
        _define(name, 1.0)
    assert Divergence.of_name(name) is before


def test_a_name_of_another_class_is_refused():
    _define("taken_by_square", 1.0)
    with pytest.raises(ValueError, match=r"taken_by_square.*Square already"):

        class Other(fastkd.Divergence):
            name = "taken_by_square"


def test_a_class_defined_again_replaces_itself():
    """As in a notebook, the gradient to the teacher included, which has a class of its own."""

    def run(kind):
        teacher = TEACHER.clone().requires_grad_()
        loss = fastkd.distillation_loss(STUDENT, teacher, divergence=kind(), teacher_grad=True)
        return loss, *torch.autograd.grad(loss, teacher)

    once = run(_define("defined_twice", 1.0))
    twice = run(_define("defined_twice", 2.0))
    for one, two in zip(once, twice, strict=True):
        assert torch.allclose(2 * one, two)
        assert one.abs().max() > 1e-4


def test_an_object_of_the_class_before_is_refused():
    old = _define("outdated", 1.0)()
    _define("outdated", 2.0)
    with pytest.raises(ValueError, match="defined again: make the object anew"):
        fastkd.distillation_loss(STUDENT, TEACHER, divergence=old)


def test_a_class_of_ones_own_by_name():
    class Halved(fastkd.Divergence):
        name = "halved"
        by_name = True

        @staticmethod
        def value(lp, lq, a, b):
            return (lp.exp() - lq.exp()) ** 2 / 2

    assert torch.equal(
        fastkd.distillation_loss(STUDENT, TEACHER, divergence="halved"),
        fastkd.distillation_loss(STUDENT, TEACHER, divergence=Halved()),
    )
    with pytest.raises(ValueError, match=r"tvd.*halved, or .*, got 'halve'; did you mean 'halved'"):
        fastkd.distillation_loss(STUDENT, TEACHER, divergence="halve")


def test_its_parameters_are_the_fields_that_are_numbers():
    @dataclass(frozen=True)
    class Weighed(fastkd.Divergence):
        name: ClassVar[str] = "a test's own, weighed"
        why: str
        factor: float

    assert Weighed("for a test", 3.0).parameters == (3.0, 0.0)


def test_a_value_that_takes_something_else_is_refused_where_it_is_defined():
    with pytest.raises(TypeError, match=r"Bound.value must be a staticmethod of \(lp, lq, a, b\)"):

        class Bound(fastkd.Divergence):
            name = "a test's own, bound"

            def value(self, lp, lq, a, b):
                return lp - lq


def test_a_divergence_without_a_value_says_what_it_needs():
    class Empty(fastkd.Divergence):
        name = "a test's own, empty"

    with pytest.raises(NotImplementedError, match=r"needs a staticmethod value\(lp, lq, a, b\)"):
        fastkd.distillation_loss(STUDENT, TEACHER, divergence=Empty())


class ChangedInPlace(fastkd.Divergence):
    """Squared differences, the first three doubled by way of a view."""

    name = "changed_in_place"

    @staticmethod
    def value(lp, lq, a, b):
        difference = lp.exp() - lq.exp()
        difference[:, :3] *= 2
        return difference**2


def _changed_in_place(student):
    difference = TEACHER.softmax(-1) - student.softmax(-1)
    factors = torch.tensor([2.0] * 3 + [1.0] * 7, dtype=student.dtype)
    return (factors * difference).square().sum(-1).mean()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_view_changed_in_place(compiled):
    """An operator runs with the dispatch keys excluded by which autograd follows views."""

    def loss(student):
        return fastkd.distillation_loss(
            student, TEACHER, divergence=ChangedInPlace(), backend="torch"
        )

    if compiled:
        loss = torch.compile(loss, backend="aot_eager", fullgraph=True)
    student = STUDENT.clone().requires_grad_()
    (ours,) = torch.autograd.grad(loss(student), student)
    exact = STUDENT.double().requires_grad_()
    (truth,) = torch.autograd.grad(_changed_in_place(exact), exact)
    assert_close(ours, truth, "gradient")


def test_in_inference_mode():
    kind = ChangedInPlace()
    with torch.inference_mode():
        student, teacher = STUDENT.clone(), TEACHER.clone()
        loss = fastkd.distillation_loss(student, teacher, divergence=kind, backend="torch")
    assert_close(loss, _changed_in_place(STUDENT.double()))
