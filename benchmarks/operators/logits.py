"""fastkd.distillation_loss: from teacher's and student's logits to the student's gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from benchmarks import peers
from benchmarks.cases import Case
from benchmarks.peers import IGNORED
from benchmarks.providers import Provider, by_name, compiled
from fastkd.divergences import BUILT_IN

from .base import Operands, Operator

KINDS = {name: kind() for name, kind in BUILT_IN.items()}  # with their default parameters
WITH_LABELS = "+ce"  # half divergence, half cross-entropy


def _kind(divergence: str) -> fastkd.Divergence:
    return KINDS[divergence.removesuffix(WITH_LABELS)]


# --- providers: (student, teacher, labels | None, *, divergence, temperature, alpha) -----------


def _fastkd(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    *,
    divergence: str,
    temperature: float,
    alpha: float,
    **path: Any,
) -> Tensor:
    loss = fastkd.distillation_loss(
        student, teacher, labels,
        divergence=_kind(divergence), temperature=temperature, alpha=alpha, **path,
    )  # fmt: skip
    assert isinstance(loss, Tensor)
    return loss


def _eager(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    *,
    divergence: str,
    temperature: float,
    alpha: float,
) -> Tensor:
    """As users write it, in the dtype of the logits."""
    kind = _kind(divergence)
    scale = temperature**kind.temperature_power
    if divergence == "forward_kl" and labels is None:
        q = F.log_softmax(student / temperature, -1)
        return F.kl_div(q, F.softmax(teacher / temperature, -1), reduction="batchmean") * scale
    lq, lp = F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1)
    rows = _eager_rows(kind, lp, lq) * scale
    if labels is None:
        return rows.mean()
    counts = labels != IGNORED
    kd = (rows * counts).sum() / counts.sum()
    if alpha == 1:
        return kd
    return alpha * kd + (1 - alpha) * F.cross_entropy(student, labels, ignore_index=IGNORED)


def _eager_rows(kind: fastkd.Divergence, lp: Tensor, lq: Tensor) -> Tensor:
    a, b = kind.parameters
    if isinstance(kind, fastkd.ForwardKL):
        return _kl(lp, lq)
    if isinstance(kind, fastkd.ReverseKL):
        return _kl(lq, lp)
    if isinstance(kind, fastkd.Jeffreys):
        return a * _kl(lp, lq) + b * _kl(lq, lp)
    if isinstance(kind, fastkd.JSD):
        m = _mixture(lp, lq, a)
        return a * _kl(lp, m) + (1 - a) * _kl(lq, m)
    if isinstance(kind, fastkd.SkewKL):
        return _kl(lp, _mixture(lp, lq, a))
    if isinstance(kind, fastkd.SkewReverseKL):
        return _kl(lq, _mixture(lq, lp, a))
    return kind.outer(kind.value(lp, lq, a, b).sum(-1), a, b)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)


def _mixture(x: Tensor, y: Tensor, share: float) -> Tensor:
    return torch.logaddexp(x + math.log(share), y + math.log(1 - share))


class Logits(Operator):
    name = "logits"
    divergences = (*KINDS, "forward_kl" + WITH_LABELS)
    traffic: ClassVar = {"forward": 2, "full": 3, "replay": 3}
    providers = by_name(
        Provider("eager", _eager),
        *compiled(_eager),
        Provider("liger", peers.liger),
        Provider("trl", peers.trl),
        Provider("speculators", peers.speculators),
        Provider("orda", peers.orda),
        Provider("fastkd", _fastkd),
        *(
            Provider(
                f"fastkd-{backend}-{gradient}",
                partial(_fastkd, backend=backend, gradient=gradient),
            )
            for backend in ("triton", "torch")
            for gradient in ("forward", "backward")
        ),
    )

    def operands(
        self, case: Case, divergence: str, dtype: torch.dtype, generator: torch.Generator
    ) -> Operands:
        shape, device = (case.rows, case.vocab), generator.device
        logits = 2 * torch.randn(shape, generator=generator, device=device)
        teacher = logits.to(dtype, copy=True)
        logits += torch.randn(shape, generator=generator, device=device)
        labels = None
        if case.ignored or divergence.endswith(WITH_LABELS):
            labels = torch.randint(case.vocab, shape[:1], generator=generator, device=device)
            drawn = torch.rand(shape[:1], generator=generator, device=device)
            labels[drawn < case.ignored] = IGNORED
        return logits.to(dtype).requires_grad_(), teacher, labels

    def options(self, divergence: str, temperature: float) -> dict[str, Any]:
        alpha = 0.5 if divergence.endswith(WITH_LABELS) else 1.0
        return {"divergence": divergence, "temperature": temperature, "alpha": alpha}

    def change(self, operands: Operands) -> None:
        student, teacher, _ = operands
        assert student is not None
        assert teacher is not None
        student.neg_()
        teacher.neg_()

    def row_losses(self, operands: Operands, options: Mapping[str, Any]) -> Tensor:
        student, teacher, labels = operands
        assert student is not None
        assert teacher is not None
        return _fastkd(student, teacher, labels, **options, backend="reference", reduction="none")

    def divisor(self, operands: Operands) -> float:
        student, _, labels = operands
        assert student is not None
        return len(student) if labels is None else int((labels != IGNORED).sum())
