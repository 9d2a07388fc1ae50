"""Cases of DTensors, for tests/test_sharded.py: on two ranks in a row, on four in a square."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)
from torch.distributed.tensor.parallel import loss_parallel

import fastkd
from tests import running, sharded
from tests.closeness import assert_close

B, S, V = 4, 3, 23
LABELS = torch.tensor([[3, 22, -100], [0, 12, 5], [8, -100, 1], [2, 7, 22]])
ROWS = torch.tensor([[0.5, 1.0, 2.0], [3.0, 0.7, 1.0], [1.1, 0.9, 1.3], [2.0, 1.0, 0.6]])


def mesh() -> Any:
    world = dist.get_world_size()
    return init_device_mesh("cpu", (world,) if world == 2 else (2, 2))


def layouts(mesh: Any) -> list[tuple[Any, ...]]:
    """Of the student's logits [B, S, V]."""
    if mesh.ndim == 1:
        return [(Shard(2),), (Shard(-1),), (Shard(0),), (Replicate(),)]
    return [
        (Shard(0), Shard(2)), (Shard(2), Shard(1)), (Replicate(), Shard(2)),
        (Shard(0), Shard(1)), (Shard(0), Replicate()),
    ]  # fmt: skip


def rows_of(placements: Any) -> list[Any]:
    return [Replicate() if p in (Shard(2), Shard(-1)) else p for p in placements]


def every_layout() -> None:
    where = mesh()
    student, teacher = torch.randn(2, B, S, V) * 2
    for placements in layouts(where):
        rows, vocabulary = rows_of(placements), rows_of(placements) != list(placements)
        for kind in (fastkd.ReverseKL(), fastkd.JSD(beta=0.3)):
            for reduction in ("none", "sum", "batchmean"):
                for teachers in [placements, rows] if vocabulary else [placements]:
                    settings = {"divergence": kind, "reduction": reduction, "alpha": 0.6}
                    one(where, student, teacher, placements, teachers, rows, settings)


def one(
    where: Any, student: Tensor, teacher: Tensor, placements: Any, teachers: Any, rows: Any,
    settings: dict[str, Any],
) -> None:  # fmt: skip
    z = distribute_tensor(student, where, placements).requires_grad_()
    y = distribute_tensor(teacher, where, teachers).requires_grad_()
    labels, heat = (distribute_tensor(x, where, rows) for x in (LABELS, ROWS))
    sums = any(not p.is_replicate() for p in rows) and settings["reduction"] != "none"
    with sharded.Counted() as gathers:
        loss, metrics = fastkd.distillation_loss(
            z, y, labels, temperature=heat, teacher_grad=True, return_metrics=True, **settings
        )
    if rows == list(placements):
        assert gathers.count == 0
    expected = [Partial() if sums and not p.is_replicate() else p for p in rows]
    assert list(loss.placements) == (expected if settings["reduction"] != "none" else rows)
    full = loss.full_tensor()
    upstream = torch.linspace(0.3, 2.0, full.numel()).view(full.shape)
    full.backward(upstream)

    leaves = [x.double().requires_grad_() for x in (student, teacher)]
    true, true_metrics = running.defined(*leaves, LABELS, temperature=ROWS, **settings)
    true.backward(upstream.double())
    assert_close(full, true)
    for figure, truth in zip(metrics, true_metrics, strict=True):
        if truth.count_nonzero():
            assert_close(figure.full_tensor(), truth)
    for ours, leaf in zip((z, y), leaves, strict=True):
        assert_close(ours.grad.full_tensor(), leaf.grad, "gradient")


def as_loss_parallel() -> None:
    """The cross-entropy alone has the value and the placements of PyTorch's own."""
    where = mesh()
    if where.ndim > 1:
        return
    z = distribute_tensor(torch.randn(6, V), where, [Shard(1)])
    labels = torch.randint(V, (6,))
    for reduction in ("mean", "sum", "none"):
        with loss_parallel():
            theirs = torch.nn.functional.cross_entropy(z, labels, reduction=reduction)
        ours = fastkd.distillation_loss(z, z, labels, alpha=0.0, reduction=reduction)
        assert list(ours.placements) == list(theirs.placements)
        assert_close(ours.full_tensor(), theirs.full_tensor().double())


