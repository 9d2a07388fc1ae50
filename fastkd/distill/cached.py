"""A cache in place of a teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastkd.cache import Best, CacheError, Draws, TeacherCache
from fastkd.functional import distillation_loss
from fastkd.operands import LinearHead

from .errors import RunError, Usage

if TYPE_CHECKING:
    from datasets import Dataset

    from .settings import UserModels

TOKENIZER = "tokenizer"  # its folder in a cache's
ROW = "row"  # the column of a batch that says which rows of the cache are its teacher's
APART = "documents_apart"  # in what a cache says of itself


def opened(chosen: UserModels) -> TeacherCache:
    """The cache that --teacher-cache names, where the settings of the loss suit it."""
    try:
        cache = TeacherCache(chosen.teacher_cache, tail=chosen.teacher_tail)
    except CacheError as error:
        raise RunError(str(error)) from None
    if not (cache.path / TOKENIZER).is_dir():
        raise RunError(
            f"{cache.path} has no tokenizer: it is not finished, or not by fastkd cache, which "
            "goes on where it was when it is run again"
        )
    layout = cache.manifest.layout
    sparse = isinstance(layout, Draws) or (
        isinstance(layout, Best) and chosen.teacher_tail != "renormalize"
    )
    steps = range(9)
    if sparse and {chosen.loss(step, 9)["teacher_temperature"] for step in steps} != {1.0}:
        raise Usage(
            f"a cache of {layout.kind} knows its teacher at T = 1 alone: --teacher-temperature 1"
        )
    if not isinstance(layout, Best) and chosen.teacher_tail != "bucket":
        raise Usage(f"teacher_tail is of a top-k, and this cache is of {layout.kind}: leave it out")
    return cache


def check_loss(cache: TeacherCache, chosen: UserModels, vocab_size: int) -> None:
    """Refuses settings of the loss that what the cache lists cannot serve; tried on a row."""
    manifest = cache.manifest
    if manifest.vocab_size != vocab_size:
        raise Usage(
            f"vocab_size={vocab_size}, and the cache has {manifest.vocab_size} tokens: say "
            f"--vocab-size {manifest.vocab_size}, or write another cache"
        )
    if not isinstance(manifest.layout, Best | Draws):
        return
    alike = LinearHead(torch.zeros(1, manifest.positions, 1), torch.zeros(vocab_size, 1))
    try:
        loss = distillation_loss(alike, cache[[0]], cache.tokens([0]), **chosen.loss(0, 1))
    except CacheError as error:
        raise RunError(str(error)) from None
    except ValueError as error:
        raise Usage(f"teacher_cache: {error}") from None
    assert isinstance(loss, Tensor)
    if not loss.isfinite():
        raise Usage(
            f"divergence {chosen.divergence} is infinite where the teacher has no mass, as of a "
            f"top-k with --teacher-tail {chosen.teacher_tail}: take bucket, or another divergence"
        )


def with_rows(cache: TeacherCache, training: Dataset, held_out: Dataset) -> tuple[Dataset, Dataset]:
    """Both sets with the rows of the cache that belong to them, where it is a cache of them."""
    from datasets import disable_progress_bars

    try:
        cache.check_corpus(Corpus(training, held_out))
    except CacheError as error:
        raise RunError(str(error)) from None
    disable_progress_bars()
    count = len(training)
    return (
        training.add_column(ROW, list(range(count))),
        held_out.add_column(ROW, list(range(count, count + len(held_out)))),
    )


class Corpus:
    """The sequences to train on, and after them those to evaluate on."""

    def __init__(self, training: Dataset, held_out: Dataset) -> None:
        from datasets import concatenate_datasets

        self.rows = concatenate_datasets([training, held_out])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: int | list[int]) -> Any:
        return self.rows[rows]["input_ids"]
