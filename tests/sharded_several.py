"""Cases of soft labels and of several teachers beside a sharded student, for tests/test_sharded.py."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import fastkd
from fastkd import chunks
from tests import running, sharded
from tests.closeness import assert_close
from tests.sharded_truth import agree, whole

N, V, H = 6, 23, 5
ROWS = torch.tensor([0.5, 1.0, 2.0, 3.0, 0.7, 1.0])
WEIGHT = torch.tensor([1.0, 0.0, 2.5, 0.3, 1.0, 0.9])


def distributions() -> Tensor:
    """Mixup, of two owners' classes; a class of one owner alone; a broad one; none of any mass."""
    labels = torch.rand(N, V)
    labels[0] = 0.7 * F.one_hot(torch.tensor(1), V) + 0.3 * F.one_hot(torch.tensor(V - 1), V)
    labels[2] = F.one_hot(torch.tensor(V - 2), V)
    labels[4] = 0
    return labels


def soft_labels() -> None:
    student, teacher = torch.randn(2, N, V) * 2
    labels = distributions()
    mixed: dict[str, Any] = {"alpha": 0.4, "label_smoothing": 0.2, "entropy_weight": 0.3}
    agree(student, teacher, labels, more=1, weight=WEIGHT, reduction="none", **mixed)
    agree(student, teacher, labels, more=1, standardize=True, temperature=ROWS, **mixed)
    agree(student, teacher, labels, more=1, alpha=0.0)
    student[3, :13] = teacher[3, :13] = student[1] = -math.inf  # a shard and more, a row
    labels[3, :13] = 0
    agree(student, teacher, labels, more=1, divergence=fastkd.JSD(beta=0.3), **mixed)
    student[5, 0] = -math.inf  # of a label with mass
    agree(student, teacher, labels, more=1, alpha=0.5, reduction="none")


def soft_labels_beside_others() -> None:
    """Heads, chunk by chunk; listed teachers; held gradients; labels that are split already."""
    chunks.CPU_BYTES = 4 * 2 * V  # a few rows
    hidden, weight, teacher = torch.randn(N, H), torch.randn(V, H), torch.randn(N, V)
    mine, labels = sharded.columns(V), distributions()
    listed = fastkd.TopK(*teacher.log_softmax(-1).topk(4)[::-1])
    truth = weight.double().requires_grad_()
    for side in (teacher, listed):
        wanted = fastkd.distillation_loss(
            hidden.double() @ truth.t(), side, labels, alpha=0.3, gradient="backward"
        )
        (grad,) = torch.autograd.grad(wanted, truth, torch.tensor(0.7).double())
        for mode in ("forward", "backward"):
            for some in (labels, labels[:, mine]):
                leaf = weight[mine].clone().requires_grad_()
                loss = fastkd.distillation_loss(
                    fastkd.LinearHead(hidden, leaf), side, some, alpha=0.3, gradient=mode,
                    vocab_size=V, group=dist.group.WORLD,
                )  # fmt: skip
                loss.backward(torch.tensor(0.7))
                assert_close(loss, wanted.detach())
                assert_close(leaf.grad, grad[mine], "gradient")
    chunks.CPU_BYTES = 32 << 20


CASES = {case.__name__: case for case in (soft_labels, soft_labels_beside_others)}
