"""A GPU as rates: how long a kernel takes at least, by its bytes and its instructions."""

from __future__ import annotations

from typing import NamedTuple


class Gpu(NamedTuple):
    """Of one SM or CU, and of all."""

    name: str
    processors: int
    clock: float  # GHz
    copy: float  # TB/s of a large copy
    cached: float  # TB/s out of L2
    cache: int  # bytes of L2
    shared: int  # bytes per processor
    registers: int  # of 32 bits, per processor
    warps: int  # that a processor holds
    width: int  # threads of a warp
    issue: int  # instructions per clock, over all threads
    special: int  # results of the special-function unit per clock


# Rates as large copies and reads out of L2 reach them; published figures and data sheets, to be
# replaced by what `python -m benchmarks --suite gpu --step ceilings` measures.
GPUS = {
    "sm_80": Gpu("A100 80GB", 108, 1.41, 1.75, 4.0, 40 << 20, 164 << 10, 65536, 64, 32, 128, 16),
    "sm_90": Gpu("H200", 132, 1.98, 4.3, 5.7, 60 << 20, 228 << 10, 65536, 64, 32, 128, 16),
    "sm_100": Gpu("B200", 148, 1.92, 7.0, 10.0, 126 << 20, 228 << 10, 65536, 64, 32, 128, 16),
    "gfx942": Gpu("MI300X", 304, 2.1, 4.3, 10.0, 256 << 20, 64 << 10, 131072, 32, 64, 256, 64),
}
H100 = GPUS["sm_90"]._replace(name="H100", clock=1.755, copy=3.0, cache=50 << 20)
LAUNCH = 4e-6  # seconds from one kernel's end to the next one's first load
SECTOR = 32  # bytes: what L2 takes at a time, however few of them are written
CACHED = 0.75  # the share of L2 that holds what was read last


def occupancy(gpu: Gpu, registers: int, shared: int, warps: int) -> int:
    """Programs that a processor holds at once."""
    of_warp = -(-registers * gpu.width // 256) * 256
    by_registers = gpu.registers // (of_warp * warps)
    by_shared = gpu.shared // (shared + 1024) if shared else 32
    return min(by_registers, by_shared, gpu.warps // warps, 32)


def sectors(count: float, align: float) -> float:
    """Bytes of the sectors that `count` bytes lie in, where these begin at multiples of `align`."""
    return count + max(SECTOR - align, 0)


class Traffic(NamedTuple):
    """Bytes per logit position: moved between processor and L2, and between L2 and DRAM."""

    moved: float
    unshared: float  # from DRAM, where every sweep must read anew
    shared: float  # from DRAM, where a sweep finds what L2 still holds


def hits(gpu: Gpu, followed: float) -> float:
    """The share that L2 still holds of what so many bytes have followed."""
    return min(1.0, CACHED * gpu.cache / followed)


def traffic(
    gpu: Gpu, loads: list[float], stored: float, row: int, rows: int, programs: int, split: bool
) -> Traffic:
    """Of a kernel, or of the kernels of a split row, by what each sweep loads and all store.

    row: bytes of a row on both sides; programs: those under way at once. A sweep runs against the
    one before: what lies a share x from the turn was followed by 1.5 x rows' worth of other bytes
    from each program. Between the launches of a split row all rows pass by.
    """
    hit = hits(gpu, row * rows if split else 1.5 * row * min(programs, rows))
    moved = sum(loads) + stored
    return Traffic(moved, moved, loads[0] + sum(loads[1:]) * (1.0 - hit) + stored)


class Times(NamedTuple):
    """Seconds by each limit."""

    dram: float
    cache: float
    issue: float
    special: float
    latency: float  # by a replay of the code (replay.py), 0 without one
    launches: float

    @property
    def predicted(self) -> float:
        return max(self[:5]) + self.launches

    @property
    def limit(self) -> str:
        return self._fields[self.index(max(self[:5]))]


def times(
    gpu: Gpu, positions: float, bytes_: Traffic, instructions: float, special: float,
    programs: int, launches: int, latency: float,
) -> Times:  # fmt: skip
    """instructions, special: per position; fewer programs than processors leave some idle."""
    share = min(1.0, programs / gpu.processors)
    per_second = gpu.processors * gpu.clock * 1e9 * share
    return Times(
        positions * bytes_.shared / (gpu.copy * 1e12 * share),
        positions * bytes_.moved / (gpu.cached * 1e12 * share),
        positions * instructions / (per_second * gpu.issue),
        positions * special / (per_second * gpu.special),
        latency,
        launches * LAUNCH,
    )
