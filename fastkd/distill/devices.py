"""What this machine can serve: its devices and its memory."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any

import torch

from .errors import RunError, Usage


def pick(device: str) -> torch.device:
    """The device that the setting `device` names."""
    if device == "cuda" and not torch.cuda.is_available():
        raise Usage("device 'cuda' was asked for, and PyTorch finds no GPU: try fastkd doctor")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def placement(device: str) -> dict[str, Any]:
    """The setting `teacher_device` as `from_pretrained` takes it."""
    if not device:
        return {}
    if not re.fullmatch(r"cpu|auto|cuda(:[0-9]{1,4})?", device):
        raise Usage(f"teacher_device {device!r} is unknown: there are cpu, cuda, cuda:1, and auto")
    count = torch.cuda.device_count()
    if device.startswith("cuda") and int(device[5:] or 0) >= count:
        raise Usage(f"teacher_device {device!r}: PyTorch finds {count or 'no'} GPUs here")
    return {"device_map": device}


def memory(device: torch.device) -> int:
    """All bytes that it has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def out_of_memory(error: BaseException) -> bool:
    """Whether this is what Python, a GPU, or PyTorch's allocator on a CPU says when it is full."""
    full = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return full or "DefaultCPUAllocator" in str(error)


@contextlib.contextmanager
def enough_memory() -> Iterator[None]:
    """Memory that is full is the user's to mend."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        whose = "the GPU's" if isinstance(error, torch.OutOfMemoryError) else "this machine's"
        raise RunError(
            f"{whose} memory is full: lower --batch-size or the models' size; with --teacher, "
            "raise --accumulation in its place, or say --checkpointing"
        ) from None
