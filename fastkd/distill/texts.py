"""The user's files as sequences of tokens of equal length."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import RunError, one_line

if TYPE_CHECKING:
    from datasets import Dataset

# By the end of a file's name: the reader of `datasets`. All else is plain text.
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def sequences(
    files: Sequence[str], column: str, tokenizer: Any, length: int, held_out: float, seed: int
) -> tuple[Dataset, Dataset]:
    """Sequences to train on and to evaluate on, each with `input_ids` [length].

    Documents are tokenized, joined with an end-of-text token between them, and cut.
    """
    from datasets import concatenate_datasets, disable_progress_bars

    disable_progress_bars()
    texts = concatenate_datasets([_read(name, column) for name in files])
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def tokenize(rows: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        documents = [text for text in rows["text"] if text]
        if not documents:
            return {"input_ids": []}
        ids = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
        return {"input_ids": [list(one) + end for one in ids]}

    def pack(rows: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = list(itertools.chain.from_iterable(rows["input_ids"]))
        starts = range(0, len(joined) - length + 1, length)
        return {"input_ids": [joined[i : i + length] for i in starts]}

    tokens = texts.map(tokenize, batched=True, remove_columns=["text"])
    packed = tokens.map(pack, batched=True)
    whole = len(packed)
    if whole < 2:
        raise RunError(
            f"there is too little text in {', '.join(files)}: {whole} sequences of {length} "
            "tokens, where at least 2 are needed, one of them to evaluate on; lower sequence_length"
        )
    parts = packed.train_test_split(test_size=max(1, int(held_out * whole)), seed=seed)
    return parts["train"], parts["test"]


def _read(name: str, column: str) -> Dataset:
    """One file as a data set with the one column `text`."""
    from datasets import Dataset, Features, Value

    kind = READERS.get(Path(name).suffix.lower())
    if kind is None:
        text = _plain(name)
        texts = Dataset.from_dict({"text": [text] if text.strip() else []})
    else:
        try:
            rows = Dataset.from_json(name) if kind == "json" else Dataset.from_parquet(name)
        except Exception as error:  # pyarrow and datasets raise many kinds
            cause = error.__cause__ or error
            raise RunError(f"cannot read {name} as {kind}: {one_line(cause)}") from None
        if column not in rows.column_names:
            raise RunError(
                f"{name} has no column {column!r}, but {', '.join(rows.column_names)}: "
                "say which with --text"
            )
        rows = rows.select_columns([column])
        if column != "text":
            rows = rows.rename_column(column, "text")
        if rows.features["text"].dtype not in ("string", "large_string"):
            raise RunError(f"{name}: column {column!r} does not hold text")
        texts = rows.cast(Features({"text": Value("string")}))
    if not len(texts):
        raise RunError(f"there is no text in {name}")
    return texts


def _plain(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot read {name}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RunError(f"{name} is neither text in UTF-8 nor .jsonl nor .parquet") from None
