"""Hidden states with frozen heads on both sides: the logits are made inside the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastkd
from benchmarks import peers
from benchmarks.cases import Case
from benchmarks.providers import Provider, by_name, compiled

from .base import Operands, Operator

HIDDEN = 512
CHUNK = 128  # rows, of the chunked form

# --- providers: (hidden, weight, teacher_hidden, teacher_weight) ---------------------------------


def _fastkd(hidden: Tensor, weight: Tensor, other: Tensor, other_weight: Tensor) -> Tensor:
    student, teacher = fastkd.LinearHead(hidden, weight), fastkd.LinearHead(other, other_weight)
    loss = fastkd.distillation_loss(student, teacher)
    assert isinstance(loss, Tensor)
    return loss


def _rows(hidden: Tensor, weight: Tensor, other: Tensor, other_weight: Tensor) -> Tensor:
    q, p = (hidden @ weight.mT).log_softmax(-1), (other @ other_weight.mT).softmax(-1)
    return F.kl_div(q, p, reduction="none").sum(-1)


def _eager(hidden: Tensor, weight: Tensor, other: Tensor, other_weight: Tensor) -> Tensor:
    return _rows(hidden, weight, other, other_weight).mean()


def _chunked(hidden: Tensor, weight: Tensor, other: Tensor, other_weight: Tensor) -> Tensor:
    """The form of TRL's and torchtune's: some rows at a time, made again in the backward."""
    sums = [
        checkpoint(_rows, some, weight, their, other_weight, use_reentrant=False).sum()
        for some, their in zip(hidden.split(CHUNK), other.split(CHUNK), strict=True)
    ]
    return torch.stack(sums).sum() / len(hidden)


class Linear(Operator):
    name = "linear"
    divergences = ("forward_kl",)
    traffic: ClassVar = {}  # products bound it, not memory
    providers = by_name(
        Provider("eager", _eager),
        *compiled(_eager),
        Provider("chunked", _chunked),
        Provider("liger", peers.liger_linear),
        Provider("liger-triton", peers.liger_triton),
        Provider("trl", peers.trl_linear),
        Provider("fastkd", _fastkd),
    )

    def operands(
        self, case: Case, divergence: str, dtype: torch.dtype, generator: torch.Generator
    ) -> Operands:
        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=generator.device).to(dtype)

        hidden, other = drawn(case.rows, HIDDEN), drawn(case.rows, HIDDEN)
        weights = (drawn(case.vocab, HIDDEN) / HIDDEN**0.5 for _ in range(2))
        weight, other_weight = weights
        return hidden.requires_grad_(), weight, other, other_weight

    def rows(self, operands: Operands, index: Any) -> Operands:
        """Of the hidden states; the weights belong to all."""
        hidden, weight, other, other_weight = operands
        some, their = super().rows((hidden, other), index)
        return some, weight, their, other_weight

    def row_losses(self, operands: Operands, options: Mapping[str, Any]) -> Tensor:
        hidden, weight, other, other_weight = operands
        assert hidden is not None
        assert weight is not None
        assert other is not None
        assert other_weight is not None
        return _rows(hidden, weight, other, other_weight)
