"""What the device can do at best, measured: everything else is quoted as a share of it."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch

from .measure import clock_for

# bytes, of each of the two buffers of a copy
COPY = {"cuda": 1 << 31, "cpu": 1 << 27}
L2_MIB = (16, 40)
# (rows, hidden, vocabulary) of the products in the fused-linear cases
PRODUCTS = ((8192, 4096, 128256), (8192, 8192, 128256), (4096, 2048, 151936), (4096, 2304, 262144))
SMALL = 1 << 16
CALLS = 10


def copy_bandwidth(device: torch.device, small: bool = False) -> float:
    """GB/s of a large copy, bytes read plus bytes written."""
    size = SMALL if small else COPY[device.type]
    source = torch.randint(0, 100, (size // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    return 2 * size / _seconds(partial(target.copy_, source), device) / 1e9


def all_ceilings(device: torch.device, small: bool = False) -> dict[str, float]:
    """Copy and, on a GPU, L2 reads in GB/s; matrix products in TFLOP/s."""
    found = {"copy_gb_s": copy_bandwidth(device, small)}
    if device.type == "cuda" or small:
        for mib in L2_MIB:
            found[f"l2_read_{mib}_mib_gb_s"] = l2_bandwidth(device, mib << 20, small)
    for rows, hidden, vocabulary in PRODUCTS if device.type == "cuda" else ((512, 512, 4096),):
        name = f"matmul_{rows}x{hidden}x{vocabulary}_tflop_s"
        found[name] = matmul_rate(device, rows, hidden, vocabulary)
    return found


def l2_bandwidth(device: torch.device, size: int, small: bool) -> float:
    """GB/s of reading one buffer repeatedly from every multiprocessor."""
    from .reads import BLOCK, read

    repeats, programs = (1, 2) if small else (1000, _programs(device))
    buffer = torch.randn(2 * BLOCK if small else size // 4, device=device)
    seconds = _seconds(partial(read, buffer, repeats, programs), device)
    return 4 * buffer.numel() * repeats / seconds / 1e9


def matmul_rate(device: torch.device, rows: int, hidden: int, vocabulary: int) -> float:
    """TFLOP/s of hidden states times an output head, in bf16 on a GPU, fp32 on a CPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    states = torch.randn(rows, hidden, dtype=dtype, device=device)
    head = torch.randn(vocabulary, hidden, dtype=dtype, device=device)
    seconds = _seconds(partial(torch.mm, states, head.T), device)
    return 2 * rows * hidden * vocabulary / seconds / 1e12


def _programs(device: torch.device) -> int:
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """The median of some calls, after two to warm up."""
    clock = clock_for(device)
    for _ in range(CALLS + 2):
        clock.start()
        call()
        clock.stop()
    return statistics.median(clock.times()[2:]) / 1e3
