"""Logits far from 0, masked by finite numbers, of any size, and temperatures of any size.

A finite number is a logit like any other, however large; only -inf is left out.
"""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

import fastkd
from tests.cases import DIVERGENCES, logits
from tests.closeness import assert_close
from tests.running import NO_TRITON, run, truth

pytestmark = pytest.mark.usefixtures("as_of_many")

BACKENDS = ["reference", "torch"]
MODES = ["forward", "backward"]
LOWEST = torch.finfo(torch.float32).min
MASKS = [-1e4, -1e9, -1e19, -1e30, LOWEST]
KINDS = [
    fastkd.ForwardKL(), fastkd.ReverseKL(), fastkd.JSD(0.5), fastkd.SkewKL(0.1), fastkd.TVD(),
    fastkd.AlphaDivergence(0.5), fastkd.Renyi(2.0),
]  # fmt: skip


def check_rows(student, teacher, backend, mode="backward", **settings):
    """Value and gradient, each row by itself."""
    true, true_gradient = truth(student, teacher, reduction="none", **settings)
    loss, gradient = run(student, teacher, reduction="none", backend=backend, **settings)
    if mode == "forward" and backend != "reference":
        _, gradient = run(
            student, teacher, reduction="sum", backend=backend, gradient=mode, **settings
        )
    for rows in zip(loss, true, strict=True):
        assert_close(*rows)
    for rows, value in zip(zip(gradient, true_gradient, strict=True), true, strict=True):
        if value.isfinite():
            assert_close(*rows, "gradient")
        else:
            assert rows[0].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [1e4, 3e4])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_a_common_offset_costs_no_digits(divergence, offset, backend):
    student, teacher = (x.float() + offset for x in logits(4, 9))
    labels = torch.tensor([1, 2, 3, 4])
    for settings in (
        {"temperature": torch.ones(4)},
        {"temperature": torch.tensor([0.5, 1.0, 2.0, 3.0]), "teacher_temperature": 0.7},
        {"standardize": True, "temperature": 2.0},
    ):
        check_rows(student, teacher, backend, divergence=divergence, entropy_weight=0.1, **settings)
    for mode in MODES:
        path = {"gradient": mode} if backend == "torch" else {}
        settings = {"alpha": 0.5, "label_smoothing": 0.3, "divergence": divergence}
        loss, gradient = run(student, teacher, labels, backend=backend, **path, **settings)
        true, true_gradient = truth(student, teacher, labels, **settings)
        assert_close(loss, true)
        assert_close(gradient, true_gradient, "gradient")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1e10, 1e13, 1e17])
def test_logits_of_any_size(size, backend):
    student, teacher = (size + size * x.float() for x in logits(3, 9))
    for temperature in (size, torch.full((3,), size)):
        check_rows(student, teacher, backend, temperature=temperature, scale_by_temperature=False)


def masked(mask, side):
    """One column, half of the columns, and all but one."""
    both = [x.float() for x in logits(3, 10)]
    for x in both[:1] if side == "student" else both[1:] if side == "teacher" else both:
        x[0, 3] = x[1, :5] = x[2, 1:] = mask
    return both


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("divergence", KINDS, ids=str)
def test_masks_by_a_number_where_logits_are_standardised(divergence, mask, side, mode, backend):
    student, teacher = masked(mask, side)
    for temperatures in ({}, {"temperature": 4.0, "teacher_temperature": 2.0}):
        settings = {"divergence": divergence, "standardize": True} | temperatures
        true, true_gradient = truth(student, teacher, reduction="none", **settings)
        path = {"gradient": mode} if backend == "torch" else {}
        _, gradient = run(student, teacher, reduction="sum", backend=backend, **settings, **path)
        loss, _ = run(student, teacher, reduction="none", backend=backend, **settings)
        assert_close(loss, true)
        assert gradient.isfinite().all()
        for ours, row in zip(gradient, true_gradient, strict=True):
            if row.abs().max() > 1e-25:  # below it, fp32 has few digits left
                assert_close(ours, row, "gradient")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("divergence", KINDS, ids=str)
