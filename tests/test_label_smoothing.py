"""Label smoothing where it is all there is, under masks, and far from 0."""

from __future__ import annotations

import math

import pytest
import torch

import fastkd
from tests.running import FUSED, check

COLUMNS = [pytest.param(20, id="resident"), pytest.param(300, id="swept")]


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("columns", COLUMNS)
def test_the_mean_of_logits_far_from_zero(columns, backend):
    student, teacher = torch.randn(2, 2, columns)
    labels = torch.tensor([0, columns - 1])
    check(student + 3e4, teacher, labels, alpha=0.1, label_smoothing=0.3, backend=backend)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("columns", COLUMNS)
def test_the_lowest_finite_number_is_a_logit(columns, backend):
    student, teacher = torch.randn(2, 2, columns)
    student[0, 1:4] = torch.finfo(torch.float32).min
    labels = torch.tensor([0, columns - 1])
    check(student, teacher, labels, alpha=0.0, label_smoothing=0.3, backend=backend)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_a_masked_label(smoothing, columns, backend, on_device):
    student, teacher = torch.randn(2, 1, columns)
    student[0, 2] = -math.inf
    labels = torch.tensor([2])
    loss = fastkd.distillation_loss(
        student, teacher, labels, alpha=0.0, label_smoothing=smoothing, backend=backend
    )
    assert loss == math.inf
