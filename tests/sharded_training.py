"""Cases of training over processes, for tests/test_sharded.py: the gradients of one process."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import fastkd
from fastkd import chunks, sharding
from tests import sharded
from tests.closeness import assert_close

V, H = 23, 7
EXAMPLE = Path(__file__).parents[1] / "examples" / "fsdp_head.py"


def micro_batches(rank: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Hidden states, teacher's logits and labels; of unequal sizes, and with ignored rows."""
    generator = torch.Generator().manual_seed(rank)
    found = []
    for rows in (3 + rank, 6, 1 + 2 * rank):
        labels = torch.randint(V, (rows,), generator=generator)
        labels[::4] = -100
        hidden, teacher = (torch.randn(rows, n, generator=generator) for n in (H, V))
        found.append((hidden, teacher, labels))
    return found


def of_one_process(weight: Tensor) -> Tensor:
    """The gradient of the mean over the tokens of all ranks and micro-batches, in fp64."""
    batches = [x for rank in range(dist.get_world_size()) for x in micro_batches(rank)]
    hidden, teacher, labels = map(torch.cat, zip(*batches, strict=True))
    leaf = weight.double().requires_grad_()
    fastkd.distillation_loss(
        hidden.double() @ leaf.t(), teacher.double(), labels, alpha=0.5, backend="reference"
    ).backward()
    assert leaf.grad is not None
    return leaf.grad


def tokens() -> Tensor:
    own = sum((labels != -100).sum() for *_, labels in micro_batches(dist.get_rank()))
    count = torch.as_tensor(own).float()
    dist.all_reduce(count)
    return count


def ddp() -> None:
    """Unequal micro-batches: n / D as num_items, or n and the loss times D."""
    world, count = dist.get_world_size(), tokens()
    for num_items, factor in ((count / world, 1), (count, world)):
        torch.manual_seed(0)
        layer = nn.Linear(H, V, bias=False)
        model = DistributedDataParallel(layer)
        batches = micro_batches(dist.get_rank())
        for index, (hidden, teacher, labels) in enumerate(batches):
            model.require_backward_grad_sync = index == len(batches) - 1
            loss = fastkd.distillation_loss(
                model(hidden), teacher, labels, alpha=0.5, num_items=num_items
            )
            (loss * factor).backward()
        assert_close(layer.weight.grad, of_one_process(layer.weight.detach()), "gradient")


class HeadAndLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(H, V, bias=False)

    def forward(self, hidden: Tensor, teacher: Tensor, labels: Tensor, num_items: Tensor) -> Tensor:
        head = fastkd.LinearHead(hidden, self.lm_head.weight)
        return fastkd.distillation_loss(head, teacher, labels, alpha=0.5, num_items=num_items)


def fsdp() -> None:
    """The fused head inside of a wrapped forward: one gather of the weight, whatever the chunks."""
    torch.manual_seed(0)
    world, count = dist.get_world_size(), tokens()
    model = HeadAndLoss()
    weight = model.lm_head.weight.detach().clone()
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    batches = micro_batches(dist.get_rank())
    for index, (hidden, teacher, labels) in enumerate(batches):
        model.set_requires_gradient_sync(index == len(batches) - 1)
        with sharded.Counted() as gathers, mock.patch.multiple(chunks, CPU_BYTES=1, LEAST_ROWS=2):
            loss = model(hidden, teacher, labels, count / world)
        assert gathers.count == 1
        loss.backward()
    found = model.lm_head.weight.grad.full_tensor()
    assert_close(found, of_one_process(weight), "gradient")


def example() -> None:
    before, after = runpy.run_path(str(EXAMPLE))["main"]()
    assert after < 0.5 * before


def rows_in_any_order() -> None:
    """Context in parallel, by zigzag: each rank has some rows, and nothing goes between them."""
    world, rank = dist.get_world_size(), dist.get_rank()
    student, teacher = torch.randn(2, 4 * world, V)
    labels = torch.randint(V, (4 * world,))
    pieces = torch.arange(4 * world).view(2 * world, 2)
    rows = torch.cat([pieces[rank], pieces[-1 - rank]])
    whole = fastkd.distillation_loss(student, teacher, labels, alpha=0.5, reduction="none")
    with sharded.Counted() as gathers:
        part = fastkd.distillation_loss(
            student[rows], teacher[rows], labels[rows], alpha=0.5, reduction="none"
        )
    assert gathers.count == 0
    assert torch.equal(part, whole[rows])


def fifty_steps() -> None:
    """A head over the vocabulary's shards ends where one process does."""
    group, mine = dist.group.WORLD, sharded.columns(V)
    first, weight = torch.randn(H, H), torch.randn(V, H)
    teacher, inputs = torch.randn(V, H) * 2, torch.randn(50, 6, H)

    def train(shard: slice, group: Any) -> list[Tensor]:
        body, head = (x.clone().requires_grad_() for x in (first, weight[shard]))
        losses = []
        for x in inputs:
            hidden = (x @ body.t()).tanh()
            hidden = hidden if group is None else sharding.copied(hidden, group)
            loss = fastkd.distillation_loss(
                fastkd.LinearHead(hidden, head), x @ teacher.t(), divergence="reverse_kl",
                temperature=2.0, vocab_size=V, group=group,
            )  # fmt: skip
            for leaf, grad in zip(
                (body, head), torch.autograd.grad(loss, (body, head)), strict=True
            ):
                leaf.data -= 0.1 * grad
            losses.append(loss.detach())
        return [torch.stack(losses), body.detach(), head.detach()]

    ours, alone = train(mine, group), train(slice(None), None)
    assert alone[0][-10:].mean() < 0.9 * alone[0][:10].mean()
    for one, other in zip(ours, (*alone[:2], alone[2][mine]), strict=True):
        assert_close(one, other.double())


CASES = {
    f"training {case.__name__}": case
    for case in (ddp, fsdp, example, rows_in_any_order, fifty_steps)
}
