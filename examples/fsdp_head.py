"""An output head and its loss under FSDP2: the weight is gathered once a step, not once a chunk.

python examples/fsdp_head.py
torchrun --nproc-per-node 2 examples/fsdp_head.py
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh

import fastkd

VOCABULARY, WIDTH, ROWS = 300, 16, 24


class HeadAndLoss(nn.Module):
    """Inside of its forward FSDP has made the weight whole, a plain tensor."""

    def __init__(self):
        super().__init__()
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, hidden, teacher, num_items):
        head = fastkd.LinearHead(hidden, self.lm_head.weight)
        return fastkd.distillation_loss(head, teacher, num_items=num_items)


def batch(step, rank):
    """Unequal micro-batches: the last rank has half the rows."""
    torch.manual_seed(100 * step + rank)
    rows = ROWS // 2 if rank == dist.get_world_size() - 1 else ROWS
    return torch.randn(rows, WIDTH)


def main():
    """The KL to the teacher on new inputs, before and after."""
    started = not dist.is_initialized()
    if started and "RANK" in os.environ:  # by torchrun
        dist.init_process_group("gloo")
    elif started:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.manual_seed(0)
    teacher = torch.randn(VOCABULARY, WIDTH)
    rank, world = dist.get_rank(), dist.get_world_size()
    student = HeadAndLoss()
    fully_shard(student, mesh=init_device_mesh("cpu", (world,)))
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)

    def kl():
        hidden = torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            return student(hidden, hidden @ teacher.t(), len(hidden)).item()

    before = kl()
    for step in range(60):
        hidden = batch(step, rank)
        tokens = torch.tensor(float(len(hidden)))
        dist.all_reduce(tokens)  # of all ranks: FSDP divides gradients by their number
        student(hidden, hidden @ teacher.t(), tokens / world).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = kl()
    if started:
        dist.destroy_process_group()
    return before, after


if __name__ == "__main__":
    print("KL to the teacher: {:.3f} before, {:.3f} after".format(*main()))
