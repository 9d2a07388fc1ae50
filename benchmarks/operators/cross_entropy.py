"""Cross-entropy with labels: what kernels that memory bounds are known to reach."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from benchmarks.cases import Case
from benchmarks.providers import Provider, by_name, compiled

from .base import Operands, Operator

# --- providers: (logits, labels) -----------------------------------------------------------------


def _fastkd(logits: Tensor, labels: Tensor) -> Tensor:
    """At alpha = 0 nobody reads the teacher."""
    loss = fastkd.distillation_loss(logits, logits.detach(), labels, alpha=0.0)
    assert isinstance(loss, Tensor)
    return loss


def _liger(logits: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerCrossEntropyLoss

    # Its forward writes the gradient over the logits, which a model never needs again.
    return LigerCrossEntropyLoss()(logits.clone(), labels)


def _quack(logits: Tensor, labels: Tensor) -> Tensor:
    from quack.cross_entropy import cross_entropy

    return cross_entropy(logits, labels)


class CrossEntropy(Operator):
    name = "cross_entropy"
    divergences = ("label",)
    traffic: ClassVar = {"forward": 1, "full": 2, "replay": 2}
    providers = by_name(
        Provider("eager", F.cross_entropy),
        *compiled(F.cross_entropy),
        Provider("liger", _liger),
        Provider("quack", _quack),
        Provider("fastkd", _fastkd),
    )

    def operands(
        self, case: Case, divergence: str, dtype: torch.dtype, generator: torch.Generator
    ) -> Operands:
        shape, device = (case.rows, case.vocab), generator.device
        logits = 2 * torch.randn(shape, generator=generator, device=device)
        labels = torch.randint(case.vocab, shape[:1], generator=generator, device=device)
        return logits.to(dtype).requires_grad_(), labels

    def row_losses(self, operands: Operands, options: Mapping[str, Any]) -> Tensor:
        logits, labels = operands
        assert logits is not None
        assert labels is not None
        return F.cross_entropy(logits, labels, reduction="none")
