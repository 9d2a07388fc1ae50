"""The user's data files, row by row: no file is ever in memory as a whole."""

from __future__ import annotations

import bz2
import contextlib
import csv
import glob
import gzip
import io
import itertools
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from . import hub
from .errors import RunError, needs, one_line

# Characters of plain text that are handed on at once.
BLOCK = 2**16
# What a folder is searched for, besides the rows of READERS; each may be compressed.
PLAIN = (".txt", ".text", ".md")
OPENERS: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
}


@dataclass(frozen=True)
class Row:
    """What one row holds by column, and where it stands; plain text is one document in blocks.

    A row that `continues` belongs to the document of the row before it; one that `goes_on`, to
    that of the row after it.
    """

    values: dict[str, Any]
    where: str
    continues: bool = False
    goes_on: bool = False


class Found(NamedTuple):
    """Files that are meant, each once, in order; and what else their folders hold."""

    files: list[str]
    passed_over: list[str]


def find(names: Sequence[str]) -> Found:
    """What is meant by names of files, folders and patterns.

    A file that is there is meant as it is spelt, brackets or not.
    """
    found: dict[str, None] = {}
    passed_over: list[str] = []
    for name in names:
        if name.startswith(hub.PREFIX):
            inside = [name]
        elif os.path.isdir(name):
            held = sorted(_inside(name))
            inside = [each for each in held if kind(each) in KINDS]
            passed_over += [each for each in held if kind(each) not in KINDS]
            if not inside:
                raise RunError(
                    f"{name}: the folder holds no file that ends in {', '.join(KINDS)}, "
                    f"compressed ({', '.join(OPENERS)}) or not"
                )
        elif os.path.exists(name):
            inside = [name]
        else:
            matches = sorted(glob.glob(name, recursive=True))
            inside = [each for each in matches if not os.path.isdir(each)]
            if not any(map(os.path.exists, inside)):
                raise RunError(f"{name}: there is no such file")
        for each in inside:
            _check_regular(each)
        found |= dict.fromkeys(inside)
    return Found(list(found), passed_over)


def opened(file: str, newline: str | None = None) -> IO[str]:
    """Its text, out of a compressed file too."""
    return io.TextIOWrapper(_binary(file), encoding="utf-8-sig", newline=newline)


def _binary(file: str) -> IO[bytes]:
    return OPENERS.get(_ending(file), open)(file, "rb")


@contextlib.contextmanager
def readable(file: str) -> Iterator[None]:
    """A file that breaks off, or that the system does not give, is one line."""
    try:
        yield
    except UnicodeDecodeError:
        raise RunError(
            f"{file} is not text in UTF-8: convert it; what else can be read is known by how its "
            f"name ends: {', '.join((*READERS, *OPENERS))}"
        ) from None
    except OSError as error:
        raise RunError(f"cannot read {file}: {error.strerror or one_line(error)}") from None
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise RunError(f"cannot read {file} as {_ending(file)}: {one_line(error)}") from None


def _ending(file: str) -> str:
    return Path(file).suffix.lower()


def kind(file: str) -> str:
    """How the name ends, before the ending of what compressed it."""
    ending = _ending(file)
    return _ending(Path(file).stem) if ending in OPENERS else ending


def _inside(folder: str) -> Iterator[str]:
    """Files at any depth, behind links too; one that cannot be read is not passed over."""
    seen = set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=_refuse):
        real = os.path.realpath(parent)
        if real in seen:  # a link to where it stands
            folders.clear()
            continue
        seen.add(real)
        yield from (os.path.join(parent, name) for name in names)


def _refuse(error: OSError) -> None:
    raise RunError(f"cannot read {error.filename}: {error.strerror}")


def _check_regular(name: str) -> None:
    """Refuses links to nothing, and pipes and devices, which cannot be read twice, or ever end."""
    if name.startswith(hub.PREFIX) or os.path.isfile(name):
        return
    what = "is no file: write what it says to one" if os.path.exists(name) else "links to nothing"
    raise RunError(f"{name}: it {what}")


def rows(file: str) -> Iterator[Row]:
    """What a file holds; whatever is wrong with it is one RunError that names the place."""
    if file.startswith(hub.PREFIX):
        named = enumerate(hub.rows(file), 1)
        yield from (Row(values, f"{file}, row {number}") for number, values in named)
        return
    with readable(file):
        yield from READERS.get(kind(file), _plain)(file)


