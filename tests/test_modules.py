"""The modules hold settings, and nothing else."""

from __future__ import annotations

import inspect
import pickle

import pytest
import torch

import fastkd
from fastkd.settings import Keywords, Settings
from tests.cases import logits


def test_module_is_the_function():
    student, teacher = logits(4, 10)
    labels, weight = torch.arange(4), torch.rand(4)
    settings = {"divergence": fastkd.JSD(0.3), "temperature": 2.0, "alpha": 0.5}
    module = fastkd.DistillationLoss(**settings)
    expected = fastkd.distillation_loss(
        student, teacher, labels, weight=weight, num_items=3, **settings
    )
    assert torch.equal(module(student, teacher, labels, weight=weight, num_items=3), expected)
    assert not module.state_dict()
    assert repr(module) == (
        "DistillationLoss(divergence=JSD(beta=0.3), temperature=2.0, alpha=0.5)"
    )
    again = pickle.loads(pickle.dumps(module))
    assert torch.equal(again(student, teacher, labels, weight=weight, num_items=3), expected)


def test_module_knows_its_settings():
    with pytest.raises(TypeError, match="no setting 'temprature'"):
        fastkd.DistillationLoss(temprature=2.0)


def test_each_keyword_is_shown_and_typed():
    of_function = inspect.signature(fastkd.distillation_loss).parameters
    keywords = {x.name: x for x in of_function.values() if x.kind is x.KEYWORD_ONLY}
    for name in ("weight", "num_items"):
        del keywords[name]
    assert inspect.signature(fastkd.DistillationLoss).parameters == keywords
    defaults = {name: keyword.default for name, keyword in keywords.items()}
    assert defaults == {"divergence": "forward_kl", **Settings._field_defaults}
    types = {name: of.__forward_arg__ for name, of in Keywords.__annotations__.items()}
    del keywords["return_metrics"]
    assert types == {n: x.annotation.replace("sharding.", "") for n, x in keywords.items()}


@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean"])
def test_kl_div_loss_is_that_of_pytorch(reduction, log_target):
    student, teacher = (x.log_softmax(-1) for x in logits(4, 10))
    target = teacher if log_target else teacher.exp()
    ours, theirs = (
        kind(reduction=reduction, log_target=log_target)
        for kind in (fastkd.KLDivLoss, torch.nn.KLDivLoss)
    )
    assert torch.allclose(ours(student, target), theirs(student, target), rtol=1e-12)
    assert not ours.state_dict()
    assert repr(ours) == f"KLDivLoss(reduction={reduction!r}, log_target={log_target})"


def test_kl_div_loss_checks_its_reduction_when_made():
    with pytest.raises(ValueError, match="batchmean"):
        fastkd.KLDivLoss(reduction="batch_mean")


def test_a_setting_may_be_given_later():
    student, teacher = torch.randn(4, 10), torch.randn(4, 10)
    criterion = fastkd.DistillationLoss(reduction="sum")
    criterion.temperature = 3.0
    expected = fastkd.distillation_loss(student, teacher, temperature=3.0, reduction="sum")
    assert torch.equal(criterion(student, teacher), expected)
    assert "temperature=3.0" in repr(criterion)


def test_a_temperature_that_trains_is_a_parameter_of_the_module():
    student, teacher = logits(4, 10)
    temperature = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    module = fastkd.DistillationLoss(temperature=temperature, alpha=1.0)
    assert list(module.parameters()) == [temperature]
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(student, teacher).backward()
    alone = temperature.detach().clone().requires_grad_()
    fastkd.distillation_loss(student, teacher, temperature=alone).backward()
    assert torch.equal(temperature.grad, alone.grad)
    assert temperature.grad.abs() > 1e-3
    optimizer.step()
    assert temperature.item() != 2.0

    other = fastkd.DistillationLoss(temperature=torch.nn.Parameter(torch.tensor(1.0)))
    other.load_state_dict(module.state_dict())
    assert other.temperature.item() == pytest.approx(temperature.item())
    again = pickle.loads(pickle.dumps(module))
    assert torch.equal(again(student, teacher), module(student, teacher))
    assert repr(module) == "DistillationLoss(temperature=Parameter[], alpha=1.0)"


def test_a_temperature_per_row_moves_with_the_module():
    rows = torch.rand(4) + 1
    module = fastkd.DistillationLoss(teacher_temperature=rows)
    assert not list(module.parameters())
    assert torch.equal(module.state_dict()["teacher_temperature"], rows)
    assert module.to("meta").teacher_temperature.is_meta
    assert repr(module) == "DistillationLoss(teacher_temperature=Tensor[4])"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature must be finite and > 0, got 0.0"),
        ({"temperature": torch.tensor([1.0, -1.0])}, "temperature must be finite and > 0"),
        ({"teacher_temperature": -1}, "teacher_temperature must be"),
        ({"reduction": "average"}, "reduction must be one of"),
        ({"alpha": 2.0}, "alpha must lie in"),
        ({"divergence": "forward_lk"}, "did you mean 'forward_kl'"),
        ({"label_smoothing": 2}, "label_smoothing must lie in"),
        ({"entropy_weight": float("nan")}, "entropy_weight must be finite"),
        ({"ignore_index": None}, "ignore_index must be a number, got NoneType"),
        ({"ignore_index": 1.5}, "ignore_index must be a whole number, got float"),
        ({"vocab_size": "ten"}, "vocab_size must be a number"),
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"backend": "cuda"}, "backend must be one of"),
        ({"gradient": "both"}, "gradient must be one of"),
        ({"standardize": "yes"}, "standardize must be True or False, got 'yes'"),
        ({"teacher_grad": None}, "teacher_grad must be True or False"),
        ({"inplace": True, "reduction": "none"}, "need a scalar loss"),
        ({"inplace": True, "gradient": "backward"}, "needs gradient='forward' or 'auto'"),
        ({"divergence": fastkd.Bernoulli(), "standardize": True}, "is for softmax heads"),
        (
            {"gradient": "forward", "temperature": torch.nn.Parameter(torch.ones(()))},
            "temperature requires one too",
        ),
    ],
)
def test_settings_are_checked_when_the_module_is_made(settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        fastkd.DistillationLoss(**settings)
