"""A problem without a teacher, which alpha = 0 makes: cross-entropy and entropy alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastkd import operators, reference
from fastkd.problem import CE, ENTROPY, KD, Coefficients, Problem
from tests.closeness import assert_close, assert_zero
from tests.conftest import DEVICE


def problem(divergence, labels, **settings):
    """The student's rows hold a mask, and logits beyond the range of fp32's exponentials."""
    student = 2 * torch.randn(2, 4, 12)
    if divergence == "jsd":
        student[0, 1, 2:5] = -torch.inf
        student[1, 2] = 1e4 * torch.randn(12)
    return Problem(
        student.to(DEVICE), None, torch.tensor(2.0, device=DEVICE).expand(8), None, labels, None,
        0.0, divergence, 0.5, 0.0, 10, **settings,
    )  # fmt: skip


def truth(one, coefficients):
    """Cross-entropy and entropy of each row, and the gradient of what the coefficients sum."""
    z = one.student.double().requires_grad_()
    kept = z[..., :10].flatten(0, 1)
    if one.divergence == "jsd":
        hard = F.cross_entropy(kept, one.labels, reduction="none")
        log_q = (kept / 2).log_softmax(-1)
        entropy = -(log_q.exp() * log_q.clamp(min=-1e30)).sum(-1)
    else:
        labels = one.labels.double()
        hard = F.binary_cross_entropy_with_logits(kept, labels, reduction="none").sum(-1)
        log_q = torch.stack([F.logsigmoid(kept / 2), F.logsigmoid(-kept / 2)])
        entropy = -(log_q.exp() * log_q).sum((0, -1))
    loss = coefficients.ce * hard
    if coefficients.entropy is not None:
        loss = loss + coefficients.entropy * entropy
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    return hard, entropy, loss, gradient


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("divergence", ["jsd", "bernoulli"])
@pytest.mark.parametrize("name", ["torch", "triton", "triton swept"])
def test_cross_entropy_and_entropy_alone(name, divergence, entropy, force):
    if name.startswith("triton"):
        pytest.importorskip("triton")
        force("split" if name.endswith("swept") else "resident")
    labels = torch.randint(2, 10, (8,)) if divergence == "jsd" else torch.rand(8, 10)
    labels = torch.where(labels < 5, labels + 5, labels) if divergence == "jsd" else labels
    one = problem(divergence, labels.to(DEVICE))
    backend = operators.backend(name.split()[0], one)
    nothing = torch.zeros((), device=DEVICE).expand(8)
    ce, h = torch.rand(2, 8, device=DEVICE) + 0.5
    factors = Coefficients(nothing, ce, h if entropy else None)
    hard, soft, loss, gradient = truth(one, factors)

    values, state, _ = operators.forward(one, entropy, False, name.split()[0])
    naive = reference.losses(one, entropy, False, False)
    for rows in (values, naive):
        assert_zero(rows[KD])
        assert_close(rows[CE], hard)
        if entropy:
            assert_close(rows[ENTROPY], soft)
    ours, temperature = backend.backward(one, state, factors, True, True)
    assert_close(ours.view(gradient.shape), gradient, "gradient")
    assert (temperature.abs().max() > 0.01) == entropy
    rows, _, ours = backend.fused(one, factors, False, None)
    assert_close(rows, loss)
    assert_close(ours.view(gradient.shape), gradient, "gradient")
    here = one.student.clone()
    backend.fused(one._replace(student=here), factors, False, here)
    assert_close(here, gradient, "gradient")
