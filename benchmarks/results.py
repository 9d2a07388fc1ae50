"""Results on disk: one JSON per run, written as it grows."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from fastkd.distill.storage import replace

from .measure import Times
from .truth import Errors

VERSION = 1
RESULTS = "results.json"

# Of a row: measured; not to be had; wrong; broken; begun, which it stays if the process dies.
OK, ABSENT, REFUSED, FAILED, BEGUN = "ok", "absent", "refused", "failed", "begun"
DIED = "the process ended while this group was measured"


class Key(NamedTuple):
    """What a row is about: rows of equal keys are comparable between files."""

    operator: str
    divergence: str
    case: str
    dtype: str
    part: str
    provider: str

    @property
    def group(self) -> tuple[str, ...]:
        """That of the rows that were measured against each other."""
        return self[:-1]


@dataclass
class Row:
    """One provider in one pass; `note` says why there are no figures unless `status` is OK."""

    operator: str
    divergence: str
    case: str
    rows: int
    vocab: int
    dtype: str
    part: str
    provider: str
    temperature: float
    traffic_bytes: int | None  # the least that the pass must read and write
    times: Times | None = None
    peak_bytes: int | None = None
    errors: Errors | None = None
    status: str = BEGUN
    note: str = DIED

    @property
    def key(self) -> Key:
        return Key(*(getattr(self, name) for name in Key._fields))


@dataclass
class Results:
    header: dict[str, Any]
    ceilings: dict[str, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def save(self, path: Path) -> None:
        text = json.dumps({"version": VERSION, **asdict(self)}, indent=1)
        replace(path, text + "\n")

    @staticmethod
    def load(path: Path) -> Results:
        """Raises ValueError where the file is not one of ours, or of another version."""
        try:
            data = json.loads(path.read_text())
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"cannot read results {path}: {error}") from None
        version = data.pop("version", None) if isinstance(data, dict) else None
        if version != VERSION:
            raise ValueError(
                f"{path} is of version {version}, this suite reads {VERSION}: rerun it"
            )
        try:
            rows = [_row(**row) for row in data.pop("rows")]
            return Results(rows=rows, **data)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is no results file of this suite: {error}") from None


def check_folder(folder: Path, *, ours: bool) -> None:
    """Refuses a folder that holds something; `ours` allows results of this suite."""
    path = folder / RESULTS
    if folder.exists() and any(folder.iterdir()):
        if not (ours and path.exists()):
            hint = "--resume adds to it" if path.exists() else "choose a new or empty folder"
            raise ValueError(f"--out {folder} is not empty: {hint}")
        Results.load(path)


def _row(times: list | None, errors: list | None, **others: Any) -> Row:
    """asdict() keeps named tuples, JSON makes lists of them."""
    names = {each.name for each in fields(Row)}
    if unknown := set(others) - names:
        raise TypeError(f"unknown fields {', '.join(sorted(unknown))}")
    return Row(
        times=None if times is None else Times(*times),
        errors=None if errors is None else Errors(*errors),
        **others,
    )
