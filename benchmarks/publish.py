"""Writes what can be made of results: the table, and the plots where matplotlib is installed."""

from __future__ import annotations

from pathlib import Path

from .plots import draw
from .report import markdown
from .results import Results

TABLE = "table.md"


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
