"""A saturated student, one that is nearly certain, on every schedule of the kernels.

What remains of its gradient is the difference of two large numbers, of a slope and the mean of all
slopes; it is held to 1e-4 of the row's largest entry, as everywhere.
"""

from __future__ import annotations

import math

import pytest
import torch

import fastkd
from tests.running import NO_TRITON, check

TRITON = [pytest.param("triton", marks=NO_TRITON)]
DIVERGENCES = [
    "reverse_kl", fastkd.Jeffreys(0.3, 0.7), fastkd.JSD(0.5), fastkd.JSD(0.01), fastkd.SkewKL(0.1),
    fastkd.SkewReverseKL(0.1), "tvd",
]  # fmt: skip
REST = [1e-2, 1e-6]  # of the student's probability, that its argmax has not


def sides(columns: int, rest: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One row each; the argmax is the third column."""
    student, teacher = torch.randn(2, 1, columns).unbind()
    student[0, 2] = -math.inf
    student[0, 2] = student.logsumexp(-1) + math.log1p(-rest) - math.log(rest)
    return student, teacher


@pytest.mark.parametrize("backend", TRITON)
@pytest.mark.parametrize("rest", REST)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_gradient(divergence, rest, backend, force):
    check(*sides(20, rest), divergence=divergence, backend=backend)
    for schedule, way in (
        ("resident", "backward"), ("sweep", "forward"), ("sweep", "backward"), ("split", "auto"),
    ):  # fmt: skip
        force(schedule)
        check(*sides(75, rest), divergence=divergence, backend=backend, gradient=way)


@pytest.mark.parametrize("backend", TRITON)
@pytest.mark.parametrize("divergence", ["reverse_kl", fastkd.JSD(0.5), "tvd"], ids=str)
def test_beside_other_rows(divergence, backend):
    rows = [sides(20, rest) for rest in (0.3, 1e-2, 1e-4, 1e-6)]
    student, teacher = (torch.cat(side) for side in zip(*rows, strict=True))
    check(student, teacher, divergence=divergence, backend=backend)
    check(student, teacher, divergence=divergence, backend=backend, temperature=2.0)
