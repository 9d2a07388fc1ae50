"""The checks that operands share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd import checks, tracing

MOST_ENTRIES = 1024
PADDING = -1  # as an id: nothing is listed there


def floating(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    checks.dense(name, tensor)
    if tensor.dtype not in checks.FLOATS:
        raise TypeError(
            f"{name} must be in float16, bfloat16, float32 or float64, got {tensor.dtype}"
        )


def logits(name: str, tensor: Any) -> None:
    floating(name, tensor)
    if tensor.dim() == 0 or tensor.size(-1) == 0:
        raise ValueError(f"{name} must have shape [..., V], got {tuple(tensor.shape)}")


def listed(kind: str, indices: Any, name: str = "", values: Any = None) -> None:
    """Checks ids [..., K], and the values beside them where these have a name."""
    if not isinstance(indices, Tensor) or indices.dtype not in (torch.int32, torch.int64):
        what = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"{kind}: indices must be a tensor in int32 or int64, got {what}")
    if indices.dim() == 0 or not 1 <= indices.size(-1) <= MOST_ENTRIES:
        raise ValueError(
            f"{kind}: indices must be [..., K] with K from 1 to {MOST_ENTRIES}, got "
            f"{tuple(indices.shape)}"
        )
    if name:
        if not isinstance(values, Tensor):
            raise TypeError(f"{kind}: {name} must be a tensor, got {type(values).__name__}")
        if values.shape != indices.shape:
            raise ValueError(
                f"{kind}: indices and {name} must have one shape, got {tuple(indices.shape)} and "
                f"{tuple(values.shape)}"
            )
    if checks.may_read(indices) and (indices < PADDING).any():
        raise ValueError(
            f"{kind}: indices must be ids, or -1 where nothing is listed, got "
            f"{indices.min().item()}"
        )


def outline(shape: tuple[int, ...], dtype: torch.dtype, sources: list[Tensor]) -> Tensor:
    """A tensor that takes no memory, and trains where one of the sources does."""
    trained = [x for x in sources if x.requires_grad]
    if trained and tracing.transformed():  # where no tensor can be told to require a gradient
        return trained[0].flatten()[:0].sum().to(dtype).expand(shape)
    found = sources[0].detach().new_empty((), dtype=dtype).expand(shape)
    return found.requires_grad_() if trained else found


def one_device(kind: str, **tensors: Tensor | None) -> None:
    places = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(places.values())) > 1:
        listed = ", ".join(f"{name} on {place}" for name, place in places.items())
        raise ValueError(f"{kind}: all tensors must be on one device, got {listed}: move them")
