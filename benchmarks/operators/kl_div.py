"""fastkd.kl_div: from log-probabilities and target to the input's gradient, as F.kl_div."""

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

# --- providers: (input, target, *, log_target) ---------------------------------------------------


def _fastkd(input: Tensor, target: Tensor, *, log_target: bool) -> Tensor:
    return fastkd.kl_div(input, target, reduction="batchmean", log_target=log_target)


def _eager(input: Tensor, target: Tensor, *, log_target: bool) -> Tensor:
    return F.kl_div(input, target, reduction="batchmean", log_target=log_target)


def _liger(input: Tensor, target: Tensor, *, log_target: bool) -> Tensor:
    from liger_kernel.transformers import LigerKLDIVLoss

    return LigerKLDIVLoss(reduction="batchmean", log_target=log_target)(input, target)


class KLDiv(Operator):
    name = "kl_div"
    divergences = ("target", "log_target")
    traffic: ClassVar = {"forward": 2, "full": 3, "replay": 3}
    providers = by_name(
        Provider("eager", _eager),
        *compiled(_eager),
        Provider("liger", _liger),
        Provider("fastkd", _fastkd),
    )

    def operands(
        self, case: Case, divergence: str, dtype: torch.dtype, generator: torch.Generator
    ) -> Operands:
        shape, device = (case.rows, case.vocab), generator.device
        logits = 2 * torch.randn(shape, generator=generator, device=device)
        space = F.log_softmax if divergence == "log_target" else F.softmax
        target = space(logits, -1).to(dtype)
        logits += torch.randn(shape, generator=generator, device=device)
        return F.log_softmax(logits, -1).to(dtype).requires_grad_(), target

    def options(self, divergence: str, temperature: float) -> dict[str, Any]:
        return {"log_target": divergence == "log_target"}

    def change(self, operands: Operands) -> None:
        input, target = operands
        assert input is not None
        assert target is not None
        input.neg_()
        target.copy_(target.flip(-1))

    def row_losses(self, operands: Operands, options: Mapping[str, Any]) -> Tensor:
        input, target = operands
        assert input is not None
        assert target is not None
        return F.kl_div(input, target, reduction="none", **options).sum(-1)
