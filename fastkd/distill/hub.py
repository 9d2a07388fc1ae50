"""Data sets of the hub, row by row: 'hf:owner/name', with a revision and a split if need be.

hf:owner/name@v1:train  is the split `train` of the tag, branch or commit `v1`; by default the split
is `train`, and the revision that of today.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .errors import RunError, needs, one_line

PREFIX = "hf:"


def parts(name: str) -> tuple[str, str | None, str]:
    """Repository, revision and split.

    Example:
        >>> parts("hf:owner/name@v1:test")
        ('owner/name', 'v1', 'test')
        >>> parts("hf:owner/name")
        ('owner/name', None, 'train')
    """
    rest, _, split = name.removeprefix(PREFIX).partition(":")
    repository, _, revision = rest.partition("@")
    return repository, revision or None, split or "train"


def rows(name: str) -> Iterator[dict[str, Any]]:
    """What is streamed, without a copy on disk."""
    needs("datasets")
    from datasets import load_dataset

    repository, revision, split = parts(name)
    try:
        yield from load_dataset(repository, revision=revision, split=split, streaming=True)
    except Exception as error:  # of a network, of a file, of a name: each raises its own
        raise RunError(f"{name}: the hub does not give it: {one_line(error)}") from None


def commit(name: str) -> str:
    """What the revision is now, so that a run that goes on has the same rows."""
    from huggingface_hub import HfApi

    repository, revision, _ = parts(name)
    try:
        return str(HfApi().dataset_info(repository, revision=revision, timeout=10).sha)
    except Exception as error:
        raise RunError(f"{name}: the hub does not know it: {one_line(error)}") from None
