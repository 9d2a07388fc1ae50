"""A student that is nearly certain, as it is on its own samples, against a broad teacher.

What then remains of the gradient is a small difference of large numbers: it is held to a share of
each row's own largest entry.
"""

from __future__ import annotations

import math

import pytest
import torch

import fastkd
from tests.cases import DIVERGENCES
from tests.closeness import assert_close
from tests.running import NO_TRITON, check, run, truth

pytestmark = pytest.mark.usefixtures("as_of_many")

BACKENDS = ["reference", "torch"]
TRITON = [pytest.param("triton", marks=NO_TRITON)]
SCHEDULES = [
    ("resident", "backward"), ("sweep", "forward"), ("sweep", "backward"), ("split", "auto"),
]  # fmt: skip
CANCELLING = [
    "reverse_kl", fastkd.Jeffreys(0.3, 0.7), fastkd.JSD(0.5), fastkd.JSD(0.01), fastkd.SkewKL(0.1),
    fastkd.SkewReverseKL(0.1), "tvd", fastkd.AlphaDivergence(0.5), fastkd.Renyi(1e-3),
]  # fmt: skip


def saturated(rest, columns=40, first=17):
    """Two rows, all but `rest` of whose probability is on one entry."""
    student, teacher = 0.3 * torch.randn(2, columns), torch.randn(2, columns)
    student[:, first] += math.log((columns - 1) / rest)
    return student, teacher


def check_rows(student, teacher, backend, path=(), **settings):
    """Value, and gradient row by row."""
    loss, gradient = run(student, teacher, backend=backend, **dict(path), **settings)
    true, true_gradient = truth(student, teacher, **settings)
    assert_close(loss, true)
    for ours, row in zip(gradient, true_gradient, strict=True):
        assert_close(ours, row, "gradient")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rest", [1e-1, 4e-3, 1e-3, 1e-6])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_rows_of_a_certain_student(divergence, rest, backend):
    student, teacher = saturated(rest)
    settings = {"divergence": divergence, "reduction": "none"}
    check_rows(student, teacher, backend, **settings)
    check_rows(2 * student, teacher, backend, temperature=torch.full((2,), 2.0), **settings)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("first", [3, 500])
@pytest.mark.parametrize(
    "divergence",
    [fastkd.ReverseKL(), fastkd.JSD(0.5), fastkd.SkewReverseKL(0.1), fastkd.TVD()],
    ids=str,
)
def test_together_with_the_loss(divergence, first, backend):
    """Certain in the first columns, which are searched for the largest logit, and beyond them."""
    student, teacher = saturated(1e-5, columns=700, first=first)
    path = {"gradient": "forward"} if backend == "torch" else {}
    check_rows(student, teacher, backend, path, divergence=divergence, reduction="sum")


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_entries_alike(backend):
    """No entry is certain, but on both the slope is the same."""
    student, teacher = saturated(1e-4)
    for side in (student, teacher):
        side[:, 3] = side[:, 17]
    check_rows(student, teacher, backend, divergence="tvd")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("depth", [-1e4, -1e9])
def test_a_teacher_that_masks_by_a_number(depth, backend):
    """All entries but one: reverse KL is large, and nearly alike on all that the student has."""
    student, teacher = torch.randn(2, 9), torch.randn(2, 9)
    student[:, 0] = -40.0
    teacher[:, 1:] = depth
    check_rows(student, teacher, backend, divergence="reverse_kl", temperature=0.5, reduction="sum")


def test_a_certain_student_far_from_the_teacher():
    """The larger the divergence, the more of the gradient's digits are lost: in fp32 1e-3 of it."""
    student, teacher = torch.randn(64, 1000), 30 * torch.randn(64, 1000)
    student[:, 500] += torch.linspace(8, 14, 64)
    check_rows(student, teacher, "torch", divergence="reverse_kl", reduction="none")
    teacher = torch.randn(64, 1000) * torch.linspace(1, 3, 64)[:, None]
    check_rows(3 * teacher, teacher, "torch", divergence="reverse_kl", reduction="none")


@pytest.mark.parametrize("alpha", [1e-3, 0.1, 0.9])
@pytest.mark.parametrize("size", [4.0, 6.0])
def test_a_student_where_the_teacher_is_not(alpha, size):
    """Skewed KL is at its bound, and what is left of the gradient is tiny."""
    teacher = size * torch.randn(16, 40)
    settings = {"divergence": fastkd.SkewKL(alpha), "reduction": "none"}
    check_rows(-teacher, teacher, "torch", **settings)
    check_rows(-teacher.double(), teacher.double(), "torch", **settings)


@pytest.mark.parametrize("backend", TRITON)
@pytest.mark.parametrize("rest", [1e-2, 1e-6])
@pytest.mark.parametrize("divergence", CANCELLING, ids=str)
def test_every_schedule(divergence, rest, backend, force):
    for columns, plan in ((20, None), *((75, plan) for plan in SCHEDULES)):
        student, teacher = (side[:1] for side in saturated(rest, columns=columns, first=2))
        if plan is not None:
            force(plan[0])
        way = "auto" if plan is None else plan[1]
        check(student, teacher, divergence=divergence, backend=backend, gradient=way)


@pytest.mark.parametrize("backend", TRITON)
@pytest.mark.parametrize("divergence", ["reverse_kl", fastkd.JSD(0.5), "tvd"], ids=str)
def test_beside_other_rows(divergence, backend):
    rows = [saturated(rest, columns=20, first=2) for rest in (0.3, 1e-2, 1e-4, 1e-6)]
    student, teacher = (torch.cat(side) for side in zip(*rows, strict=True))
    check(student, teacher, divergence=divergence, backend=backend)
    check(student, teacher, divergence=divergence, backend=backend, temperature=2.0)


@pytest.mark.parametrize("backend", ["torch", *TRITON])
@pytest.mark.parametrize("rest", [1e-3, 1e-5])
@pytest.mark.parametrize("divergence", ["forward_kl", "tvd", fastkd.Renyi(2.0)], ids=str)
def test_a_teacher_that_is_certain_of_the_same(divergence, rest, backend, force):
    """The sums of both sides then differ in their last digits only, and TVD is their difference."""
    plans = [(40, None), (75, "sweep"), (75, "split")] if backend == "triton" else [(40, None)]
    for columns, plan in plans:
        student, _ = saturated(rest, columns)
        teacher, _ = saturated(rest, columns)
        if plan:
            force(plan)
        check_rows(student, teacher, backend, divergence=divergence, reduction="none")