# --- the kinds -------------------------------------------------------------------------------


def _plain(file: str) -> Iterator[Row]:
    """Blocks that end before a line or a word."""
    with opened(file) as lines:
        held, continues = "", False
        while more := lines.read(BLOCK):
            held += more
            if len(held) > BLOCK:
                cut = _boundary(held)
                yield Row({"text": held[:cut]}, file, continues, goes_on=True)
                held, continues = held[cut:], True
        yield Row({"text": held}, file, continues)


def _boundary(text: str) -> int:
    """Before the last line that begins with a word; else before the last word; else the middle.

    White space before it goes with the word, as most tokenizers have it.
    """
    for mark in "\n ":
        at = len(text) - 1
        while (at := text.rfind(mark, 0, at)) > 0:
            if not text[at + 1].isspace():
                return at
    return len(text) // 2


def _lines(file: str) -> Iterator[Row]:
    with opened(file) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{file}, line {number}"
                yield _object(_parsed(line, where), where)


def _json(file: str) -> Iterator[Row]:
    """A list of objects, or objects line by line."""
    with opened(file) as text:
        start = next((line.lstrip() for line in text if line.strip()), "")
        text.seek(0)
        if not start.startswith("["):
            if start and not _is_json(start):
                raise RunError(
                    f"{file}: expected a list of objects, or an object on each line, got a first "
                    f"line of {short(start.strip())}"
                )
            yield from _lines(file)
            return
        entries = _parsed(text.read(), file)
    for number, entry in enumerate(entries, 1):
        where = f"{file}, entry {number}"
        yield _object(entry, where)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (RecursionError, ValueError):
        return False
    return True


def _table(file: str) -> Iterator[Row]:
    """Columns named by the first line, divided by commas or, in .tsv, by tabs."""
    csv.field_size_limit(2**31 - 1)  # of characters; 131,072 else
    separator = "\t" if kind(file) == ".tsv" else ","
    with opened(file, newline="") as text:
        table = csv.reader(text, delimiter=separator, strict=True)
        try:
            names = next(table, [])
            _once(names, file)
            for values in filter(None, table):  # a blank line is none
                where = f"{file}, line {table.line_num}"
                if len(values) != len(names):
                    raise RunError(
                        f"{where}: {len(values)} fields, where the first line names {len(names)}"
                    )
                yield Row(dict(zip(names, values, strict=True)), where)
        except csv.Error as error:
            raise RunError(
                f"{file}, line {table.line_num}: this is no row of a table: {error}"
            ) from None


def _once(names: Sequence[str], file: str) -> None:
    """Refuses a column that is there twice: one of its values would be lost."""
    if twice := [name for place, name in enumerate(names) if name in names[:place]]:
        raise RunError(f"{file} has the column {short(twice[0])} twice")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_distinct)
    except KeyError as error:
        raise RunError(f"{where}: an object has the key {error.args[0]} twice") from None
    except RecursionError:
        raise RunError(f"{where}: JSON nested too deep") from None
    except ValueError as error:
        raise RunError(f"{where}: this is not JSON: {one_line(error)}") from None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuses a key that is there twice: one of its values would be lost."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise KeyError(short(key))
        found[key] = value
    return found


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise RunError(f"{where}: expected an object with columns, got {short(value)}")
    return Row(value, where)


def _parquet(file: str) -> Iterator[Row]:
    needs("pyarrow")
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with _binary(file) as binary, ParquetFile(binary) as table:
            _once(table.schema_arrow.names, file)
            batches = (batch.to_pylist() for batch in table.iter_batches(batch_size=256))
            for number, values in enumerate(itertools.chain.from_iterable(batches), 1):
                yield Row(values, f"{file}, row {number}")
    except (ArrowException, OSError, OverflowError, ValueError) as error:  # of dates, of UTF-8
        raise RunError(f"cannot read {file} as parquet: {one_line(error)}") from None


READERS: dict[str, Callable[[str], Iterator[Row]]] = {
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".json": _json,
    ".csv": _table,
    ".tsv": _table,
    ".parquet": _parquet,
}
KINDS = (*READERS, *PLAIN)


def short(value: Any) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
