"""Sweeps replayed from their machine code, with latencies.

The rates of `model.py` say how long a kernel takes at least; where few warps run, what they wait
for takes longer. The code of Hopper says itself how long an instruction stalls its warp and for
which results it waits. Here the warps of a processor issue that code, one row after the other,
against pipes, L2 and DRAM that serve at their rates after their latencies. No GPU has confirmed
it: ratios of such times are worth more than the times.
"""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from . import assembly, model

TARGET = "sm_90"
SCHEDULERS = 4
# Pipes by what they do, and the clocks for which an instruction of a warp keeps one.
PIPES = (
    ("special", 8, r"MUFU|F2F|I2F|F2I|FRND|POPC|I2FP"),
    ("memory", 2, r"(LDG|STG|LDS|STS|LDC|ATOM\w*|RED|REDUX|SHFL)\b"),
    ("products", 2, r"IMAD"),
    ("logic", 2, r"FMNMX|FSEL|FSETP|F2FP|P?LOP3|SHF|I?ADD3?\b|IABS|ISETP|ISCADD|SEL|PRMT|MOV|LEA|"
                 r"VIMNMX|VIADD|P2R|R2P|VOTE|BMSK|SGXT|CS2R"),
    ("uniform", 2, r"U|R2UR"),
    ("floats", 1, r""),
)  # fmt: skip
# Clocks until a result is there, where the code waits for it by a barrier and not by a stall.
LATENCIES = (
    (22, r"MUFU|F2F|I2F|F2I|FRND|POPC|I2FP"),
    (24, r"SHFL"),
    (29, r"LDS"),
    (40, r"LDC|S2U?R|ATOM|REDUX"),
    (400, r"LDG"),  # of a row's numbers, mostly found in L2
    (4, r""),
)
L2, DRAM = 300, 1000
READ = 15  # until operands have been read
WIRE = 64  # bytes per clock that a processor's loads and stores move
MEETING = 12  # from the last warp at a barrier to the next instruction of all
BEGINNING = 300  # of a program
APART = 2500  # between the beginnings of the first programs
ROUNDS = 2  # rows of a program

_LINE = re.compile(
    r"/\*([0-9a-f]{4,})\*/\s+(\S.*?);\s+/\* 0x[0-9a-f]{16} \*/\s+/\* 0x([0-9a-f]{16}) \*/"
)
_JUMP = re.compile(r"\bBRA\b.*0x([0-9a-f]+)")
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")


class Instruction(NamedTuple):
    pipe: str
    clocks: int  # for which it keeps the pipe
    stall: int  # of its warp
    result: int  # the barrier that its result lifts, and the one that reading its operands does
    read: int
    waits: tuple[int, ...]  # for these barriers
    latency: int
    loaded: float  # bytes of a tile, by a warp
    stored: float
    meets: bool  # waits for all warps of the program


class Kernel(NamedTuple):
    """A sweep's code and what surrounds it on a processor."""

    text: str
    warps: int
    programs: int
    entry: int  # bytes of a position on both sides
    columns: int
    known: bool  # whether the first sweep's sums give the value, and the gradient's has none
    hit: float  # the share of a later sweep's loads that L2 serves


# --- the code ----------------------------------------------------------------------------------


def _decoded(line: str, control: int, share: float) -> Instruction:
    """share: of a tile that it moves."""
    bare = _PREDICATE.sub("", line)
    pipe, clocks = next((name, n) for name, n, of in PIPES if re.match(of, bare))
    mask = control >> 11 & 63
    tile = share * 32 * assembly.width(bare.split()[0], assembly.SASS)
    return Instruction(
        pipe, clocks, max(control & 15, 1), control >> 5 & 7, control >> 8 & 7,
        tuple(n for n in range(6) if mask >> n & 1),
        next(n for n, of in LATENCIES if re.match(of, bare)),
        tile if assembly.SASS.kept.match(bare) else 0.0,
        tile if bare.startswith("STG") else 0.0,
        bare.startswith("BAR"),
    )  # fmt: skip


Encoded = tuple[str, int]  # an instruction, and its control code


