"""Documents packed into sequences of equal length, written to disk, and read from there."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import aligned, files, hub, storage
from .cached import ROW
from .documents import Counts, Document, Reader
from .errors import RunError, one_line
from .settings import UserModels

if TYPE_CHECKING:
    from datasets import Dataset

# Sequences that are written at once.
WRITTEN = 256
IDS, LEARNT, BEGINS = COLUMNS = ("input_ids", "learnt", "begins")

Packed = dict[str, list[Any]]


def prepare(
    chosen: UserModels,
    tokenizer: Any,
    folder: Path,
    tell: Callable[[int], None],
    teacher: tuple[Any, int] | None = None,
) -> tuple[Dataset, Dataset, Counts]:
    """Sequences to train on and to evaluate on, and what became of the rows they come from.

    They are written to `folder`, where a run that goes on finds them; of other data than they came
    from it is told so. `tell` learns how many are written. A `teacher` that reads the same text in
    tokens of its own is known by its tokenizer and the most tokens that it takes.
    """
    from datasets import Dataset

    named = {"training": chosen.data, "held-out": chosen.eval_data}
    found = {name: files.find(data) for name, data in named.items() if data}
    wanted = {name: each.files for name, each in found.items()}
    reader = Reader(tokenizer, chosen)
    tokenizers = [tokenizer, teacher[0]] if teacher else [tokenizer]
    fingerprint = _fingerprint(chosen, tokenizers, itertools.chain(*wanted.values()))
    described = folder / "data.json"
    if described.exists():
        with _made_again(described):
            known = json.loads(described.read_text())
            before, reader.counts = known["fingerprint"], Counts(**known["counts"])
        if before != fingerprint:
            raise RunError(
                "the data or its tokenizer is another than when this run began: start again"
            )
    else:
        folder.mkdir(exist_ok=True)
        reader.counts.passed_over = [name for each in found.values() for name in each.passed_over]
        for name, data in wanted.items():
            documents = reader.documents(row for file in data for row in files.rows(file))
            length = chosen.sequence_length
            columns: Sequence[str] = COLUMNS
            if teacher is None:
                packed = pack(documents, length, tokenizer.eos_token_id or 0, reader.counts)
            else:
                theirs, most = Reader(teacher[0], chosen), teacher[1]
                packed = aligned.pack(documents, theirs, length, most, reader.counts)
                columns = aligned.COLUMNS
            _write(folder / f"{name}.arrow", packed, tell, columns)
        values = {"fingerprint": fingerprint, "counts": asdict(reader.counts)}
        storage.write(described, json.dumps(values))
    sets = {}
    for name in wanted:
        with _made_again(folder / f"{name}.arrow"):
            sets[name] = Dataset.from_file(str(folder / f"{name}.arrow"))
    for name, rows in sets.items():
        least = 1 if "held-out" in sets else 2
        _enough(rows, least, named[name], chosen.sequence_length, reader.counts)
    if "held-out" in sets:
        return sets["training"], sets["held-out"], reader.counts
    test_size = max(1, int(chosen.held_out * len(sets["training"])))
    parts = sets["training"].train_test_split(test_size=test_size, seed=chosen.seed)
    return parts["train"], parts["test"], reader.counts


@contextlib.contextmanager
def _made_again(path: Path) -> Iterator[None]:
    """What cannot be read of the sequences comes from data that is there."""
    try:
        yield
    except Exception as error:  # datasets, pyarrow and json raise many kinds
        raise RunError(
            f"{path} is broken and cannot be read ({one_line(error)}): delete {path.parent}, which "
            "--resume makes again from the data"
        ) from None


def _enough(packed: Dataset, least: int, data: Sequence[str], length: int, kept: Counts) -> None:
    count = len(packed)
    if not count:
        left_out = "".join(f"; {remark}" for remark in kept.remarks(length))
        raise RunError(f"there is no text in {', '.join(data)} to learn from{left_out}")
    if count < least:
        raise RunError(
            f"there is too little text in {', '.join(data)}: {count} sequences of {length} tokens, "
            "where at least 2 are needed, one of them to evaluate on; lower sequence_length"
        )


def pack(
    documents: Iterable[Document], length: int, padding: int, counts: Counts
) -> Iterator[Packed]:
    """Sequences of `length` tokens: ids, which of them are learnt, and where documents begin.

    Text is cut where a sequence ends, and goes on in the next; a conversation stays whole, and is
    at most `length` long. A sequence that the next one does not fit into ends with padding, which
    is not learnt and comes after all that is.
    """
    row: Packed = {column: [] for column in COLUMNS}

    def ended() -> Iterator[Packed]:
        missing = length - len(row[IDS])
        row[IDS] += [padding] * missing
        row[LEARNT] += [False] * missing
        row[BEGINS] += [True] * missing
        if any(row[LEARNT][1:]):  # nothing predicts the first
            yield dict(row)
        row.update({column: [] for column in COLUMNS})

    for document in documents:
        size = len(document.ids)
        if document.whole:
            counts.truncated += max(0, size - length)
            size = min(size, length)
            if not any(document.learnt[:size]):
                counts.untaught += 1
                continue
            if len(row[IDS]) + size > length:
                yield from ended()
        at = 0
        while at < size:
            part = slice(at, min(size, at + length - len(row[IDS])))
            row[IDS] += document.ids[part]
            row[LEARNT] += document.learnt[part]
            row[BEGINS] += [at == 0 and not document.continues]
            row[BEGINS] += [False] * (part.stop - at - 1)
            at = part.stop
            if len(row[IDS]) == length:
                yield from ended()
    if row[IDS]:
        yield from ended()


def _write(
    path: Path, packed: Iterator[Packed], tell: Callable[[int], None], columns: Sequence[str]
) -> None:
    import pyarrow

    numbers, flags = pyarrow.int32(), pyarrow.bool_()
    kinds = {LEARNT: flags, BEGINS: flags, aligned.SPANS: pyarrow.list_(numbers)}
    schema = pyarrow.schema([(name, pyarrow.list_(kinds.get(name, numbers))) for name in columns])
    temporary, written = path.with_suffix(".part"), 0
    try:
        with (
            pyarrow.OSFile(str(temporary), "wb") as file,
            pyarrow.ipc.new_stream(file, schema) as stream,
        ):
            while some := list(itertools.islice(packed, WRITTEN)):
                stream.write_batch(pyarrow.RecordBatch.from_pylist(some, schema=schema))
                written += len(some)
                tell(written)
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {storage.reason(error, path)}") from None
    finally:
        temporary.unlink(missing_ok=True)


def collate(rows: list[Packed], separate: bool) -> dict[str, Tensor]:
    """A batch for the Trainer.

    Of `separate` documents each counts its own positions, from which models tell where attention
    ends.
    """
    ids, learnt, begins = (torch.tensor([row[column] for row in rows]) for column in COLUMNS)
    batch = {"input_ids": ids, "labels": ids.masked_fill(~learnt, -100)}
    if separate:
        places = torch.arange(ids.size(1)).expand_as(ids)
        batch["position_ids"] = places - (places * begins).cummax(-1).values
    if ROW in rows[0]:
        batch[ROW] = torch.tensor([row[ROW] for row in rows])
    return batch


def _fingerprint(chosen: UserModels, tokenizers: Sequence[Any], names: Iterable[str]) -> str:
    """Changes with any byte of the data, and with what makes tokens of it."""
    digest = hashlib.blake2b(digest_size=16)
    settings = ("sequence_length", "text", "loss_on", "special_tokens", "parse_special_tokens")
    how = [getattr(chosen, name) for name in (*settings, "end_of_text")]
    for tokenizer in tokenizers:
        digest.update(repr((how, sorted(tokenizer.get_vocab().items()))).encode())
        digest.update(repr((tokenizer.chat_template, tokenizer("a b")["input_ids"])).encode())
    for name in names:
        digest.update(name.encode(errors="surrogateescape"))
        if name.startswith(hub.PREFIX):
            digest.update(hub.commit(name).encode())
            continue
        try:
            with open(name, "rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
        except OSError as error:
            raise RunError(f"cannot read {name}: {error.strerror}") from None
    return digest.hexdigest()
