"""The kernels' schedules, small enough for the interpreter, and how a test forces one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

# Tiles of 32 columns: 75 columns are two full tiles and a tail, in two programs when split, in
# three in a relay. A resident row is three parts of two threads, or one piece, as in a cluster.
BLOCK = 32
SCHEDULES = {
    "resident": ("resident", 4, 128, 1, 1, 0, 1, 2),
    "piece": ("resident", 4, 128, 1, 1),
    "sweep": ("sweep", 4, 8, 1, 1),
    "split": ("sweep", 4, 8, 2, 1),
    "relay": ("relay", 4, 8, 1, 1, 10),
}


@contextmanager
def forced(plan: str | tuple) -> Iterator[None]:
    """The launchers use this schedule, by its name above or its fields, whatever the problem."""
    from fastkd.kernels import arithmetic, bernoulli, logits, moments, tuning
    from tests.together import together

    chosen = tuning.Schedule(*(SCHEDULES[plan] if isinstance(plan, str) else plan))
    at_once = chosen.kind == "relay" and arithmetic.INTERPRETED.value

    def schedule(
        _: int, columns: int, *others: object, once: bool, **more: bool
    ) -> tuning.Schedule:
        if chosen.kind == "resident":  # holds whole rows
            width = max(chosen.vector, tuning.power_of_two(columns))
            threads = max(chosen.threads, width // 64) if chosen.threads else 0
            return chosen._replace(vector=width, threads=threads)
        # As in tuning.py: a single sweep has no use for a relay.
        return chosen._replace(kind="sweep") if once and chosen.kind == "relay" else chosen

    with (
        patch.object(bernoulli, "schedule", schedule),
        patch.object(logits, "schedule", schedule),
        patch.object(moments, "schedule", schedule),
        together({"relay"}) if at_once else nullcontext(),
    ):
        yield
