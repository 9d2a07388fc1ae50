"""One text in the tokens of two tokenizers: sequences of both, and the spans where they agree."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastkd.cross_tokenizer import align

from .documents import Counts, Document, Reader, end_offsets

IDS, LEARNT, THEIRS, SPANS = COLUMNS = ("input_ids", "learnt", "teacher_ids", "spans")


def pack(
    documents: Iterable[Document], teacher: Reader, length: int, most: int, counts: Counts
) -> Iterator[dict[str, list[Any]]]:
    """Sequences of one document each, at most `length` tokens of the student.

    Each has the teacher's tokens of the same text, at most `most`, and the spans of both that spell
    one piece of it and are learnt: four numbers each, of the student and of the teacher where it
    begins and ends. Text is cut and goes on in the next sequence; a prompt with its completion is
    cut off.
    """
    for document in documents:
        if document.whole:
            counts.truncated += max(0, len(document.ids) - length)
        at = 0
        while at < len(document.ids) and not (document.whole and at):
            stop = _cut(document.offsets, at, length)
            row = _sequence(document, slice(at, stop), teacher, most)
            if row[SPANS]:
                yield row
            else:
                counts.untaught += document.whole
            at = stop


def _cut(offsets: Sequence[tuple[int, int]], at: int, length: int) -> int:
    """Where a sequence that begins at a token ends: no character is cut in two."""
    full = stop = min(at + length, len(offsets))
    while at < stop < len(offsets) and offsets[stop][0] < offsets[stop - 1][1]:
        stop -= 1
    return stop if stop > at else full


def _sequence(document: Document, part: slice, teacher: Reader, most: int) -> dict[str, list[Any]]:
    offsets = document.offsets[part]
    written = [(start, end) for start, end in offsets if end > start]
    first = min((start for start, _ in written), default=0)
    last = min(max((end for _, end in written), default=0), len(document.text))
    begins = part.start == 0 and not document.continues
    ids, theirs = teacher.tokens(
        document.text[first:last], special=teacher.chosen.special_tokens and begins
    )
    theirs = [(start + first, end + first) for start, end in theirs]
    if written and written[-1][1] > len(document.text):  # the student's end token
        ids, theirs = ids + teacher.end, theirs + end_offsets(document.text, teacher.end)
    ids, theirs = ids[:most], theirs[:most]
    learnt = document.learnt[part]
    spans = [
        [mine.start, mine.stop, other.start, other.stop]
        for mine, other in align(offsets, theirs)
        # Nothing predicts the first token of either side.
        if mine.start > 0 and other.start > 0 and all(learnt[i] for i in mine)
    ]
    return {IDS: document.ids[part], LEARNT: learnt, THEIRS: ids, SPANS: spans}


def collate(rows: list[dict[str, list[Any]]]) -> dict[str, Tensor]:
    """A batch for the Trainer; what fills it up comes after all that is learnt, in no span."""

    def filled(column: str, value: int = 0) -> Tensor:
        return pad_sequence([torch.tensor(row[column]) for row in rows], True, value)

    ids, learnt = filled(IDS), filled(LEARNT)
    return {
        IDS: ids,
        "labels": ids.masked_fill(~learnt, -100),
        THEIRS: filled(THEIRS),
        SPANS: filled(SPANS),
    }
