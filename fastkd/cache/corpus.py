"""The tokens that a teacher sees, in whatever form they come."""

from __future__ import annotations

import hashlib
from typing import Any, Protocol

import torch
from torch import Tensor


class Rows(Protocol):
    """Sequences of equal length, by one index or by a list of them."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> Any: ...


def fingerprint(tokens: Tensor | Rows) -> str:
    """SHA-256 of all tokens, as int32."""
    digest = hashlib.sha256()
    for first in range(0, len(tokens), 1024):
        some = rows(tokens, range(first, min(first + 1024, len(tokens))))
        digest.update(some.to(torch.int32).contiguous().numpy().data)
    return digest.hexdigest()


def rows(tokens: Tensor | Rows, wanted: range) -> Tensor:
    """Some of the corpus, int64 [n, T]."""
    if isinstance(tokens, Tensor):
        return tokens[wanted.start : wanted.stop].long().cpu()
    return torch.as_tensor(tokens[list(wanted)], dtype=torch.long, device="cpu")
