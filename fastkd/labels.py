"""What labels may be: class indices, a distribution over the classes, or multi-hot."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .checks import FLOATS, beside, dense, per_row
from .divergences import Divergence
from .settings import Settings
from .tracing import may_read


def soft(labels: Any) -> bool:
    """Whether they are in floating point, of any shape."""
    return isinstance(labels, Tensor) and labels.is_floating_point()


def check(
    labels: Any, given: Settings, student: Tensor, columns: int, of_all: int | None = None
) -> None:
    """Refuses what is missing, or does not go with the settings or the student.

    of_all: how many columns all owners of the rows have, where there are several.
    """
    if labels is None:
        _not_needed(given.alpha, given.divergence)
    elif given.sigmoids:
        _multi_hot(labels, student, columns)
    elif soft(labels):
        _distribution(labels, student, columns)
        _no_classes(given.divergence, given.ignore_index)
    else:
        _indices(labels, student, of_all or columns, given.ignore_index)


def _not_needed(alpha: float, divergence: Divergence) -> None:
    if alpha < 1:
        raise ValueError(f"alpha={alpha} mixes in a cross-entropy, which needs labels: pass them")
    if divergence.label_aware:
        raise ValueError(f"{divergence} looks at the label of each row: pass labels")


def _no_classes(divergence: Divergence, ignore_index: int) -> None:
    """Refuses what only class indices can say."""
    if divergence.label_aware:
        raise ValueError(f"{divergence} looks at the label of each row: pass class indices")
    if ignore_index != -100:
        raise ValueError(
            f"ignore_index={ignore_index!r} is for class indices: leave out rows by `weight`"
        )


def _distribution(labels: Tensor, student: Tensor, columns: int) -> None:
    dense("labels", labels)
    _known_floats(labels)
    shape = (*student.shape[:-1], columns)
    if labels.shape == shape[:-1]:
        raise TypeError(
            f"labels must be class indices in int64 or int32, or a distribution {shape}, got "
            f"{tuple(labels.shape)} in {labels.dtype}"
        )
    if labels.shape != shape:
        raise ValueError(
            f"labels in floating point must be a distribution over the vocabulary, {shape}, got "
            f"{tuple(labels.shape)} in {labels.dtype}; class indices are int64 or int32"
        )
    beside("labels", labels, student)
    if labels.requires_grad:
        raise ValueError("labels require a gradient, which they do not get: detach them")
    if may_read(labels) and not ((labels >= 0) & (labels < math.inf)).all():
        raise ValueError(
            f"labels must be probabilities, got {labels.min().item()} to {labels.max().item()}: "
            "leave out rows by `weight`"
        )


def _known_floats(labels: Tensor) -> None:
    if labels.dtype not in FLOATS:
        raise TypeError(
            f"labels in floating point must be of 16 bits or more, got {labels.dtype}: convert them"
        )


def _indices(tensor: Any, student: Tensor, vocab_size: int, ignore_index: int) -> None:
    per_row("labels", tensor, student)
    if tensor.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"labels must be class indices in int64 or int32, or floating-point [..., V], got "
            f"{tensor.dtype}: pass labels.long(), and a mask of rows as `weight`"
        )
    if may_read(tensor) and not _within(tensor, vocab_size):
        wrong = (tensor != ignore_index) & ((tensor < 0) | (tensor >= vocab_size))
        if wrong.any():
            raise ValueError(
                f"labels must lie in [0, {vocab_size}) or be ignore_index={ignore_index}, got "
                f"{tensor[wrong][0].item()}"
            )


def _within(tensor: Tensor, size: int) -> bool:
    """Whether all indices, of which none may be ignored, lie in [0, size)."""
    if not tensor.numel():
        return True
    least, most = tensor.aminmax()
    return bool(least >= 0 and most < size)


def _multi_hot(tensor: Any, student: Tensor, vocab_size: int) -> None:
    shape = (*student.shape[:-1], vocab_size)
    if not isinstance(tensor, Tensor):
        raise TypeError(f"labels must be a tensor, got {type(tensor).__name__}")
    dense("labels", tensor)
    if tensor.is_floating_point():
        _known_floats(tensor)
    if tensor.shape != shape or tensor.dtype.is_complex:
        raise ValueError(
            f"labels of Bernoulli() are multi-hot, {shape}, got {tuple(tensor.shape)} in "
            f"{tensor.dtype}: F.one_hot makes such of class indices"
        )
    beside("labels", tensor, student)
    if may_read(tensor) and not ((tensor >= 0) & (tensor <= 1)).all():
        raise ValueError(
            f"labels of Bernoulli() must lie in [0, 1], got {tensor.min().item()} to "
            f"{tensor.max().item()}: leave out rows by `weight`"
        )
