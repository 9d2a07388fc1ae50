"""The tokens that a teacher sees, in whatever form they come."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor


class Rows(Protocol):
    """Sequences of equal length, by one index or by a list of them."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> Any: ...


def fingerprint(parts: Iterable[Tensor]) -> str:
    """SHA-256 of all tokens, as int32."""
    digest = hashlib.sha256()
    for some in parts:
        digest.update(some.to(torch.int32).contiguous().numpy().data)
    return digest.hexdigest()


def parts(tokens: Tensor | Rows) -> Iterator[Tensor]:
    """All of the corpus, some rows at a time."""
    for first in range(0, len(tokens), 1024):
        yield rows(tokens, range(first, min(first + 1024, len(tokens))))


def checked(parts: Iterable[Tensor], vocab_size: int) -> Iterator[Tensor]:
    """These; raises ValueError at ids beyond the vocabulary, whose bits would not hold them."""
    for some in parts:
        if some.min() < 0 or some.max() >= vocab_size:
            raise ValueError(
                f"tokens must lie in [0, {vocab_size}), got {int(some.min())} to {int(some.max())}"
            )
        yield some


def rows(tokens: Tensor | Rows, wanted: range) -> Tensor:
    """Some of the corpus, int64 [n, T]."""
    if isinstance(tokens, Tensor):
        return tokens[wanted.start : wanted.stop].long().cpu()
    return torch.as_tensor(tokens[list(wanted)], dtype=torch.long, device="cpu")