def trace(kernel: Kernel) -> Iterator[tuple[Instruction, bool]]:
    """What a warp issues for a row, and whether it is of a sweep after the first.

    Loops that do not sweep such a row, and what a branch passes over together with one, are for
    other rows.
    """
    code = {
        int(at, 16): (line, int(high, 16) >> 41) for at, line, high in _LINE.findall(kernel.text)
    }
    jumps = [(at, int(to[1], 16)) for at, (line, _) in code.items() if (to := _JUMP.search(line))]
    loops = {to: at for at, to in jumps if to < at}
    rounds, masked, left = _rounds(kernel, code, loops)
    over = {
        at: to
        for at, to in jumps
        if any(at < begin < to for begin in loops.keys() - rounds)
        and not any(at < begin < to for begin in rounds)
    }
    swept, goes_on = False, 0
    for at, one in code.items():
        if at < goes_on:
            continue
        if at in loops:
            share = left if at in masked else 1.0
            body = [(_decoded(*part, share), swept) for part in _between(code, at, loops[at])]
            yield from body * rounds.get(at, 0)
            swept |= at in rounds and at not in masked
            goes_on = loops[at] + 1
            continue
        yield _decoded(*one, left), swept
        goes_on = over.get(at, 0)
        if swept and one[0].startswith("EXIT"):
            return


def _rounds(
    kernel: Kernel, code: dict[int, Encoded], loops: dict[int, int]
) -> tuple[dict[int, int], set[int], float]:
    """Of the loops that sweep the row: one for each of its full tiles, and of those that store its
    gradient in one alone. Which of them are of masked tiles, and the share of one that a row has.
    """
    bodies = {begin: _between(code, begin, end) for begin, end in loops.items()}
    tiles = {begin: _tiles(kernel, body) for begin, body in bodies.items() if _loads(body)}
    masked = {
        begin for begin in tiles if all(line.startswith("@") for line in _loads(bodies[begin]))
    }
    left = next((count % 1 for begin, count in tiles.items() if begin not in masked), 0.0)
    rounds = {begin: int(count) for begin, count in tiles.items()}
    for begin in masked:
        # A row has one such tile, which the compiler may have taken out, to before the loop.
        ended = max((end for end in loops.values() if end < begin), default=-1)
        rounds[begin] = not _loads(_between(code, ended + 1, begin - 1))
    storing = [
        begin
        for begin in tiles.keys() - masked
        if any(assembly.SASS.store.search(line) for line, _ in bodies[begin])
    ]
    chosen = (min if kernel.known else max)(
        storing, key=lambda begin: len(bodies[begin]), default=None
    )
    for begin in storing:
        if begin != chosen:
            del rounds[begin]
    return rounds, masked, left


def _between(code: dict[int, Encoded], begin: int, end: int) -> list[Encoded]:
    return [one for at, one in code.items() if begin <= at <= end]


def _loads(body: Sequence[Encoded]) -> list[str]:
    """Those of a tile, which tell the cache how to keep it."""
    return [line for line, _ in body if assembly.SASS.kept.search(line)]


def _tiles(kernel: Kernel, body: Sequence[Encoded]) -> float:
    """How many a row has of those that a round loads."""
    loaded = sum(_decoded(*one, 1.0).loaded for one in body)
    return kernel.columns * kernel.entry / (loaded * kernel.warps)


# --- the processor -------------------------------------------------------------------------------


class Server:
    """Serves bytes at a rate, in order."""

    def __init__(self, rate: float) -> None:
        self.rate, self.free = rate, 0.0

    def serve(self, now: float, count: float) -> float:
        """When it begins with them."""
        begin = max(now, self.free)
        self.free = begin + count / self.rate
        return begin


class Warp:
    def __init__(self, program: int) -> None:
        self.program = program
        self.begin()

    def begin(self) -> None:
        self.at, self.barriers = 0, [0.0] * 8


class Scheduler:
    """Issues an instruction per clock, of the warp that has been ready for longest."""

    def __init__(self) -> None:
        self.queue: list[tuple[float, int]] = []  # (ready, warp)
        self.free = {name: 0.0 for name, *_ in PIPES}
        self.due = math.inf

    def next(self, now: float, wanted: Callable[[int], str]) -> int | None:
        """The warp whose turn it is, if the pipe that it wants is free."""
        while self.queue and self.queue[0][0] <= now:
            _, n = heapq.heappop(self.queue)
            free = self.free[wanted(n)]
            if free <= now:
                return n
            heapq.heappush(self.queue, (free, n))
        return None


