"""Numbers as 0-d tensors, which a GPU keeps: to fill one is a launch, as for a kernel."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from . import tracing

MOST = 64  # that are kept, of 512 bytes each: a temperature may change with every step


def constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor that nobody may write to."""
    stream = _stream(device)
    if stream is None:
        return torch.full((), value, dtype=dtype, device=device)
    return _kept(value, dtype, device, stream)


def _stream(device: torch.device) -> int | None:
    """The stream whose work comes after what it fills now; None where nothing may be kept.

    The CPU fills a number as fast as it finds one, and where a tracer looks on there are none. A
    graph fills its own: what is made while it is captured lies in its memory, and is empty until
    it is replayed; what was kept before may be given up before the graph is.
    """
    if device.type != "cuda" or tracing.watched():
        return None
    with torch.cuda.device(device):
        capturing = torch.cuda.is_current_stream_capturing()
        return None if capturing else torch.cuda.current_stream().cuda_stream


@lru_cache(MOST)
def _kept(value: float, dtype: torch.dtype, device: torch.device, stream: int) -> Tensor:
    """One stream's: another would not wait for it to be filled, nor its memory for the other."""
    with torch.inference_mode(False):  # whose tensors autograd cannot save
        return torch.full((), value, dtype=dtype, device=device)
