"""The loop: groups of providers, gated and timed against each other on the same inputs."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from .cases import DTYPES, Case, Selection, case_of
from .check import Contender, Problem, Refused, WrongAnswer, gate
from .measure import (
    Replayed,
    block,
    calls_for,
    clock_for,
    peak_bytes,
    refuse_other_streams,
    summary,
    synchronizer,
)
from .operators import OPERATORS, Operator
from .progress import progress
from .providers import NotOffered, Provider, find
from .results import ABSENT, BEGUN, FAILED, OK, REFUSED, Results, Row
from .truth import Errors

T = TypeVar("T")
LATE = ABSENT, "not measured: out of time"
# A backward frees what its forward held, and a replay holds what its capture took.
WEIGHED = ("forward", "full")


@dataclass(frozen=True)
class Settings:
    device: torch.device
    temperature: float = 2.0
    rounds: int = 2
    seconds: float = 0.5  # of calls, per provider, pass and round
    deadline: float = float("inf")  # on time.monotonic()'s scale

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline


class Group(NamedTuple):
    """Providers that are measured against each other."""

    operator: Operator
    divergence: str
    case: Case
    dtype: str
    parts: tuple[str, ...]
    providers: tuple[Provider, ...]

    def __str__(self) -> str:
        return " ".join((self.operator.name, self.divergence, self.case.name, self.dtype))


class DeviceLost(Exception):
    """An earlier call has broken the device for this process: no later figure would be right."""


def groups_of(selections: Sequence[Selection]) -> list[Group]:
    """Raises ValueError for a name that there is not."""
    return [group for selection in selections for group in _expand(selection)]


def _expand(selection: Selection) -> Iterator[Group]:
    if selection.operator not in OPERATORS:
        raise ValueError(f"unknown operator {selection.operator!r}: one of {', '.join(OPERATORS)}")
    operator = OPERATORS[selection.operator]
    for name in selection.divergences:
        if name not in operator.divergences:
            raise ValueError(
                f"unknown divergence {name!r}: {operator.name} has "
                f"{', '.join(operator.divergences)}"
            )
    providers = tuple(find(text, operator.providers) for text in selection.providers)
    cases = [case_of(text) for text in selection.cases]
    for divergence, case, dtype in product(selection.divergences, cases, selection.dtypes):
        yield Group(operator, divergence, case, dtype, selection.passes, providers)


def run(groups: Sequence[Group], settings: Settings, results: Results, path: Path | None) -> None:
    """Measures what `results` does not hold yet; saves before every group and after every pass."""
    results.rows = [row for row in results.rows if (row.status, row.note) != LATE]
    done = {row.key for row in results.rows}
    with progress(len(groups)) as advance:
        for group in groups:
            rows = [row for row in _blank_rows(group, settings) if row.key not in done]
            if not rows:
                continue
            advance(str(group))
            results.rows += rows
            _save(results, path)
            try:
                _measure(group, rows, settings, partial(_save, results, path))
            finally:
                _save(results, path)
            print(f"{group}: {', '.join(map(_brief, rows))}", flush=True)


def _save(results: Results, path: Path | None) -> None:
    if path:
        results.save(path)


def _blank_rows(group: Group, settings: Settings) -> list[Row]:
    case, size = group.case, group.case.rows * group.case.vocab * DTYPES[group.dtype].itemsize
    return [
        Row(
            group.operator.name, group.divergence, case.name, case.rows, case.vocab, group.dtype,
            part, provider.name, settings.temperature,
            size * group.operator.traffic[part] if part in group.operator.traffic else None,
        )
        for part in group.parts
        for provider in group.providers
    ]  # fmt: skip


def _brief(row: Row) -> str:
    figure = row.status if row.times is None else f"{row.times.median:.3g} ms"
    return f"{row.provider} {row.part} {figure}"


# --- one group -------------------------------------------------------------------------------


def _measure(
    group: Group, rows: Sequence[Row], settings: Settings, save: Callable[[], None]
) -> None:
    if settings.late:
        _close(rows, *LATE)
        return
    problem = _attempt(rows, settings, lambda: _problem(group, settings))
    if problem is None:
        return
    contenders = []
    for provider in group.providers:
        its_rows = [row for row in rows if row.provider == provider.name]
        if not its_rows:
            continue
        if settings.late:
            _close(its_rows, *LATE)
            continue
        admitted = _attempt(its_rows, settings, partial(_admit, provider, problem, settings))
        if admitted is not None:
            contenders.append(admitted[0])
            for row in its_rows:
                row.errors = admitted[1]
    for part in group.parts:
        its_rows = [row for row in rows if row.part == part]
        if settings.late and part != group.parts[0]:  # the first is short, once all are compiled
            _close([row for row in its_rows if row.status == BEGUN], *LATE)
        _race(part, {row.provider: row for row in its_rows}, contenders, settings)
        save()
    torch.compiler.reset()


def _problem(group: Group, settings: Settings) -> Problem:
    dtype = DTYPES[group.dtype]
    return Problem(
        group.operator, group.case, group.divergence, dtype, settings.device, settings.temperature
    )


def _admit(provider: Provider, problem: Problem, settings: Settings) -> tuple[Contender, Errors]:
    contender = Contender(provider.name, provider.bind(problem.options), problem)
    errors = gate(contender, synchronizer(settings.device))
    if settings.device.type == "cuda":
        refuse_other_streams(contender, "full")
    return contender, errors


def _race(
    part: str, rows: dict[str, Row], contenders: Sequence[Contender], settings: Settings
) -> None:
    """Every contender once per round, there and back, and then its memory."""
    runners: list[tuple[Contender, Row, int]] = []
    for contender in contenders:
        row = rows.get(contender.name)
        if row is None or row.status != BEGUN:
            continue
        entry = _attempt([row], settings, partial(_enter, contender, part, settings))
        if entry is not None:
            runners.append((entry[0], row, entry[1]))
    times: dict[str, list[list[float]]] = {runner.name: [] for runner, _, _ in runners}
    for turn in range(settings.rounds):
        for runner, row, calls in runners[:: 1 if turn % 2 == 0 else -1]:
            if row.status == BEGUN:
                clock = clock_for(settings.device)
                found = _attempt([row], settings, partial(block, runner, part, calls, clock))
                times[runner.name] += [] if found is None else [found]
    gc.collect()
    for runner, row, _ in runners:
        if row.status == BEGUN and part in WEIGHED:
            weigh = partial(peak_bytes, runner, part, settings.device)
            row.peak_bytes = _attempt([row], settings, weigh)
        if row.status == BEGUN:
            row.times, row.status, row.note = summary(times[runner.name]), OK, ""


def _enter(contender: Contender, part: str, settings: Settings) -> tuple[Contender, int]:
    """The contender as it runs, warm, and how many calls it makes per round."""
    runner = Replayed(contender) if part == "replay" else contender
    return runner, calls_for(runner, part, settings.seconds, settings.device)


def _attempt(rows: Sequence[Row], settings: Settings, action: Callable[[], T]) -> T | None:
    """The result, or None and the reason in the rows."""
    try:
        return action()
    except Exception as error:  # whatever a provider does, the others still run
        if isinstance(error, WrongAnswer):
            for row in rows:
                row.errors = error.errors
        _close(rows, *_verdict(error))
    _recover(settings.device)
    return None


def _close(rows: Sequence[Row], status: str, note: str) -> None:
    for row in rows:
        row.status, row.note = status, note


def _verdict(error: Exception) -> tuple[str, str]:
    if isinstance(error, NotOffered):
        return ABSENT, f"not offered: {error}"
    if isinstance(error, ImportError):
        return ABSENT, f"not installed: {error}"
    if isinstance(error, Refused):
        return REFUSED, str(error)
    text = next(iter(str(error).splitlines()), "")
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in text:
        return FAILED, "out of memory"
    return FAILED, f"raised {type(error).__name__}: {text}"


def _recover(device: torch.device) -> None:
    """Frees what a failure has left; raises DeviceLost where the device answers no more."""
    gc.collect()
    if device.type == "cuda":
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise DeviceLost(str(error).splitlines()[0]) from None