def refusals() -> None:
    where, loss = mesh(), fastkd.distillation_loss
    z = torch.randn(4, 8)
    over_columns = [Shard(1)] + [Replicate()] * (where.ndim - 1)
    over_rows = [Shard(0)] + [Replicate()] * (where.ndim - 1)
    none = [Replicate()] * where.ndim
    columns, rows, copies = (
        distribute_tensor(z, where, p) for p in (over_columns, over_rows, none)
    )
    partial = DTensor.from_local(z, where, [Partial(), *none[1:]])
    with pytest.raises(NotImplementedError, match=r"placement P.*: redistribute it"):
        loss(partial, partial)
    with pytest.raises(NotImplementedError, match=r"teacher has the placements .*redistribute"):
        loss(copies, columns)
    with pytest.raises(NotImplementedError, match=r"teacher has the placements .*redistribute"):
        loss(columns, rows)
    with pytest.raises(ValueError, match="teacher is a DTensor, and student is not"):
        loss(z, columns)
    with pytest.raises(ValueError, match="teacher is a plain tensor, and the student's rows are"):
        loss(rows, z, reduction="sum")
    with pytest.raises(ValueError, match="labels is a plain tensor"):
        loss(rows, rows, torch.zeros(4, dtype=torch.int64), reduction="sum")
    with pytest.raises(NotImplementedError, match="pass num_items"):
        loss(rows, rows)
    partial = DTensor.from_local(torch.tensor(1.0), where, [Partial()] * where.ndim)
    with pytest.raises(NotImplementedError, match=r"num_items has .*pass num_items.full_tensor"):
        loss(rows, rows, num_items=partial)
    if where.ndim > 1:
        other = init_device_mesh("cpu", (dist.get_world_size(),))
        heat = distribute_tensor(torch.tensor(1.0), other, [Replicate()]).requires_grad_()
        with pytest.raises(NotImplementedError, match="temperature requires a gradient, and lies"):
            loss(rows, rows, temperature=heat, reduction="sum")
    with pytest.raises(ValueError, match="group= is for plain tensors"):
        loss(columns, columns, group=dist.group.WORLD)
    if where.ndim > 1:
        both = distribute_tensor(z, where, [Shard(1), Shard(1)])
        with pytest.raises(NotImplementedError, match="sharded over 2 dimensions"):
            loss(both, both)
        kind = torch.distributed.tensor.placement_types._StridedShard(0, split_factor=2)
        strided = DTensor.from_local(z, where, [kind, Replicate()], run_check=False)
        with pytest.raises(NotImplementedError, match=r"placement .*S.*: redistribute it to Shard"):
            loss(strided, strided)


def plain_teacher() -> None:
    """Where rows are not sharded, plain tensors have all of them."""
    where = mesh()
    student, teacher = torch.randn(2, 6, V)
    over_columns = [Replicate()] * (where.ndim - 1) + [Shard(1)]
    z = distribute_tensor(student, where, over_columns).requires_grad_()
    loss = fastkd.distillation_loss(z, teacher, torch.randint(V, (6,)), alpha=0.5)
    assert loss.placements == (Replicate(),) * where.ndim
    loss.backward()
    alone = student.clone().requires_grad_()
    torch.manual_seed(0)
    torch.randn(2, 6, V)
    fastkd.distillation_loss(alone, teacher, torch.randint(V, (6,)), alpha=0.5).backward()
    assert_close(z.grad.full_tensor(), alone.grad.double(), "gradient")


def temperature_of_all() -> None:
    """One that trains has the gradient of all ranks' rows, whatever is sharded."""
    where = mesh()
    student, teacher = torch.randn(2, B, S, V) * 2
    for placements in layouts(where):
        z, y = (distribute_tensor(x, where, placements) for x in (student, teacher))
        heat = distribute_tensor(torch.tensor(1.7), where, [Replicate()] * where.ndim)
        heat.requires_grad_()
        loss = fastkd.distillation_loss(z, y, temperature=heat, reduction="sum")
        loss.full_tensor().backward(torch.tensor(0.3))
        leaf = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
        true, _ = running.defined(student, teacher, temperature=leaf, reduction="sum")
        true.backward(torch.tensor(0.3, dtype=torch.float64))
        assert heat.grad is not None
        assert_close(heat.grad.full_tensor(), leaf.grad, "gradient")


def soft_labels() -> None:
    """With the placements of the student's logits or of its rows."""
    where = mesh()
    student, labels = torch.randn(B, S, V), torch.rand(B, S, V).softmax(-1)
    leaf = student.double().requires_grad_()
    true, _ = running.defined(leaf, student, labels, alpha=0.0, reduction="sum")
    true.backward()
    for placements in layouts(where):
        z = distribute_tensor(student, where, placements).requires_grad_()
        for given in (placements, rows_of(placements)):
            z.grad = None
            loss = fastkd.distillation_loss(
                z, z.detach(), distribute_tensor(labels, where, given), alpha=0.0, reduction="sum"
            )
            loss.full_tensor().backward()
            assert_close(loss.full_tensor(), true)
            assert_close(z.grad.full_tensor(), leaf.grad, "gradient")


CASES = {
    f"DTensor {case.__name__}": case
    for case in (
        every_layout,
        as_loss_parallel,
        refusals,
        plain_teacher,
        temperature_of_all,
        soft_labels,
    )
}
