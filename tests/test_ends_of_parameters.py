"""Parameters near the ends of their ranges: to 1e-3 of them to all digits, beyond to the limits."""

from __future__ import annotations

import pytest
import torch

import fastkd
from tests.cases import logits
from tests.closeness import assert_close
from tests.running import NO_TRITON, check, run, truth

BACKENDS = ["reference", "torch"]
NEAR = [
    *(fastkd.AlphaDivergence(a) for a in (1e-3, -1e-3, 0.01, 0.1, 0.9, 0.99, 0.999, 1.001)),
    *(fastkd.Renyi(a) for a in (1e-3, 0.01, 0.1, 0.9, 0.99, 0.999, 1.001)),
    *(fastkd.JSD(b) for b in (1e-3, 0.01, 0.99, 0.999)),
    *(kind(a) for kind in (fastkd.SkewKL, fastkd.SkewReverseKL) for a in (1e-3, 0.9, 0.99, 0.999)),
]
LIMITS = [
    *((fastkd.AlphaDivergence(1 + e), "forward_kl", 1.0) for e in (1e-6, -1e-6, 1e-9)),
    *((fastkd.AlphaDivergence(e), "reverse_kl", 1.0) for e in (1e-6, -1e-6, 1e-9)),
    *((fastkd.Renyi(1 + e), "forward_kl", 1.0) for e in (1e-6, -1e-6, 1e-9)),
    (fastkd.Renyi(1e-6), "reverse_kl", 1e-6),
    (fastkd.JSD(1e-6), "forward_kl", 1e-6),
    (fastkd.JSD(1 - 1e-6), "reverse_kl", 1e-6),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [0.3, 2.0, 8.0])
@pytest.mark.parametrize("divergence", NEAR, ids=str)
def test_near_the_ends(divergence, scale, backend):
    student, teacher = (x.float() for x in logits(4, 30, scale=scale, noise=scale))
    settings = {"divergence": divergence, "reduction": "none"}
    loss, gradient = run(student, teacher, backend=backend, **settings)
    true, true_gradient = truth(student, teacher, **settings)
    assert_close(loss, true)
    for ours, row in zip(loss, true, strict=True):  # a small one by itself, to four digits
        assert_close(ours, row, "gradient")
    for ours, row in zip(gradient, true_gradient, strict=True):
        assert_close(ours, row, "gradient")


@pytest.mark.parametrize(("near", "limit", "factor"), LIMITS, ids=str)
def test_beyond_they_tend_to_the_limits(near, limit, factor):
    student, teacher = (x.float() for x in logits(4, 30))
    loss, gradient = run(student, teacher, divergence=near, backend="torch")
    true, true_gradient = truth(student, teacher, divergence=limit)
    assert_close(loss, factor * true)
    assert_close(gradient, factor * true_gradient, "gradient")


@pytest.mark.parametrize("divergence", [fastkd.AlphaDivergence(0.9), fastkd.Renyi(0.9)], ids=str)
def test_sides_that_hardly_meet(divergence):
    """The sum is far from 1 there, which is then not what is to be subtracted from it."""
    student, teacher = (x.float() for x in logits(3, 30))
    student[:, 15:] -= 1000
    teacher[:, :15] -= 1000
    loss, gradient = run(student, teacher, divergence=divergence, backend="torch")
    true, true_gradient = truth(student, teacher, divergence=divergence)
    assert_close(loss, true)
    if divergence.name == "renyi":
        assert_close(gradient, true_gradient, "gradient")
    else:  # as good as 0
        torch.testing.assert_close(gradient.double(), true_gradient, rtol=0, atol=1e-7)


# --- on the Triton backend ---------------------------------------------------------------------

DISTANCES = [0.01, 1e-3, 1e-4, 1e-6]
TRITON = [pytest.param("triton", marks=NO_TRITON)]
NEARER = [
    *(fastkd.JSD(x) for e in DISTANCES for x in (e, 1 - e)),
    *(fastkd.SkewKL(x) for e in DISTANCES for x in (e, 1 - e)),
    *(fastkd.SkewReverseKL(x) for e in DISTANCES for x in (e, 1 - e)),
    *(fastkd.AlphaDivergence(x) for e in DISTANCES for x in (e, -e, 1 - e, 1 + e)),
    *(fastkd.Renyi(x) for e in DISTANCES for x in (e, 1 - e, 1 + e)),
]


@pytest.mark.parametrize("backend", TRITON)
@pytest.mark.parametrize("divergence", NEARER, ids=str)
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
