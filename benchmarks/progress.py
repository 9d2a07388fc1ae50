"""A progress bar where rich is installed and someone is watching."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[str], None]


@contextmanager
def progress(total: int) -> Iterator[Advance]:
    """Yields what is to be called with the name of each of `total` steps as it begins."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        print("no progress bar: rich is not installed", file=sys.stderr)
        yield lambda step: None
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)

        def advance(step: str) -> None:
            if bar.tasks[0].description:
                bar.advance(task)
            bar.update(task, description=step)

        yield advance
