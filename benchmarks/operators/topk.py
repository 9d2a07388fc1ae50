"""A teacher known by its best 64 entries of each row, and the rest as one event."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from benchmarks import peers
from benchmarks.cases import Case
from benchmarks.providers import Provider, by_name, compiled

from .base import Operands, Operator

K = 64

# --- providers: (student, indices, log_probs, tail) ----------------------------------------------


def _fastkd(student: Tensor, indices: Tensor, log_probs: Tensor, tail: Tensor) -> Tensor:
    loss = fastkd.distillation_loss(student, fastkd.TopK(indices, log_probs, tail_log_prob=tail))
    assert isinstance(loss, Tensor)
    return loss


def _rows(student: Tensor, indices: Tensor, log_probs: Tensor, tail: Tensor) -> Tensor:
    """KL over K + 1 events of each row; the rest of the student's row is summed, not subtracted."""
    rest = student.scatter(-1, indices, -torch.inf).logsumexp(-1, keepdim=True)
    q = torch.cat([student.gather(-1, indices), rest], -1) - student.logsumexp(-1, keepdim=True)
    return F.kl_div(
        q, torch.cat([log_probs, tail[:, None]], -1), reduction="none", log_target=True
    ).sum(-1)


def _eager(student: Tensor, indices: Tensor, log_probs: Tensor, tail: Tensor) -> Tensor:
    return _rows(student, indices, log_probs, tail).mean()


def _subtracted(student: Tensor, indices: Tensor, log_probs: Tensor, tail: Tensor) -> Tensor:
    """As in TRL's and DistillKit's losses: what is not listed as 1 less what is."""
    q = student.log_softmax(-1).gather(-1, indices)
    rest = torch.log1p(-q.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-7))
    target = torch.cat([log_probs, tail[:, None]], -1)
    return F.kl_div(torch.cat([q, rest], -1), target, reduction="batchmean", log_target=True)


class TopK(Operator):
    name = "topk"
    divergences = ("forward_kl",)
    traffic: ClassVar = {"forward": 1, "full": 2, "replay": 2}
    providers = by_name(
        Provider("eager", _eager),
        *compiled(_eager),
        Provider("subtracted", _subtracted),
        Provider("trl", peers.trl_topk),
        Provider("fastkd", _fastkd),
    )

    def operands(
        self, case: Case, divergence: str, dtype: torch.dtype, generator: torch.Generator
    ) -> Operands:
        shape, device = (case.rows, case.vocab), generator.device
        logits = 2 * torch.randn(shape, generator=generator, device=device)
        teacher = fastkd.TopK.from_logits(logits, min(K, case.vocab - 1))
        logits += torch.randn(shape, generator=generator, device=device)
        known = teacher.log_probs, teacher.tail_log_prob
        return logits.to(dtype).requires_grad_(), teacher.indices, *known

    def row_losses(self, operands: Operands, options: Mapping[str, Any]) -> Tensor:
        student, indices, log_probs, tail = operands
        assert student is not None
        assert indices is not None
        assert log_probs is not None
        assert tail is not None
        return _rows(student, indices, log_probs, tail)
