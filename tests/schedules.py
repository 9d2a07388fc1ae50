"""The kernels' schedules, small enough for the interpreter, and how a test forces one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

# Tiles of 32 columns: 75 columns are two full tiles and a tail, in two programs when split. A
# resident row is three parts of two threads, or one piece, as in a cluster.
BLOCK = 32
SCHEDULES = {
    "resident": ("resident", 4, 128, 1, 1, 1, 2),
    "piece": ("resident", 4, 128, 1, 1),
    "sweep": ("sweep", 4, 8, 1, 1),
    "split": ("sweep", 4, 8, 2, 1),
    "shared": ("shared", 4, 8, 1, 1),
}


@contextmanager
def forced(plan: str | tuple) -> Iterator[None]:
    """The launchers use this schedule, by its name above or its fields, whatever the problem."""
    from fastkd.kernels import bernoulli, events, logits, moments, tuning

    chosen = tuning.Schedule(*(SCHEDULES[plan] if isinstance(plan, str) else plan))

    def schedule(_: int, columns: int, *others: object, **more: bool) -> tuning.Schedule:
        if chosen.kind == "resident":  # holds whole rows
            width = max(chosen.vector, tuning.power_of_two(columns))
            threads = max(chosen.threads, width // 64) if chosen.threads else 0
            return chosen._replace(vector=width, threads=threads)
        return chosen

    swept = chosen.kind == "sweep"
    with (
        patch.object(events, "schedule", schedule if swept else events.schedule),
        patch.object(bernoulli, "schedule", schedule),
        patch.object(logits, "schedule", schedule),
        patch.object(moments, "schedule", schedule),
    ):
        yield
