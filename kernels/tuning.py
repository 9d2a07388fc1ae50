"""Which schedule, tile and number of warps: the only place with such numbers.

Chosen from a static table, not by timing: the kernels may write their inputs, which a timed trial
run would destroy. 16 entries per thread leave every loop without spills, which the
ahead-of-time tests check. Nothing here has been timed on a GPU yet.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# A row of up to this many columns is loaded once and kept in registers.
RESIDENT = 4096
# Entries of a longer row's tile: 16 per thread with 8 warps.
BLOCK = 4096
# Entries of a program of the elementwise kernels, 16 per thread: at least two loads of 128 bits
# per operand under way.
ELEMENTWISE = (4096, 8)
# What rows of more columns take: "sweep", or to read each operand once "relay" or, on Hopper and
# later with Triton 3.8 or later, "cluster". Sweeps, until a GPU has shown another to be right and
# faster.
LONG = "sweep"
# The thread blocks of a cluster, the columns that each of them holds, and the Triton that has them.
CLUSTER, SHARE, CLUSTERS = 16, 8192, (3, 8)


class Schedule(NamedTuple):
    """How the rows are laid out over programs; a tile is [lanes, vector]."""

    # "resident": a tile holds whole rows, one per lane; "sweep": one row, swept tile by tile;
    # "relay": a piece of one row, the programs that hold the others run at the same time.
    kind: str
    lanes: int
    vector: int  # consecutive entries that one thread loads at once
    splits: int  # programs that share a row
    warps: int
    programs: int = 0  # of a relay: as many as run at once
    blocks: int = 1  # thread blocks, in a cluster, that hold a tile
    registers: int | None = None  # that a thread has at most, so that `programs` do fit


def schedule(rows: int, columns: int, itemsize: int, device: torch.device, once: bool) -> Schedule:
    """For `rows` rows of `columns` entries of `itemsize` bytes, the narrower operand's.

    once: for a single sweep over them, which reads each operand once whatever the schedule.
    """
    if device.type == "cpu":  # the interpreter: small, so that tests meet every seam
        return table(rows, columns, itemsize, 1, resident=128, block=256)
    processors = multiprocessors(device)
    if not once and columns > RESIDENT and columns % (16 // itemsize) == 0:
        one = relay(itemsize, processors)
        fits = columns <= one.programs * one.lanes * one.vector
        if LONG == "relay" and fits and is_nvidia(device, 8):
            return one
        if LONG == "cluster" and is_nvidia(device, 9) and columns <= CLUSTER * SHARE:
            return cluster(columns)
    return table(rows, columns, itemsize, processors)


def relay(itemsize: int, processors: int) -> Schedule:
    """16 bytes of each of 4 rows of lanes to a thread; two programs fit a processor's registers."""
    return Schedule("relay", 512, 16 // itemsize, 1, 4, 2 * processors, registers=255)


def cluster(columns: int) -> Schedule:
    width = power_of_two(columns)
    return Schedule("resident", 1, width, 1, 8, blocks=max(width // SHARE, 1))


def table(
    rows: int, columns: int, itemsize: int, processors: int,
    resident: int = RESIDENT, block: int = BLOCK,
) -> Schedule:  # fmt: skip
    if columns <= resident:
        width = power_of_two(max(columns, 16))
        # A thread holds 16 entries, of one row where it is long: what is computed once per row is
        # computed by every thread of it. Short rows are packed, 2048 entries to 4 warps, as far as
        # every processor keeps some.
        most = 1 if width >= 512 else 2048 // width
        packed = min(most, power_of_two(-(-rows // processors)))
        return Schedule("resident", packed, width, 1, max(packed * width // 512, 1))
    splits = 1
    while splits < 64 and rows * splits < 2 * processors and columns >= 4 * block * splits:
        splits *= 2
    vector = 16 // itemsize
    return Schedule("sweep", block // vector, vector, splits, 8)


def elementwise(device: torch.device) -> tuple[int, int]:
    """(entries, warps) of a program that works entry by entry."""
    return (256, 4) if device.type == "cpu" else ELEMENTWISE


def power_of_two(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()


def is_nvidia(device: torch.device, generation: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= generation


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
