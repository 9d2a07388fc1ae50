"""Divergences whose parameter is near an end of its range, where their forms are 0 / 0."""

from __future__ import annotations

import pytest
import torch

import fastkd
from tests.running import NO_TRITON, check

NEAR = [0.01, 1e-3, 1e-4, 1e-6]
TRITON = [pytest.param("triton", marks=NO_TRITON)]
DIVERGENCES = [
    *(fastkd.JSD(x) for e in NEAR for x in (e, 1 - e)),
    *(fastkd.SkewKL(x) for e in NEAR for x in (e, 1 - e)),
    *(fastkd.SkewReverseKL(x) for e in NEAR for x in (e, 1 - e)),
    *(fastkd.AlphaDivergence(x) for e in NEAR for x in (e, -e, 1 - e, 1 + e)),
    *(fastkd.Renyi(x) for e in NEAR for x in (1 - e, 1 + e)),
]


@pytest.mark.parametrize("backend", TRITON)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_near_the_end_of_its_range(divergence, backend):
    student, teacher = torch.randn(2, 3, 40) * 3
    check(student, teacher, divergence=divergence, backend=backend)
    check(student, student + teacher / 60, divergence=divergence, backend=backend)


@pytest.mark.parametrize("backend", TRITON)
@pytest.mark.parametrize(
    "divergence", [fastkd.JSD(1e-3), fastkd.JSD(0.999), fastkd.AlphaDivergence(1e-3)], ids=str
)
def test_masks_and_swept_rows(divergence, backend):
    student, teacher = torch.randn(2, 2, 300) * 3
    student[0, :9] = teacher[0, 5:20] = teacher[1, :7] = -torch.inf
    check(student, teacher, divergence=divergence, backend=backend)
