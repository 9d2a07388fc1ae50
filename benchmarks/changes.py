"""What has changed between two tables of `benchmarks.compiled`, and what is worse."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from .report import table

HEAD = (
    "configuration", "divergence", "instructions", "value known", "registers", "programs per SM",
    "spills",
)  # fmt: skip
# Instructions of a thread per position that are no more than how another ptxas orders them.
NOISE = 0.5


class Call(NamedTuple):
    """The kernels of a configuration together; of several the most registers count."""

    instructions: float
    known: float  # instructions where the first sweep's sums give the value
    registers: int
    programs: int
    spills: int


def report(before: str, after: str) -> str:
    """Markdown, of the text of two files."""
    old, new = calls(before), calls(after)
    both = [key for key in new if key in old]
    lines = [(*key, *_changes(old[key], new[key])) for key in sorted(both)]
    worse = [
        f"- {divergence}, {configuration}: {what}"
        for configuration, divergence in sorted(both)
        for what in _worse(old[configuration, divergence], new[configuration, divergence])
    ]
    gone = sorted({configuration for configuration, _ in old} - {one for one, _ in new})
    parts = [
        f"## Before and after: {_origin(before)}",
        table((HEAD, *lines)),
        "### Worse",
        "\n".join(worse) or "Nothing.",
        *([f"Not compared: {', '.join(gone)}."] if gone else []),
    ]
    return "\n\n".join(parts) + "\n"


def calls(text: str) -> dict[tuple[str, str], Call]:
    """By configuration and divergence, from the first table of a file."""
    rows: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in _rows(text):
        rows.setdefault((row["configuration"], row["divergence"]), []).append(row)
    return {
        key: Call(
            sum(float(row["instructions"]) for row in found),
            sum(float(row.get("value known", row["instructions"])) for row in found),
            max(int(row["registers"]) for row in found),
            min(int(row["programs per SM"]) for row in found),
            sum(int(row["spills"]) for row in found),
        )
        for key, found in rows.items()
    }


def _rows(text: str) -> Iterable[dict[str, str]]:
    (first, *_) = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    cells = ([cell.strip() for cell in line.split("|")[1:-1]] for line in first.splitlines())
    head, _, *lines = cells
    return [dict(zip(head, line, strict=True)) for line in lines]


def _origin(text: str) -> str:
    """Date, Triton and commit, as the file names them."""
    return re.search(r"^- (.*commit.*)$", text, re.MULTILINE)[1]  # type: ignore[index]


def _changes(old: Call, new: Call) -> list[str]:
    return [_change(before, after) for before, after in zip(old, new, strict=True)]


def _change(before: float, after: float) -> str:
    form = "{:.1f}" if isinstance(after, float) else "{}"
    found = form.format(before), form.format(after)
    return found[0] if found[0] == found[1] else " to ".join(found)


def _worse(old: Call, new: Call) -> list[str]:
    found = {
        "instructions": new.instructions - old.instructions > NOISE,
        "known": new.known - old.known > NOISE >= new.instructions - old.instructions,
        "programs": new.programs < old.programs,
        "spills": new.spills > old.spills,
    }
    return [
        f"{name} {_change(getattr(old, name), getattr(new, name))}"
        for name, worse in found.items()
        if worse
    ]
