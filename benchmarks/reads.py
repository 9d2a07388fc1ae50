"""A kernel that reads a buffer over and over: how fast the L2 cache is. Needs Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _read(buffer, sums, size, repeats, BLOCK: tl.constexpr):
    """Each program reads its share of the buffer, another one each time."""
    total = tl.zeros([BLOCK], tl.float32)
    blocks = size // BLOCK
    for repeat in range(repeats):
        for i in range(tl.program_id(0), blocks, tl.num_programs(0)):
            at = (i + repeat * 7) % blocks * BLOCK + tl.arange(0, BLOCK)
            total += tl.load(buffer + at)
    tl.store(sums + tl.program_id(0), tl.sum(total))


def read(buffer: Tensor, repeats: int, programs: int) -> Tensor:
    sums = torch.empty(programs, device=buffer.device)
    _read[(programs,)](
        buffer, sums, buffer.numel(), repeats, BLOCK=BLOCK, num_warps=8, enable_fp_fusion=True
    )
    return sums
