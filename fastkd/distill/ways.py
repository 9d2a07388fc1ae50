"""The ways of training a student that the default job compares, as losses on logits."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from fastkd.divergences import Divergence, ForwardKL
from fastkd.functional import distillation_loss

# Student logits [N, V], teacher logits [N, V], labels [N] to a 0-d loss.
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

HARD, EAGER, FASTKD = "hard labels", "F.kl_div", "fastkd"


def ways(divergence: Divergence, temperature: float, alpha: float) -> dict[str, Loss]:
    """The three losses by name. The last two are the same number, written twice."""

    def hard(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(student, labels)

    def eager(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        log_q = F.log_softmax(student / temperature, dim=-1)
        p = F.softmax(teacher / temperature, dim=-1)
        kd = F.kl_div(log_q, p, reduction="batchmean") * temperature**2
        return alpha * kd + (1 - alpha) * F.cross_entropy(student, labels)

    def distil(backend: str) -> Loss:
        def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
            value = distillation_loss(
                student,
                teacher,
                labels,
                divergence=divergence,
                temperature=temperature,
                alpha=alpha,
                backend=backend,
            )
            assert isinstance(value, Tensor)
            return value

        return loss

    # F.kl_div is a forward KL; against the other divergences stands their textbook spelling.
    other = eager if isinstance(divergence, ForwardKL) else distil("reference")
    return {HARD: hard, EAGER: other, FASTKD: distil("auto")}


def needs_teacher(way: str) -> bool:
    return way != HARD
