"""Classes in another dimension than the last: dense predictions."""

from __future__ import annotations

import pytest
import torch

import fastkd
from tests.closeness import assert_close
from tests.running import FUSED, defined


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dim", [1, -3])
def test_dense_predictions(dim, layout, backend, on_device):
    student, teacher = (torch.randn(2, 5, 3, 4).to(memory_format=layout) for _ in range(2))
    labels, weight = torch.randint(5, (2, 3, 4)), torch.rand(2, 3, 4)
    labels[0, 1, 2] = -100
    settings = {"alpha": 0.4, "weight": weight, "reduction": "none"}
    leaf = student.double().requires_grad_()
    last = [x.movedim(1, -1) for x in (leaf, teacher)]
    truth, _ = defined(*last, labels, **settings)
    upstream = torch.rand_like(truth)
    (truth * upstream).sum().backward()
    ours = student.clone(memory_format=layout).requires_grad_()
    loss = fastkd.distillation_loss(ours, teacher, labels, dim=dim, backend=backend, **settings)
    assert loss.shape == (2, 3, 4)
    (loss * upstream).sum().backward()
    assert_close(loss, truth)
    assert_close(ours.grad, leaf.grad, "gradient")


def test_multi_hot_labels_have_the_same_dimensions():
    student, teacher = torch.randn(2, 5, 6), torch.randn(2, 5, 6)
    labels = torch.randint(2, (2, 5, 6)).float()
    settings = {"divergence": fastkd.Bernoulli(), "alpha": 0.5}
    loss = fastkd.distillation_loss(student, teacher, labels, dim=1, **settings)
    truth, _ = defined(*(x.mT for x in (student, teacher, labels)), **settings)
    assert_close(loss, truth)


def test_refusals():
    student, teacher = torch.randn(2, 5, requires_grad=True), torch.randn(2, 5)
    with pytest.raises(ValueError, match="none of the 2 dimensions"):
        fastkd.distillation_loss(student, teacher, dim=2)
    with pytest.raises(ValueError, match="needs the classes last"):
        fastkd.distillation_loss(student * 1, teacher, dim=0, inplace=True)
