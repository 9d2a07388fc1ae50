"""Time and memory of contenders that have passed the gate."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch

from fastkd.distill.measure import peak_memory

from .check import Answer, Contender, Refused, Sample, touch, verify

# Calls per block, whatever they take.
FEWEST, MOST = 3, 100
# Work may end this much later than its stream says, by these factor and milliseconds.
LATE_FACTOR, LATE_MS = 1.5, 0.5


class Clock(Protocol):
    """Milliseconds between start and stop, one figure per pair."""

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def times(self) -> list[float]: ...


class HostClock:
    def __init__(self) -> None:
        self._times: list[float] = []

    def start(self) -> None:
        self._start = time.perf_counter()

    def stop(self) -> None:
        self._times.append(1e3 * (time.perf_counter() - self._start))

    def times(self) -> list[float]:
        return self._times


# Clocks that a GPU sleeps before each timed call: a millisecond, more than the host takes for one.
ASLEEP = 2_000_000


class EventClock:
    """CUDA events, the L2 cache overwritten before each start.

    The device sleeps before the first event, while the host queues the call: what is timed is the
    device's work, and not the host's, but where a call waits for an answer of the device.
    """

    def __init__(self, device: torch.device) -> None:
        properties = torch.cuda.get_device_properties(device)
        size = 4 * max(properties.L2_cache_size, 1 << 24)
        self._cache = torch.empty(size, dtype=torch.int8, device=device)
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> None:
        self._cache.zero_()
        torch.cuda._sleep(ASLEEP)
        pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._events.append(pair)
        pair[0].record()

    def stop(self) -> None:
        self._events[-1][1].record()

    def times(self) -> list[float]:
        torch.cuda.synchronize()
        return [start.elapsed_time(stop) for start, stop in self._events]


def clock_for(device: torch.device) -> Clock:
    return EventClock(device) if device.type == "cuda" else HostClock()


def synchronizer(device: torch.device) -> Callable[[], None]:
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


# --- time ----------------------------------------------------------------------------------------


class Times(NamedTuple):
    """Milliseconds over all calls; `medians` are those of the rounds, whose spread is the noise."""

    median: float
    p20: float
    p80: float
    medians: list[float]
    calls: int


def summary(rounds: Sequence[Sequence[float]]) -> Times:
    times = [t for one in rounds for t in one]
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    medians = [statistics.median(one) for one in rounds]
    return Times(statistics.median(times), deciles[1], deciles[7], medians, len(times))


def block(contender: Contender, part: str, calls: int, clock: Clock) -> list[float]:
    """Times of some calls, each on changed inputs, each answer judged by what it was in time."""
    problem, samples = contender.problem, list[Sample]()
    for _ in range(calls):
        problem.change()
        prepared = contender.prepare(part)
        clock.start()
        answer = contender.answer(part, prepared)
        samples.append(touch(answer, problem))
        clock.stop()
        del answer, prepared
    times = clock.times()
    for sample in samples:
        verify(sample, problem)
    return times


def calls_for(contender: Contender, part: str, seconds: float, device: torch.device) -> int:
    """Warms up, and says how many calls fill the time given."""
    usual = statistics.median(block(contender, part, FEWEST, clock_for(device)))
    return max(FEWEST, min(MOST, int(1e3 * seconds / max(usual, 1e-3))))


def refuse_other_streams(contender: Contender, part: str) -> None:
    """Raises where work goes on after the current stream, which the clock watches, is done."""
    late = []
    for _ in range(FEWEST):
        torch.cuda.synchronize()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began = time.perf_counter()
        start.record()
        contender.answer(part, contender.prepare(part))
        stop.record()
        torch.cuda.synchronize()
        elapsed = 1e3 * (time.perf_counter() - began)
        late.append(elapsed - LATE_FACTOR * start.elapsed_time(stop))
    if min(late) > LATE_MS:
        raise Refused(
            f"refused: the device worked on for {min(late):.1f} ms after the stream it was given"
        )


class Replayed(Contender):
    """A contender captured in a CUDA graph: what is left where the host would be the limit."""

    def __init__(self, contender: Contender) -> None:
        self.name, self.problem = contender.name, contender.problem
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(FEWEST):
                contender.answer("full")
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._answer = contender.answer("full")

    def prepare(self, part: str) -> None:
        return None

    def answer(self, part: str, prepared: object = None) -> Answer:
        self._graph.replay()
        return self._answer


# --- memory --------------------------------------------------------------------------------------


def peak_bytes(contender: Contender, part: str, device: torch.device) -> int:
    """The most that PyTorch's allocator held at once during a call, beyond what it held before."""
    contender.problem.change()
    return peak_memory(partial(contender.answer, part), device)
