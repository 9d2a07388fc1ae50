"""A cache in place of a teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastkd.cache import Best, CacheError, Draws, TeacherCache

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
    layout = cache.manifest.layout
    sparse = isinstance(layout, Draws) or (
        isinstance(layout, Best) and chosen.teacher_tail != "renormalize"
    )
    if sparse and (chosen.teacher_temperature or chosen.temperature) not in ("1", "1.0"):
        raise Usage(
            f"a cache of {layout.kind} knows its teacher at T = 1 alone: --teacher-temperature 1"
        )
    return cache


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
