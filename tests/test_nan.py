"""NaN or +inf among the logits of a row reaches its loss and all of its gradient."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

import fastkd
from tests.running import NO_TRITON, run

TRITON = [pytest.param("triton", marks=NO_TRITON)]
DIVERGENCES = [
    "forward_kl", "reverse_kl", fastkd.Jeffreys(0.3, 0.7), fastkd.JSD(0.5), fastkd.JSD(1e-4),
    fastkd.SkewKL(0.1), fastkd.SkewReverseKL(0.1), "tvd", fastkd.AlphaDivergence(2.0),
    fastkd.AlphaDivergence(0.001), fastkd.Renyi(0.5), fastkd.TAID(0.4), fastkd.AlphaBeta(0.2, 0.7),
    fastkd.ToDi(),
]  # fmt: skip
LABEL_AWARE = [fastkd.DKD(), fastkd.DKD(0.0, 2.0), fastkd.NKD()]
BROKEN = ((0, math.nan), (1, math.nan), (0, math.inf), (1, math.inf))
COLUMNS = [pytest.param(3, id="resident"), pytest.param(300, id="swept")]


@pytest.mark.parametrize("backend", TRITON)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_a_broken_row_has_a_broken_gradient(divergence, columns, backend):
    """Zeros there would let a GradScaler take the step."""
    for side, broken in BROKEN:
        sides = [torch.randn(2, columns) for _ in range(2)]
        sides[side][0, 1] = broken
        for way in ("forward", "backward"):
            loss, gradient = run(
                *sides, divergence=divergence, backend=backend, gradient=way, reduction="sum"
            )
            assert loss.isnan(), (side, broken, way)
            assert gradient[0].isnan().all(), (side, broken, way)
            assert gradient[1].isfinite().all(), (side, broken, way)


@pytest.mark.parametrize("backend", ["torch", *TRITON])
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("divergence", LABEL_AWARE, ids=str)
def test_a_row_broken_at_its_label_or_beside_it(divergence, columns, backend, on_device):
    """A label at +inf is not a student that is certain of it."""
    broken = list(product(BROKEN, (0, 1)))
    sides = [torch.randn(len(broken) + 1, columns) for _ in range(2)]
    for row, ((side, number), _) in enumerate(broken):
        sides[side][row, 1] = number
    labels = torch.tensor([*(label for _, label in broken), 0])
    for way, reduction in (("forward", "sum"), ("backward", "none")):
        leaves = [x.clone().requires_grad_(x is sides[0] or way == "backward") for x in sides]
        loss = fastkd.distillation_loss(
            *leaves, labels, divergence=divergence, backend=backend, gradient=way,
            teacher_grad=True, reduction=reduction,
        )  # fmt: skip
        loss.sum().backward()
        assert loss.flatten()[: len(broken)].isnan().all(), way
        assert loss.flatten()[-1].isfinite() or reduction == "sum"
        for leaf in leaves:
            if leaf.requires_grad:
                assert leaf.grad[:-1].isnan().all(), (way, leaf.grad[:, 1])
                assert leaf.grad[-1].isfinite().all(), way


@pytest.mark.parametrize("backend", TRITON)
@pytest.mark.parametrize("columns", COLUMNS)
def test_an_infinite_divergence_has_a_gradient_of_zero(columns, backend):
    student, teacher = torch.randn(2, 1, columns).unbind()
    teacher[0, 0] = -math.inf
    loss, gradient = run(student, teacher, divergence="reverse_kl", backend=backend)
    assert loss == math.inf
    assert not gradient.any()


@pytest.mark.parametrize("backend", ["torch", *TRITON])
@pytest.mark.parametrize("columns", COLUMNS)
def test_a_teacher_without_a_say_breaks_no_gradient(columns, backend, on_device):
    """At alpha = 0 it is read for figures, or since it trains."""
    student, teacher = torch.randn(2, 2, columns).unbind()
    hot = torch.rand(2, columns)
    teacher[0, 1] = math.nan
    for divergence, labels in (
        ("forward_kl", torch.tensor([1, 2])),
        (fastkd.JSD(0.3), torch.tensor([1, 2])),
        (fastkd.Bernoulli(1.0, 0.5), hot),
    ):
        for way in ("forward", "backward"):
            leaf, other = student.clone().requires_grad_(), teacher.clone()
            other.requires_grad_(way == "backward")
            loss, metrics = fastkd.distillation_loss(
                leaf, other, labels, divergence=divergence, alpha=0.0, backend=backend,
                gradient=way, return_metrics=True, teacher_grad=True,
            )  # fmt: skip
            loss.backward()
            assert metrics.kd[0].isnan()
            assert leaf.grad.isfinite().all()
            assert leaf.grad[0].all()
            if other.requires_grad:
                assert not other.grad.any()