def test_masks_by_a_number_of_both_sides(divergence, mask, backend):
    student, teacher = masked(mask, "both")
    settings = {"divergence": divergence, "reduction": "none"}
    for temperature in (0.5, 1.0):
        loss, gradient = run(
            student[:2], teacher[:2], temperature=temperature, backend=backend, **settings
        )
        true, true_gradient = truth(student[:2], teacher[:2], temperature=temperature, **settings)
        assert_close(loss, true)
        assert_close(gradient, true_gradient, "gradient")
    loss, gradient = run(
        student, teacher, standardize=True, temperature=4.0, backend=backend, **settings
    )
    assert loss.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_the_lowest_number_is_finite(temperature, backend):
    """Reverse KL where the teacher masks by it what the student does not: 1e37, not infinite."""
    student, teacher = (x.float() for x in logits(2, 9))
    student[:, 4] -= 4.0
    teacher[:, 4] = LOWEST
    settings = {"divergence": "reverse_kl", "scale_by_temperature": False}
    check_rows(student, teacher, backend, temperature=temperature, **settings)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1e-30, 1e-23, 1e-10, 1e10, 1e20, 1e30])
@pytest.mark.parametrize("divergence", KINDS, ids=str)
def test_standardised_rows_of_any_size(divergence, size, backend):
    student, teacher = (x.float() for x in logits(3, 10))
    for both in ((student * size, teacher), (student, teacher * size)):
        check_rows(*both, backend, divergence=divergence, standardize=True)


@pytest.mark.parametrize("temperature", [1e3, 1e6, 1e8, 1e10])
@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if d.name != "tvd"], ids=str)
def test_high_temperatures_tend_to_the_limit(divergence, temperature):
    """curvature / 2 times the variance of the logits' differences, under a uniform distribution."""
    student, teacher = (x.float() for x in logits(4, 9))
    a, b = divergence.parameters
    off = (student - teacher).double()
    off -= off.mean(-1, keepdim=True)
    limit = divergence.curvature(a, b) / 2 * off.square().mean(-1)
    slope = divergence.curvature(a, b) * off / 9
    heats = (temperature, torch.full((4,), temperature))
    for heat in heats:
        loss, gradient = run(
            student, teacher, divergence=divergence, temperature=heat, reduction="none",
            backend="torch",
        )  # fmt: skip
        if temperature >= 1e8:  # the terms that follow are as large as 1 / T
            assert_close(loss, limit)
            assert_close(gradient, slope, "gradient")
        true, true_gradient = truth(
            student, teacher, divergence=divergence, temperature=heat, reduction="none"
        )
        if temperature < 1e6:
            assert_close(loss, true)
            assert_close(gradient, true_gradient, "gradient")


@NO_TRITON
@pytest.mark.parametrize(
    ("divergence", "plan"),
    [
        *((divergence, "sweep") for divergence in (*KINDS, fastkd.Jeffreys(0.3, 1.2))),
        *product((fastkd.ForwardKL(), fastkd.Renyi(2.0)), ("resident", "split")),
    ],
    ids=str,
)
def test_high_temperatures_on_triton(divergence, plan, force):
    student, teacher = (x.float() for x in logits(1, 75))
    force(plan)
    for temperature in (1e4, 1e8):
        settings = {"divergence": divergence, "temperature": temperature}
        check_rows(student, teacher, "triton", **settings)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_sides_that_are_nearly_equal(divergence):
    teacher = torch.randn(4, 9, dtype=torch.float64)
    for noise in (1e-3, 1e-5, 1e-6):
        student = teacher + noise * torch.randn(4, 9, dtype=torch.float64)
        for dtype in (torch.float32, torch.float64):
            both = student.to(dtype), teacher.to(dtype)
            check_rows(*both, "torch", divergence=divergence)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("order", [-2.0, -0.5, 2.0, 5.0])
def test_orders_with_masks_and_two_temperatures(order, standardize, backend):
    """What both sides mask counts nothing, whatever its share in the exponent."""
    divergences = [fastkd.AlphaDivergence(order)]
    if order > 0:
        divergences.append(fastkd.Renyi(order))
    for divergence in divergences:
        for dtype in (torch.float32, torch.float64):
            student, teacher = (x.to(dtype) for x in logits(3, 9))
            student[:, 2:4] = teacher[:, 2:4] = -math.inf
            check_rows(
                student, teacher, backend, divergence=divergence, temperature=4.0,
                teacher_temperature=1.0, standardize=standardize,
            )  # fmt: skip
