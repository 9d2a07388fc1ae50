"""Writes what can be made of results: the table, and the plots where matplotlib is installed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .plots import draw
from .report import markdown
from .results import Results

RESULTS, TABLE = "results.json", "table.md"


def publish_table(folder: Path, text: str, header: dict[str, Any], **found: Sequence[Any]) -> None:
    """Of a command with a form of its own: the table, and all that was found."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULTS).write_text(json.dumps({**header, **found}, indent=1))
    (folder / TABLE).write_text(text)


def publish(results: Results, folder: Path) -> list[str]:
    """Says what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TABLE).write_text(markdown(results))
    written = [TABLE]
    try:
        written += [path.name for path in draw(results, folder)]
    except ImportError:
        return [f"written: {TABLE}", "no plots: matplotlib is not installed"]
    return [f"written: {', '.join(written)}"]
