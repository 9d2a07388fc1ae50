"""The methods of training a student that the default job compares, as losses on logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastkd.divergences import ForwardKL
from fastkd.functional import distillation_loss

# Student logits [N, V], teacher logits [N, V], labels [N] to a 0-d loss.
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

HARD, EAGER, FASTKD = "hard labels", "F.kl_div", "fastkd"
TEACHER = "teacher"
LONGER = "hard labels x2"  # with twice the steps
# On held-out text, per token: nats, nats, and a share.
FIGURES = ("validation_loss", "kl_to_teacher", "agreement")


def methods(settings: dict[str, Any]) -> dict[str, Loss]:
    """The three losses by name, with these arguments of `distillation_loss`.

    The last two are the same number, written twice.
    """

    def hard(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(student, labels)

    def eager(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        T_s, T_t, alpha = (settings[n] for n in ("temperature", "teacher_temperature", "alpha"))
        log_q = F.log_softmax(student / T_s, dim=-1)
        p = F.softmax(teacher / T_t, dim=-1)
        kd = F.kl_div(log_q, p, reduction="batchmean")
        if settings["scale_by_temperature"]:
            kd = kd * (T_s * T_t)
        return alpha * kd + (1 - alpha) * F.cross_entropy(student, labels)

    def distil(backend: str) -> Loss:
        def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
            value = distillation_loss(student, teacher, labels, backend=backend, **settings)
            assert isinstance(value, Tensor)
            return value

        return loss

    other = eager if other_name(settings) == EAGER else distil("reference")
    return {HARD: hard, EAGER: other, FASTKD: distil("auto")}


def other_name(settings: dict[str, Any]) -> str:
    """What fastkd stands against: F.kl_div is a forward KL and no more; else the textbook's way."""
    plain = isinstance(settings["divergence"], ForwardKL)
    more = settings["entropy_weight"] or settings["standardize"]
    return EAGER if plain and not more else "the reference"


def needs_teacher(method: str) -> bool:
    return method != HARD
