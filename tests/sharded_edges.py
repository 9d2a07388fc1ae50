"""Cases of ranks without columns, of odd widths and of fp64, for tests/test_sharded.py."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import fastkd
from fastkd import sharding
from tests import running
from tests.closeness import assert_close
from tests.sharded_truth import whole

N, V = 4, 9
LABELS = torch.tensor([3, 8, -100, 0])


def shares(*cuts: int) -> slice:
    """This rank's columns, of ranks that end at these; the others have none."""
    ends = [0, *cuts, *dist.get_world_size() * [cuts[-1]]]
    return slice(ends[dist.get_rank()], ends[dist.get_rank() + 1])


def as_one(student: Tensor, teacher: Any, own: Any, mine: slice, **settings: Any) -> None:
    """The loss and the student's gradient of this rank, with `own` teacher, are those of all."""
    alone = student.double().requires_grad_()
    wanted = fastkd.distillation_loss(
        alone, teacher, LABELS, **settings | {"gradient": "backward", "vocab_size": V}
    )
    upstream = torch.linspace(0.3, 2.0, max(wanted.numel(), 1)).view(wanted.shape)
    wanted.backward(upstream.double())
    leaf = student[..., mine].clone().requires_grad_()
    group: Any = dist.group.WORLD
    loss = fastkd.distillation_loss(
        leaf, own, LABELS, **settings,
        group=sharding.Group(group, mine.start, student.size(-1)),
    )  # fmt: skip
    loss.backward(upstream.to(loss.dtype))
    assert_close(loss, wanted.detach())
    assert_close(whole(leaf.grad), alone.grad, "gradient")


def listed_without_columns() -> None:
    """A listed teacher beside a rank that has no column."""
    student, scores = torch.randn(2, N, V)
    mine = shares(V)
    for teacher in (
        fastkd.TopK.from_logits(scores, 3), fastkd.Sampled.from_logits(scores, 4),
    ):  # fmt: skip
        for settings in (
            {"gradient": "forward"}, {"alpha": 0.4, "gradient": "forward"},
            {"gradient": "backward", "reduction": "none", "entropy_weight": 0.2},
        ):  # fmt: skip
            as_one(student, teacher, teacher, mine, **settings)


def ensemble_without_columns() -> None:
    """Of a teacher that is split and one in whole, which need no vocab_size."""
    student, first, second = torch.randn(3, N, V)
    mine = shares(4, V)
    for combine in ("probs", "logits"):
        as_one(
            student, fastkd.Ensemble([first, second], combine=combine),
            fastkd.Ensemble([first[:, mine], second], combine=combine), mine,
        )  # fmt: skip


def padding_beyond_all() -> None:
    """A rank that has, with its padding, as many columns as all have without."""
    student, teacher = (F.pad(x, (0, 8), value=math.nan) for x in torch.randn(2, N, V))
    mine = shares(3, V + 8)
    as_one(student, teacher, teacher[:, mine], mine, vocab_size=V, gradient="backward")
    as_one(student, teacher, teacher[:, :V], mine, vocab_size=V, gradient="backward")


def near_in_double() -> None:
    """fp64 sides that differ little keep their numbers, and may be expanded."""
    student = torch.randn(N, V, dtype=torch.float64)
    student[:, 1] = -math.inf
    teacher = student[:1].expand(N, V)
    student[1] = student[0] + 1e-8 * torch.randn(V)
    mine = shares(4, V)
    sides = [student[:, mine].clone().requires_grad_(), teacher[:, mine].contiguous()]
    before = [side.detach().clone() for side in sides]
    for other in (sides[1], teacher[:, mine]):
        loss = fastkd.distillation_loss(
            sides[0],
            other,
            group=sharding.Group(dist.group.WORLD, mine.start, V),  # type: ignore[arg-type]
        )
        loss.backward()
    for side, kept in zip(sides, before, strict=True):
        assert torch.equal(side, kept)


def held_in_double() -> None:
    """In fp64 too each row is computed once, whose gradient may take the place of its logits."""
    student, teacher = torch.randn(2, N, V, dtype=torch.float64)
    mine = shares(4, V)
    for divergence in ("reverse_kl", fastkd.JSD(0.3)):
        for inplace in (False, True):
            found = []
            for held in ({"gradient": "backward"}, {"inplace": inplace, "gradient": "forward"}):
                leaf = student[:, mine].clone().requires_grad_()
                fastkd.distillation_loss(
                    leaf * 1, teacher, divergence=divergence, **held,
                    group=sharding.Group(dist.group.WORLD, mine.start, V),  # type: ignore[arg-type]
                ).backward()  # fmt: skip
                found.append(whole(leaf.grad))
            assert_close(found[1], found[0], "gradient")


def batchmean_of_one_row() -> None:
    """PyTorch divides by the columns there, which are those of all ranks."""
    student, teacher = torch.randn(2, V)
    mine = shares(4, V)
    loss = fastkd.distillation_loss(
        student[mine], teacher, reduction="batchmean",
        group=sharding.Group(dist.group.WORLD, mine.start, V),  # type: ignore[arg-type]
    )  # fmt: skip
    true, _ = running.defined(student, teacher, reduction="batchmean")
    assert_close(loss, true)


def no_divergence() -> None:
    """At alpha = 0 a teacher's NaN reaches neither gradient, that of the temperature included."""
    student, teacher = torch.randn(2, N, V)
    teacher[1] = math.nan
    mine = shares(4, V)
    group: Any = sharding.Group(dist.group.WORLD, mine.start, V)  # type: ignore[arg-type]
    for divergence, labels in (("reverse_kl", LABELS), (fastkd.Bernoulli(), torch.rand(N, V))):
        leaf, T = student[:, mine].clone().requires_grad_(), torch.ones(N).requires_grad_()
        loss, metrics = fastkd.distillation_loss(
            leaf, teacher, labels, divergence=divergence, alpha=0.0, entropy_weight=0.1,
            temperature=T, return_metrics=True, group=group,
        )  # fmt: skip
        loss.backward()
        assert metrics.kd[1].isnan()
        for gradient in (leaf.grad, T.grad):
            assert gradient is not None
            assert gradient.isfinite().all()
        assert T.grad is not None
        assert T.grad[1]


CASES = {
    case.__name__: case
    for case in (
        listed_without_columns, ensemble_without_columns, padding_beyond_all, near_in_double,
        held_in_double, batchmean_of_one_row, no_divergence,
    )
}  # fmt: skip
