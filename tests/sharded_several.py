"""Cases of soft labels and of several teachers under a group, for tests/test_sharded.py."""

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
from tests.sharded_truth import agree, alike, whole

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
    budget, chunks.CPU_BYTES, chunks.LEAST_ROWS = chunks.CPU_BYTES, 1, 4
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
    chunks.CPU_BYTES, chunks.LEAST_ROWS = budget, 16


def mixture(teachers: list[Any], weights: Tensor, T: Any, combine: str, z: bool) -> Tensor:
    """The logits of one teacher at T = 1 that is as all of them, [N, V], in fp64."""
    found = torch.zeros(N, V, dtype=torch.float64)
    for teacher, weight in zip(teachers, weights / weights.sum(0), strict=True):
        if isinstance(teacher, fastkd.TopK):
            p = (teacher.log_probs.double() / T).softmax(-1)
            found.scatter_add_(-1, teacher.indices, weight[:, None] * p)
            continue
        if isinstance(teacher, fastkd.LinearHead):
            teacher = teacher.hidden.double() @ teacher.weight.double().t()
        scores = teacher.double()
        if z:
            scores = (scores - scores.mean(-1, True)) / (scores.std(-1, keepdim=True) + 1e-7)
        found += weight[:, None] * (scores if combine == "logits" else (scores / T).softmax(-1))
    return found if combine == "logits" else found.log()


GATHERS = 1 + N // 2  # of the members' norms, and of each chunk of two rows


def ensembles() -> None:
    """Dense teachers, of all columns or split, heads and listed ones; weights that route."""
    student, dense, other, listed = torch.randn(4, N, V) * 2
    hidden, weight = torch.randn(N, H), torch.randn(V, H)
    mine = sharded.columns(V)
    teachers = [
        dense, other, fastkd.LinearHead(hidden, weight),
        fastkd.TopK.from_logits(listed, 5, tail="renormalize"),
    ]  # fmt: skip
    shards = [dense[:, mine], other, fastkd.LinearHead(hidden, weight[mine]), teachers[3]]
    routed = (torch.rand(4, N) > 0.5).float()
    routed[0, routed.sum(0) == 0] = 1.0
    budget, chunks.CPU_BYTES, chunks.LEAST_ROWS = chunks.CPU_BYTES, 1, 2
    try:
        for weights, T, settings, gathers in (
            (
                torch.tensor([1.0, 2.0, 0.5, 1.0])[:, None].expand(4, N),
                2.0,
                {"alpha": 0.5},
                GATHERS,
            ),
            (routed, 1.5, {"divergence": fastkd.ReverseKL(), "reduction": "none"}, GATHERS),
        ):
            one_ensemble(student, teachers, shards, weights, T, "probs", gathers, settings)
        some = torch.tensor([1.0, 2.0])[:, None].expand(2, N)
        for combine in ("logits", "probs"):
            one_ensemble(
                student, teachers[:2], shards[:2], some, 1.5, combine, None,
                {"standardize": True, "divergence": fastkd.JSD(beta=0.4)},
            )  # fmt: skip
    finally:
        chunks.CPU_BYTES, chunks.LEAST_ROWS = budget, 16


def one_ensemble(
    student: Tensor, teachers: list[Any], shards: list[Any], weights: Tensor, T: float,
    combine: str, gathers: int | None, settings: dict[str, Any],
) -> None:  # fmt: skip
    z = settings.get("standardize", False)
    truth = mixture(teachers, weights, T, combine, z)
    leaf = student.double().requires_grad_()
    scores = (leaf - leaf.mean(-1, True)) / (leaf.std(-1, keepdim=True) + 1e-7) if z else leaf
    if z and combine == "logits":
        truth = mixture(teachers, weights, T, combine, False)
        truth = (truth - truth.mean(-1, True)) / (truth.std(-1, keepdim=True) + 1e-7)
    of_teacher = T if combine == "logits" else 1.0
    plain = {name: value for name, value in settings.items() if name != "standardize"}
    labels = torch.tensor([3, 22, -100, 0, 12, 5]) if "alpha" in settings else None
    wanted, _ = running.defined(
        scores, truth, labels, temperature=T, teacher_temperature=of_teacher,
        scale_by_temperature=False, **plain,
    )  # fmt: skip
    upstream = torch.linspace(0.3, 2.0, max(wanted.numel(), 1)).view(wanted.shape)
    wanted.backward(upstream.double())
    mine = sharded.columns(V)
    for mode in ("backward",) if wanted.dim() else ("forward", "backward"):
        own = student[:, mine].clone().requires_grad_()
        with sharded.Counted() as forward:
            loss = fastkd.distillation_loss(
                own, fastkd.Ensemble(shards, weights=list(weights), combine=combine), labels,
                temperature=T, scale_by_temperature=False, vocab_size=V, gradient=mode,
                group=dist.group.WORLD, **settings,
            )  # fmt: skip
        with sharded.Counted() as backward:
            loss.backward(upstream)
        assert backward.count == 0
        if gathers is not None:
            assert forward.count == gathers
        alike(loss)
        assert_close(loss, wanted.detach())
        assert_close(whole(own.grad), leaf.grad, "gradient")


CASES = {case.__name__: case for case in (soft_labels, soft_labels_beside_others, ensembles)}
