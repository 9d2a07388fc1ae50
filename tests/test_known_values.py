"""KL divergences whose value the first sweep's sums give: the gradient's sweep computes none."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton")

import fastkd
from fastkd.kernels import logits
from fastkd.problem import Coefficients
from tests.closeness import assert_close
from tests.test_kernels import Truth, problem_of, rows_around_the_threshold

BOTH = pytest.mark.parametrize("divergence", [fastkd.ForwardKL(), fastkd.ReverseKL()], ids=str)


def assert_every_row_is_right(z, y, divergence):
    """Loss and gradient, each row by its own size."""
    problem = problem_of(z, y, divergence)
    truth = Truth(problem, divergence)
    one = Coefficients(torch.ones(problem.rows, device=z.device), None, None)
    loss, _, gradient = logits.fused(problem, one, metrics=False, out=None)
    assert_close(loss / truth.values["kd"], torch.ones_like(loss), "value")
    expected = truth.gradient(one)[0]
    for ours, true in zip(gradient, expected, strict=True):
        assert_close(ours, true, "gradient")
    return truth


@BOTH
def test_values_on_both_sides_of_the_threshold(divergence, force, device):
    force("sweep")
    z, y = rows_around_the_threshold(device)
    truth = assert_every_row_is_right(z, y, divergence).values["kd"]
    assert truth.min() < 1e-6
    assert (truth > 0.1).sum() > 2


@BOTH
def test_both_sides_equally_certain_of_an_entry(divergence, force, device):
    """The value is large by all other entries, whose gradients are small beside that entry's q."""
    force(("sweep", 128, 8, 1, 1))
    z, y = 2 * torch.rand(2, 2, 20000, device=device)
    z[:, ::2] -= 2
    for x in (z, y):
        x[:, 7] = -torch.inf
        x[:, 7] = x.logsumexp(-1) + torch.tensor([-0.5, 0.5], device=device)
    truth = assert_every_row_is_right(z, y, divergence)
    assert (truth.values["kd"] > 0.1).all()


@BOTH
def test_a_nearly_certain_student(divergence, force, device):
    """Its own slope and the mean of all nearly cancel."""
    force("sweep")
    y = torch.randn(3, 300, device=device)
    z = torch.randn(3, 300, device=device)
    z[:, 5] = z.logsumexp(-1) + torch.tensor([4.0, 8.0, 12.0], device=device)
    y[:, 5] = y.logsumexp(-1) + torch.tensor([1.0, 0.0, -1.0], device=device)
    assert_every_row_is_right(z, y, divergence)


@BOTH
def test_what_else_is_wanted_of_such_rows(divergence, force, device):
    """Hard labels and entropy beside it, rows that do not count, and masked entries."""
    force("sweep")
    z, y = 2 * torch.randn(2, 5, 300, device=device)
    z[1, 40], y[1, 40] = -torch.inf, -torch.inf
    labels = torch.tensor([0, 299, 31, 32, 128], device=device)
    counted = torch.tensor([True, True, False, True, True], device=device)
    problem = problem_of(z, y, divergence, labels=labels, counted=counted)
    truth = Truth(problem, divergence)
    factors = Coefficients(*torch.rand(3, 5, device=device))
    loss, _, gradient = logits.fused(problem, factors, metrics=False, out=None)
    expected = sum(f * truth.values[name] for name, f in factors._asdict().items())
    assert_close(loss, torch.where(counted, expected, 0.0))
    assert_close(gradient, truth.gradient(factors, counted)[0], "gradient")
