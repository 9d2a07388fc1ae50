"""Divergences and temperatures as one writes them on a command line or in TOML."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import fastkd
from fastkd import Divergence
from fastkd.temperature import Constant, Cosine, Exponential, Linear, Schedule, TwoStage

from .errors import Usage, in_range, known

DIVERGENCES: dict[str, type[Divergence]] = {
    kind.name: kind
    for kind in (getattr(fastkd, name) for name in sorted(fastkd.__all__))
    if kind in Divergence.__subclasses__()
}
# By name: the schedule, and the share of the run after which its second temperature is reached.
SCHEDULES: dict[str, tuple[Callable[[float, float, int], Schedule], float]] = {
    "linear": (Linear, 1.0),
    "cosine": (Cosine, 1.0),
    "exponential": (Exponential, 1.0),
    "two-stage": (TwoStage, 0.5),
}


def divergence(text: str) -> Divergence:
    """'forward_kl', or a name with its parameters: 'jsd:0.1', 'jeffreys:1,0.5'.

    Example:
        >>> divergence("jsd:0.1")
        JSD(beta=0.1)
    """
    name, _, rest = text.partition(":")
    known("divergence", name, DIVERGENCES)
    kind = DIVERGENCES[name]
    most = sum(item.init for item in dataclasses.fields(kind))
    try:
        numbers = _numbers(rest)
        for number in numbers:
            in_range(f"divergence {text!r}: a parameter", number, "[-10000, 10000]")
        if len(numbers) > most:
            raise ValueError(f"{name} takes {most or 'no'} numbers, got {len(numbers)}")
        return kind(*numbers)
    except (TypeError, ValueError) as error:
        raise Usage(f"divergence {text!r}: {error}") from None


def schedule(text: str, steps: int) -> Schedule:
    """A temperature for each of `steps` steps: '4', or from one to another, 'cosine:8,1'.

    The second is reached at the end of the run, by `two-stage` in its middle; or after the share of
    the run that a third number names, as in 'linear:8,1,0.25'.

    Example:
        >>> schedule("cosine:8,1", steps=300)
        Cosine(start=8.0, end=1.0, steps=300)
        >>> schedule("two-stage:8,1,0.25", steps=300)
        TwoStage(first=8.0, second=1.0, steps=75)
    """
    name, changes, rest = text.partition(":")
    try:
        if not changes:
            return _within(text, Constant(float(text)), float(text))
        known("schedule", name, SCHEDULES)
        kind, share = SCHEDULES[name]
        numbers = _numbers(rest)
        if len(numbers) not in (2, 3):
            raise ValueError(f"expected two temperatures, got {len(numbers)} numbers")
        start, end, share = [*numbers, share][:3]
        if not 0 < share <= 1:
            raise ValueError(f"the share of the run must lie in (0, 1], got {share}")
        return _within(text, kind(start, end, max(1, round(share * steps))), start, end)
    except (TypeError, ValueError) as error:
        raise Usage(
            f"temperature {text!r}: {error}; say a number, or a schedule such as cosine:8,1"
        ) from None


def _within(text: str, schedule: Schedule, *temperatures: float) -> Schedule:
    """Its temperatures where they are of use to a run; the library takes all above 0."""
    for each in temperatures:
        in_range(f"temperature {text!r}", each, "[0.001, 10000]")
    return schedule


def weights(text: str) -> list[float] | None:
    """The weights of several teachers, as of '2,1'; None where nothing is said.

    Example:
        >>> weights("2,1")
        [2.0, 1.0]
    """
    try:
        return _numbers(text) or None
    except ValueError as error:
        raise Usage(f"teacher_weights {text!r}: {error}; say numbers, as in 2,1") from None


class Adapters(NamedTuple):
    """Rank, alpha, and the layers that low-rank adapters stand beside; no name means all linear."""

    rank: int
    alpha: float
    targets: tuple[str, ...]


def lora(text: str) -> Adapters:
    """'8', or with alpha, by default twice the rank, and the names of layers: '8,16,q_proj,v_proj'.

    Example:
        >>> lora("8")
        Adapters(rank=8, alpha=16.0, targets=())
        >>> lora("8,32,q_proj,v_proj")
        Adapters(rank=8, alpha=32.0, targets=('q_proj', 'v_proj'))
    """
    first, _, rest = text.partition(",")
    second, _, names = rest.partition(",")
    try:
        rank = int(first)
        alpha = float(second) if second else 2.0 * rank
        in_range("the rank", rank, "[1, 65536]")
        in_range("alpha", alpha, "(0, 1000000]")
    except (ValueError, Usage) as error:
        raise Usage(
            f"lora {text!r}: {error}; say a rank, or with alpha and layers, as in "
            "8,16,q_proj,v_proj"
        ) from None
    return Adapters(rank, alpha, tuple(name.strip() for name in names.split(",") if name.strip()))


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",") if number]
