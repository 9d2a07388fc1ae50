"""At alpha = 0 the teacher is not read: it may be NaN, and costs nothing."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import fastkd
from tests.cases import logits
from tests.closeness import assert_close
from tests.conftest import DEVICE
from tests.running import BACKENDS, FUSED

N, V = 5, 12
DIVERGENCES = ["forward_kl", fastkd.JSD(0.3), fastkd.Renyi(0.4), "tvd"]


def _student():
    return logits(N, V)[0].float().to(DEVICE).requires_grad_()


LABELS = torch.tensor([3, 0, -100, 11, 7], device=DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("standardize", [False, True])
def test_is_the_cross_entropy_of_the_student(standardize, divergence, mode, backend):
    student = _student()
    loss = fastkd.distillation_loss(
        student, torch.full((N, V), math.nan, device=DEVICE), LABELS, divergence=divergence,
        alpha=0.0, label_smoothing=0.1, temperature=3.0, teacher_temperature=0.5,
        standardize=standardize, gradient=mode, backend=backend,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, student)
    exact = student.detach().double().requires_grad_()
    true = F.cross_entropy(exact, LABELS, label_smoothing=0.1)
    assert_close(loss, true)
    assert_close(gradient, torch.autograd.grad(true, exact)[0], "gradient")


@pytest.mark.parametrize("backend", BACKENDS)
def test_with_the_entropy_of_the_student_and_a_temperature_that_trains(backend):
    student, teacher = _student(), torch.full((N, V), math.nan, device=DEVICE)
    temperature = torch.tensor(2.0, device=DEVICE, requires_grad=True)
    loss = fastkd.distillation_loss(
        student, teacher, LABELS, alpha=0.0, entropy_weight=0.5, temperature=temperature,
        backend=backend,
    )  # fmt: skip
    found = torch.autograd.grad(loss, (student, temperature))
    exact = student.detach().double().requires_grad_()
    t = temperature.detach().double().requires_grad_()
    lq = (exact / t).log_softmax(-1)
    entropy = -(lq.exp() * lq).sum(-1)[LABELS != -100].mean()
    true = F.cross_entropy(exact, LABELS) + 0.5 * entropy
    assert_close(loss, true)
    for ours, theirs in zip(found, torch.autograd.grad(true, (exact, t)), strict=True):
        assert_close(ours, theirs, "gradient")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_of_sigmoids(mode, backend):
    student, labels = _student(), torch.randint(2, (N, V), device=DEVICE)
    loss = fastkd.distillation_loss(
        student, torch.full((N, V), math.nan, device=DEVICE), labels, alpha=0.0,
        divergence=fastkd.Bernoulli(0.3, 0.7), gradient=mode, backend=backend,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, student)
    exact = student.detach().double().requires_grad_()
    true = F.binary_cross_entropy_with_logits(exact, labels.double(), reduction="sum") / N
    assert_close(loss, true)
    assert_close(gradient, torch.autograd.grad(true, exact)[0], "gradient")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_head_of_the_teacher_is_not_multiplied(backend):
    student = _student()
    hidden = torch.full((N, 3), math.nan, device=DEVICE)
    head = fastkd.LinearHead(hidden, torch.ones(V, 3, device=DEVICE))
    loss = fastkd.distillation_loss(student, head, LABELS, alpha=0.0, backend=backend)
    assert_close(loss, F.cross_entropy(student.double(), LABELS))


@pytest.mark.parametrize("backend", FUSED)
def test_a_teacher_that_trains_gets_a_gradient_of_zero(backend):
    student, teacher = _student(), _student()
    temperature = torch.tensor(2.0, device=DEVICE, requires_grad=True)
    loss = fastkd.distillation_loss(
        student, teacher, LABELS, alpha=0.0, teacher_grad=True, teacher_temperature=temperature,
        backend=backend,
    )  # fmt: skip
    for gradient in torch.autograd.grad(loss, (teacher, temperature)):
        assert not gradient.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_metrics_are_those_of_the_teacher(backend):
    student, teacher = _student(), _student().detach()
    settings = {"temperature": 2.0, "return_metrics": True, "backend": backend}
    _, none = fastkd.distillation_loss(student, teacher, LABELS, alpha=0.0, **settings)
    _, half = fastkd.distillation_loss(student, teacher, LABELS, alpha=0.5, **settings)
    assert half.kd.max() > 1e-2
    for one, other in zip(none, half, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", FUSED)
def test_in_place(backend):
    leaf = _student()
    student, teacher = leaf * 1.0, torch.full((N, V), math.nan, device=DEVICE)
    loss = fastkd.distillation_loss(
        student, teacher, LABELS, alpha=0.0, inplace=True, backend=backend
    )
    (gradient,) = torch.autograd.grad(loss, leaf)
    exact = leaf.detach().double().requires_grad_()
    true = F.cross_entropy(exact, LABELS)
    assert_close(loss, true)
    assert_close(gradient, torch.autograd.grad(true, exact)[0], "gradient")


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("divergence", ["forward_kl", fastkd.Bernoulli(0.3, 0.7)], ids=str)
def test_metrics_of_a_broken_teacher_leave_a_compiled_gradient(divergence, backend):
    """Which is that of a teacher that is not read."""
    student, teacher = _student(), torch.full((N, V), math.nan, device=DEVICE)
    labels = LABELS if divergence == "forward_kl" else torch.randint(2, (N, V), device=DEVICE)

    def gradient(metrics):
        found = fastkd.distillation_loss(
            student, teacher, labels, divergence=divergence, alpha=0.0, return_metrics=metrics,
            gradient="forward", backend=backend,
        )  # fmt: skip
        return found[0] if metrics else found

    torch._dynamo.reset()
    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    (ours,) = torch.autograd.grad(compiled(True), student)
    (alone,) = torch.autograd.grad(gradient(False), student)
    assert_close(ours, alone.double(), "gradient")
