"""Finite logits of any size: neighbours of 1e10 are 1024 apart, and masks may be any number."""

from __future__ import annotations

import pytest
import torch

import fastkd
from tests.running import FUSED, check, run

pytestmark = pytest.mark.usefixtures("as_of_many")

COLUMNS = [pytest.param(20, id="resident"), pytest.param(300, id="swept")]
LOWEST = torch.finfo(torch.float32).min


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("size", [1e8, 1e10, 1e12])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", fastkd.JSD(0.5)], ids=str)
def test_both_sides(divergence, size, columns, backend):
    student, teacher = (3 * torch.randn(2, 2, columns)).round() * (size / 4)
    for temperature in (size, size / 3):
        settings = {"divergence": divergence, "temperature": temperature}
        check(student + 5 * size, teacher - size, backend=backend, **settings)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("offset", [1e10, 5e10])
def test_a_common_offset(offset, columns, backend):
    """Of 5e10 over log 2, what rounding leaves is more than an exponent of fp32 can be."""
    teacher = torch.randn(2, columns)
    student = torch.full((2, columns), offset)
    student[:, 1::2] += 4096
    check(student, teacher, backend=backend)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("mask", [-1e19, -1e30, LOWEST])
def test_a_mask_is_a_logit_of_a_standardised_row(mask, columns, backend):
    student, teacher = torch.randn(2, 2, columns)
    student[0, -5:-3] = mask
    student[:, : columns // 2] = teacher[:, : columns // 2] = -torch.inf  # lanes without a number
    check(student, teacher, standardize=True, backend=backend)
    check(student[1:] * 1e20, teacher[1:], standardize=True, backend=backend)
    check(student[1:] * 1e-24, teacher[1:], standardize=True, backend=backend)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("columns", COLUMNS)
def test_infinite_values_have_finite_gradients(columns, backend):
    """A negative order of a huge ratio: w over its sum is at most 1, were both rounded by 64."""
    student, teacher = torch.randn(2, 16, columns)
    teacher[:, 0] = -1e9 * (1 + torch.rand(16))
    for temperature in (0.1, 1.0):
        settings = {"divergence": fastkd.AlphaDivergence(-0.5), "temperature": temperature}
        loss, gradient = run(student, teacher, backend=backend, **settings)
        assert loss == torch.inf
        assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("mask", [-1e4, -1e6, -1e9, -1e30, 1e6])
def test_certain_heads(mask, backend):
    """Reverse too, in which two products with the mask would cancel."""
    student, teacher = torch.randn(2, 2, 300)
    student[:, :7] = mask
    teacher[:, 3], teacher[:, 4] = -30, 200
    for weights in ((1.0, 0.0), (0.0, 1.0), (0.5, 0.5)):
        check(student, teacher, divergence=fastkd.Bernoulli(*weights), backend=backend)
