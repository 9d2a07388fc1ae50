"""A fault in the logits stays visible: a NaN loss has a NaN gradient, an infinite one a finite."""

from __future__ import annotations

import math

import pytest
import torch

import fastkd
from tests.cases import DIVERGENCES, logits
from tests.conftest import DEVICE
from tests.running import run

BACKENDS = ["reference", "torch"]
MODES = ["forward", "backward"]
INFINITE = [
    fastkd.ForwardKL(),
    fastkd.ReverseKL(),
    fastkd.Jeffreys(),
    fastkd.AlphaDivergence(-0.5),
    fastkd.AlphaDivergence(1 + 1e-3),
    fastkd.AlphaDivergence(2.0),
    fastkd.AlphaDivergence(5.0),
    fastkd.Renyi(2.0),
]


class Distance(fastkd.Divergence):
    """One whose slope is 0 where its value is NaN."""

    name = "distance"

    @staticmethod
    def value(lp, lq, a, b):
        return (lp.exp() - lq.exp()).abs()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("divergence", [*DIVERGENCES, Distance()], ids=str)
def test_a_nan_loss_has_a_nan_gradient(divergence, standardize, mode, backend):
    """In all columns of its row, and in no other row."""
    for number in (math.nan, math.inf):
        for side in range(2):
            both = [x.float() for x in logits(3, 5)]
            both[side][1, 2] = number
            loss, gradient = run(
                *both, divergence=divergence, standardize=standardize, reduction="sum",
                gradient=mode, backend=backend,
            )  # fmt: skip
            assert loss.isnan()
            assert gradient[1].isnan().all()
            assert gradient[[0, 2]].isfinite().all()
            assert gradient[[0, 2]].abs().amax(-1).gt(1e-4).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperatures", [(1.0, None), (4.0, 1.0)], ids=str)
@pytest.mark.parametrize("divergence", INFINITE, ids=str)
def test_an_infinite_divergence_has_finite_gradients(divergence, temperatures, backend):
    """To student, teacher and temperatures; by masks, and by values beyond the range of fp32."""
    student, teacher = (x.float().to(DEVICE) for x in logits(4, 9))
    student[:, 6:] = teacher[:, 6:] = -math.inf
    student[1, 0] = teacher[2, 1] = -math.inf
    student[3, :3], teacher[3, 3:6] = -1e38, -1e38
    leaves = [student.requires_grad_(), teacher.requires_grad_()]
    leaves += [
        torch.tensor(t, device=DEVICE, requires_grad=True) for t in temperatures if t is not None
    ]
    loss = fastkd.distillation_loss(
        student, teacher, divergence=divergence, temperature=leaves[2],
        teacher_temperature=leaves[3] if len(leaves) > 3 else None, reduction="none",
        scale_by_temperature=False, teacher_grad=True, backend=backend,
    )  # fmt: skip
    assert loss[0].isfinite()
    assert loss.isinf().any()
    assert not loss.isnan().any()
    for gradient in torch.autograd.grad(loss, leaves, torch.ones_like(loss)):
        assert gradient.isfinite().all()
        assert gradient.count_nonzero()