class Processor:
    """Works off rows, each by a program."""

    def __init__(self, kernel: Kernel, gpu: model.Gpu) -> None:
        self.kernel, self.code = kernel, list(trace(kernel))
        clock = gpu.processors * gpu.clock * 1e9
        self.dram, self.cache = Server(gpu.copy * 1e12 / clock), Server(gpu.cached * 1e12 / clock)
        self.wire = Server(WIRE)
        self.schedulers = [Scheduler() for _ in range(SCHEDULERS)]
        self.turns: list[tuple[float, int]] = []
        self.warps = [Warp(n // kernel.warps) for n in range(kernel.warps * kernel.programs)]
        self.waiting = [0] * kernel.programs  # warps at a barrier, or at the end
        self.rows = [ROUNDS] * kernel.programs
        self.missed = 0.0

    def clocks_per_row(self) -> float:
        for n, warp in enumerate(self.warps):
            self.ready(n, APART * warp.program)
        last = 0.0
        while self.turns:
            now, number = heapq.heappop(self.turns)
            scheduler = self.schedulers[number]
            if now != scheduler.due:
                continue
            scheduler.due = math.inf
            n = scheduler.next(now, lambda n: self.code[self.warps[n].at][0].pipe)
            if n is not None:
                self.issue(n, now, scheduler)
                last = now
            if scheduler.queue:
                self.call(number, max(scheduler.queue[0][0], now + (n is not None)))
        return last / (ROUNDS * self.kernel.programs)

    def ready(self, n: int, when: float) -> None:
        number = n % SCHEDULERS
        heapq.heappush(self.schedulers[number].queue, (when, n))
        self.call(number, when)

    def call(self, number: int, when: float) -> None:
        if when < self.schedulers[number].due:
            self.schedulers[number].due = when
            heapq.heappush(self.turns, (when, number))

    def issue(self, n: int, now: float, scheduler: Scheduler) -> None:
        warp = self.warps[n]
        one, again = self.code[warp.at]
        scheduler.free[one.pipe] = now + one.clocks
        done = self.moved(one, again, now) if one.loaded or one.stored else now + one.latency
        for barrier, when in ((one.result, done), (one.read, now + READ)):
            warp.barriers[barrier] = max(warp.barriers[barrier], when)
        warp.at += 1
        if warp.at == len(self.code):
            self.together(warp.program, now + BEGINNING, self.next_row)
        elif one.meets:
            self.together(warp.program, now + MEETING, self.go_on)
        else:
            self.go_on([n], now + one.stall)

    def moved(self, one: Instruction, again: bool, now: float) -> float:
        """When what is loaded has come; a store waits for nothing."""
        count = one.loaded + one.stored
        now = self.wire.serve(now, count)
        begin = self.cache.serve(now, count)
        self.missed += 1 - self.kernel.hit if again and one.loaded else 1
        if self.missed < 1:
            return begin + L2
        self.missed -= 1
        return self.dram.serve(now, count) + DRAM

    def together(
        self, program: int, when: float, then: Callable[[Sequence[int], float], None]
    ) -> None:
        """What the warps of a program do once all of them have come here."""
        self.waiting[program] += 1
        if self.waiting[program] == self.kernel.warps:
            self.waiting[program] = 0
            first = program * self.kernel.warps
            then(range(first, first + self.kernel.warps), when)

    def go_on(self, warps: Sequence[int], when: float) -> None:
        for n in warps:
            warp = self.warps[n]
            waits = self.code[warp.at][0].waits
            self.ready(n, max([when, *(warp.barriers[barrier] for barrier in waits)]))

    def next_row(self, warps: Sequence[int], when: float) -> None:
        program = self.warps[warps[0]].program
        self.rows[program] -= 1
        if self.rows[program]:
            for n in warps:
                self.warps[n].begin()
            self.go_on(warps, when)


def seconds(
    binary: assembly.Binary, known: bool, entry: int, columns: int, rows: int, gpu: model.Gpu
) -> float:
    """Of a launch that sweeps `rows` rows, more than there are programs under way."""
    programs = model.occupancy(gpu, binary.registers, binary.shared, binary.warps)
    hit = model.hits(gpu, 1.5 * entry * columns * programs * gpu.processors)
    kernel = Kernel(binary.text, binary.warps, programs, entry, columns, known, hit)
    clocks = Processor(kernel, gpu).clocks_per_row()
    return 1e-9 * clocks * rows / gpu.processors / gpu.clock
