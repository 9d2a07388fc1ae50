"""Which schedule, tile and number of warps: the only place with such numbers.

Chosen from a static table, not by timing: the kernels may write their inputs, which a timed trial
run would destroy. 16 entries per thread leave every loop without spills, which the
ahead-of-time tests check. Nothing here has been timed on a GPU yet.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton

TRITON = tuple(map(int, triton.__version__.split(".")[:2]))

# Rows of up to so many columns take a schedule; longer ones are swept. "resident": a row is loaded
# once and kept in registers; "cluster": in those of several thread blocks, which hold up to
# CLUSTER * SHARE columns. It takes none until a GPU has shown it right and faster than sweeps.
COLUMNS = {"resident": 4096, "cluster": 0}
# The entries of a resident row to a thread: what is computed once per row is computed by each of
# its threads. LEAN, where nothing but the divergence is wanted. They are worked off in parts of at
# most PART, as the compiler keeps what it computes of all entries of a part.
HELD, LEAN, PART = 16, 32, 16
# Bytes of a row that one access writes at least: the cache takes as long for less.
WRITTEN = 16
# Entries of a longer row's tile: 16 per thread with 8 warps.
BLOCK = 4096
# Entries of a program of the elementwise kernels, 16 per thread: at least two loads of 128 bits
# per operand under way.
ELEMENTWISE = (4096, 8)
# The first number of Hopper's capability.
HOPPER = 9
# The thread blocks of a cluster, the columns that each of them holds, and the Triton that has them,
# from Hopper on.
CLUSTER, SHARE, CLUSTERS = 16, 8192, (3, 9)

# Programs that share every long row in one cooperative launch, up to 32; 0: none do, until a GPU
# has shown that to be faster.
SHARED = 0

# Registers of a thread of a sweep on Hopper, at most: 64 let a processor hold 1024 threads, 80 hold
# 768, 128 hold 512. The least that leaves the loops without spills under Triton 3.6 to 3.9, by
# `python -m benchmarks.registers`: where only the divergence is wanted of rows that begin alike at
# multiples of 16 bytes, and with more to do. None: it takes no more than 80 of its own, but for TVD
# by Triton 3.6, and more instructions where it is held to them.
TVD = 80 if TRITON < (3, 7) else None
# With more to do, 80 are enough for skew KL and Renyi until Triton 3.8, for DKD from 3.7 on, and
# for alpha and NKD by 3.7 alone.
SKEW_KL = RENYI = 80 if TRITON < (3, 8) else 128
DKD = 80 if TRITON >= (3, 7) else 128
ALPHA, NKD = (80, 80) if TRITON == (3, 7) else (128, 255)
REGISTERS: dict[str, tuple[int | None, int]] = {
    "forward_kl": (None, 80), "reverse_kl": (None, 80), "tvd": (TVD, 80), "jsd": (64, 80),
    "skew_kl": (80, SKEW_KL), "skew_reverse_kl": (80, 80), "jeffreys": (80, 80),
    "alpha": (80, ALPHA), "renyi": (80, RENYI), "dkd": (80, DKD), "nkd": (128, NKD),
    "todi": (80, 80), "taid": (80, 80), "alpha_beta": (255, 255),
}  # fmt: skip
OTHERS = (None, 128)
# Where rows begin anywhere, at least; and of these, until Triton 3.8, of which a loop would spill.
ODD_REGISTERS = 80
ODD_ONES = dict.fromkeys(
    ("forward_kl", "reverse_kl", "tvd", "jsd"), 64 if TRITON < (3, 8) else ODD_REGISTERS
)
# And with more to do, likewise: held to fewer, their loops spill.
ODD_MORE = {
    "reverse_kl": 128, "skew_kl": 128, "jeffreys": 128, "alpha": 128, "renyi": 128, "dkd": 128,
    "nkd": 255,
}  # fmt: skip
# Of shared rows on all targets of NVIDIA, as their programs must be there at the same time: where
# only the divergence is wanted, and else.
SHARED_REGISTERS = {
    "skew_kl": (128, 128), "skew_reverse_kl": (128, 128), "alpha_beta": (255, 255),
}  # fmt: skip
SHARED_OTHERS = (80, 128)


class Schedule(NamedTuple):
    """How the rows are laid out over programs; a tile is [lanes, vector]."""

    # "resident": a tile holds whole rows, one per lane; "sweep": one row, swept tile by tile;
    # "shared": the same by programs that run at the same time.
    kind: str
    lanes: int
    vector: int  # consecutive entries that one thread loads at once
    splits: int  # programs that share a row
    warps: int
    blocks: int = 1  # thread blocks, in a cluster, that hold a tile
    threads: int = 0  # that hold a resident row, by pieces; 0: in one piece


class Layout(NamedTuple):
    """How a resident row lies in the registers of its threads."""

    parts: tuple[tuple[int, int], ...]  # (first column, columns), these powers of two
    piece: int  # columns that the threads load together
    stored: int  # and write together


def schedule(
    rows: int, columns: int, itemsize: int, device: torch.device, once: bool, lean: bool = False,
    swept: bool = False,
) -> Schedule:  # fmt: skip
    """For `rows` rows of `columns` entries of `itemsize` bytes, the narrower operand's.

    once: for a single sweep over them, which reads each operand once whatever the schedule.
    lean: nothing but the divergence is wanted, which leaves registers free.
    swept: programs that share a row, be it short, hand on through memory, by sweeps.
    """
    held = LEAN if lean else HELD
    if device.type == "cpu":  # the interpreter: small, so that tests meet every seam
        return table(rows, columns, itemsize, 1, -1 if swept else 128, block=256, held=held)
    resident = -1 if swept else COLUMNS["resident"]  # a shard may have no columns at all
    processors = multiprocessors(device)
    if not (once or swept) and resident < columns <= COLUMNS["cluster"]:
        if columns % (16 // itemsize) == 0 and generation(device) >= HOPPER:
            return cluster(columns)
    wave = 32 if generation(device) else 64
    plan = table(rows, columns, itemsize, processors, resident, wave=wave, held=held)
    if SHARED and plan.kind == "sweep" and not (once or swept):
        return plan._replace(kind="shared", splits=min(SHARED, max(columns // BLOCK, 1)))
    return plan


def cluster(columns: int) -> Schedule:
    width = power_of_two(columns)
    return Schedule("resident", 1, width, 1, 8, blocks=max(width // SHARE, 1))


def table(
    rows: int, columns: int, itemsize: int, processors: int,
    resident: int = COLUMNS["resident"], block: int = BLOCK, wave: int = 32, held: int = HELD,
) -> Schedule:  # fmt: skip
    """wave: threads of a warp; held: entries of a resident row to a thread."""
    if columns <= resident:
        width = power_of_two(max(columns, 16))
        threads = max(width // held, 1)
        # Rows that leave some of a warp's threads free are packed into 128 threads, as far as every
        # processor keeps some and no warp is left with idle threads.
        full = max(wave // threads, 1)
        packed = min(128 // threads, power_of_two(-(-rows // processors))) if full > 1 else 1
        packed = max(packed, full)
        warps = max(packed * threads // wave, 1)
        return Schedule("resident", packed, width, 1, warps, threads=threads)
    splits = 1
    while splits < 64 and rows * splits < 2 * processors and columns >= 4 * block * splits:
        splits *= 2
    vector = 16 // itemsize
    return Schedule("sweep", block // vector, vector, splits, 8)


@functools.cache
def layout(plan: Schedule, columns: int, vector: int, itemsize: int) -> Layout:
    """Of resident rows of `columns` entries, of which one load may hold `vector`."""
    if not plan.threads:
        return Layout(((0, plan.vector),), plan.vector, plan.vector)
    # One column alone: the compiler would lay threads along the pieces, not along the rows.
    piece = max(plan.threads * vector, 2)
    # The least part: many of a few columns would cost more than some padding.
    least = max(piece, plan.vector // 16)
    parts, begin = [], 0
    while begin < columns:
        left = -(-(columns - begin) // least) * least
        size = min(plan.threads * PART, power_of_two(left + 1) // 2)
        parts.append((begin, size))
        begin += size
    return Layout(tuple(parts), piece, max(piece, WRITTEN // itemsize))


def registers(device: torch.device, divergence: str, shifted: bool, plain: bool) -> dict[str, Any]:
    """Launch options of a sweep that gathers statistics.

    shifted: rows may begin anywhere; plain: alike on all sides, and only the divergence is wanted.
    """
    if device.type == "cpu" or generation(device) != HOPPER:
        return {}
    least, most = REGISTERS.get(divergence, OTHERS)
    if shifted:
        least = max(least or 0, ODD_ONES.get(divergence, ODD_REGISTERS))
        most = max(most, ODD_MORE.get(divergence, 0))
    return {"maxnreg": least if plain else most}


def at_once(
    device: torch.device, divergence: str, lean: bool, warps: int
) -> tuple[int, dict[str, Any]]:
    """Programs of shared rows that a device surely holds at once; options that see to it."""
    if device.type == "cpu":  # the interpreter, which runs one after the other
        return 1, {}
    if not generation(device):
        return multiprocessors(device), {}
    cap = SHARED_REGISTERS.get(divergence, SHARED_OTHERS)[not lean]
    return multiprocessors(device) * (65536 // (32 * warps * cap)), {"maxnreg": cap}


def elementwise(device: torch.device) -> tuple[int, int]:
    """(entries, warps) of a program that works entry by entry."""
    return (256, 4) if device.type == "cpu" else ELEMENTWISE


def power_of_two(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()


@functools.cache
def generation(device: torch.device) -> int:
    """Of an NVIDIA GPU, the first number of its capability; 0 of others."""
    return 0 if torch.version.hip else torch.cuda.get_device_capability(device)[0]


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
