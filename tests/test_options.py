"""What stands above the backends: options, weights, reductions; everything against the oracle."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastkd
from fastkd import checks
from tests.cases import logits
from tests.conftest import DEVICE
from tests.running import BACKENDS, FUSED, check, check_everything

B, T, V = 2, 3, 11
LABELS = torch.tensor([[3, -100, 0], [10, 7, 5]])
WEIGHT = torch.tensor([[0.5, 2.0, 1.5], [0.0, 0.25, 3.0]])
ROWS = torch.tensor([[0.7, 3.0, 1.5], [2.0, 1.1, 0.9]])  # a temperature of each row
OTHERS = torch.tensor([[1.3, 0.6, 2.5], [1.0, 4.0, 0.8]])
OPTIONS = {
    "none": {},
    "alpha": {"alpha": 0.3},
    "alpha and weight": {"alpha": 0.3, "weight": WEIGHT},
    "cross-entropy alone": {"alpha": 0.0, "weight": WEIGHT},
    "smoothing": {"alpha": 0.3, "label_smoothing": 0.2, "weight": WEIGHT},
    "entropy": {"entropy_weight": 0.7, "weight": WEIGHT},
    "confidence penalty": {"entropy_weight": -0.7, "temperature": 2.0},
    "mask": {"weight": WEIGHT > 0.5, "alpha": 0.5},
    "temperature": {"temperature": 3.0},
    "temperature of the student": {"temperature": 3.0, "teacher_temperature": 1.0},
    "0-d temperature": {"temperature": torch.tensor(3.0)},
    "0-d temperatures": {"temperature": torch.tensor(3.0), "teacher_temperature": ROWS[0, 2]},
    "temperatures of rows": {"temperature": ROWS, "alpha": 0.3},
    "both temperatures of rows": {"temperature": ROWS, "teacher_temperature": OTHERS},
    "temperatures of rows, unscaled": {"temperature": ROWS, "scale_by_temperature": False},
    "a number and rows": {"temperature": 2.0, "teacher_temperature": OTHERS, "weight": WEIGHT},
    "number of items": {"num_items": 17, "weight": WEIGHT, "alpha": 0.5},
    "tensor of items": {"num_items": torch.tensor(17), "alpha": 0.5},
    "ignored label": {"ignore_index": 7, "alpha": 0.5},
    "padding": {"vocab_size": 9, "alpha": 0.5, "label_smoothing": 0.1, "entropy_weight": 0.1},
    "standardised": {"standardize": True, "temperature": ROWS, "alpha": 0.5, "weight": WEIGHT},
    "everything": {
        "alpha": 0.3, "label_smoothing": 0.2, "entropy_weight": -0.4, "weight": WEIGHT,
        "temperature": ROWS, "teacher_temperature": OTHERS, "vocab_size": 10, "num_items": 4,
        "standardize": True,
    },
}  # fmt: skip


def inputs(options):
    student, teacher = (x.float() for x in logits(B, T, V))
    labels = LABELS.clamp(max=options.get("vocab_size", V) - 1)
    if "ignore_index" in options:
        labels = labels.clamp_min(0)
    return student, teacher, labels


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option(name, backend):
    check_everything(*inputs(OPTIONS[name]), backend=backend, **OPTIONS[name])


@pytest.mark.parametrize("name", [name for name in OPTIONS if "temperature" in name])
def test_every_temperature_of_total_variation(name):
    """Whose scale is the square root."""
    check_everything(*inputs({}), divergence="tvd", backend="torch", **OPTIONS[name])


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_with_the_gradient_in_the_forward(name, backend):
    check(*inputs(OPTIONS[name]), gradient="forward", backend=backend, **OPTIONS[name])


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_entropy_at_a_high_temperature(mode, backend):
    """The gradient is that of log q less its mean, of which each is far larger."""
    student, teacher = (x.float() for x in logits(3, 40))
    check(
        student, teacher, temperature=1e5, scale_by_temperature=False, entropy_weight=1e5,
        gradient=mode, backend=backend,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
def test_every_reduction(reduction, backend):
    options = {"alpha": 0.3, "entropy_weight": 0.4, "weight": WEIGHT, "temperature": ROWS}
    check_everything(*inputs({}), reduction=reduction, backend=backend, **options)
    check_everything(*inputs({})[:2], reduction=reduction, backend=backend, temperature=2.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
def test_bernoulli(reduction, backend):
    student, teacher, _ = inputs({})
    for options in (
        {"alpha": 0.3, "entropy_weight": 0.4, "weight": WEIGHT, "temperature": ROWS},
        {"teacher_temperature": OTHERS, "temperature": 2.0},
    ):
        check_everything(
            student, teacher, torch.rand(B, T, V), reduction=reduction, backend=backend,
            divergence=fastkd.Bernoulli(0.7, 0.4), **options,
        )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_agreement_where_maxima_are_shared(backend):
    """A tie agrees where some entry is a maximum of both rows, not where the first ones are."""
    student = torch.tensor([[2.0, 2.0, 0.0], [2.0, 2.0, 0.0], [1.0, 1.0, 1.0], [0.0, 3.0, 3.0]])
    teacher = torch.tensor([[0.0, 2.0, 1.0], [0.0, 1.0, 2.0], [0.0, 5.0, 1.0], [4.0, 0.0, 4.0]])
    _, metrics = fastkd.distillation_loss(
        student.to(DEVICE), teacher.to(DEVICE), return_metrics=True, backend=backend
    )
    assert metrics.agreement.tolist() == [1, 0, 1, 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_agreement_of_heads_at_a_half(backend):
    """A logit of 0, of either sign, is no yes."""
    student = torch.tensor([0.0, 0.0, 0.0, -0.0, 1.0, -1.0], device=DEVICE)[:, None]
    teacher = torch.tensor([0.0, 1.0, -1.0, 1e-30, 0.0, -0.0], device=DEVICE)[:, None]
    _, metrics = fastkd.distillation_loss(
        student, teacher, divergence=fastkd.Bernoulli(), return_metrics=True, backend=backend
    )
    assert metrics.agreement.tolist() == [1, 0, 1, 0, 0, 1]


# --- no synchronisation ----------------------------------------------------------------------


class _NothingRead(TorchDispatchMode):
    """Refuses to bring a tensor's number to Python, which on a GPU waits for all work before."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "a tensor was read"
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_no_tensor_of_the_options_is_read(mode, backend, monkeypatch):
    monkeypatch.setattr(checks, "may_read", lambda *_: False)  # as on a GPU
    student, teacher = (x.float().to(DEVICE) for x in logits(4, V))
    student.requires_grad_()
    one = torch.ones((), device=DEVICE)
    with _NothingRead():
        loss = fastkd.distillation_loss(
            student, teacher, torch.arange(4, device=DEVICE), alpha=0.5, weight=one.expand(4),
            num_items=17 * one, temperature=2 * one, teacher_temperature=3 * one,
            gradient=mode, backend=backend,
        )  # fmt: skip
        loss.backward()
    with pytest.raises(AssertionError, match="was read"), _NothingRead():
        loss.item()
