"""The modules hold settings, and nothing else."""

from __future__ import annotations

import pickle

import pytest
import torch

import fastkd
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
