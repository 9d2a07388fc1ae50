"""Runs a kernel's PTX on the CPU, on the host's memory: `machine.cpp`, built once by g++."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .decode import MASK, Decoder

SOURCES = ("machine.cpp", "memory.h", "formulas.h", "numbers.h")
FLAGS = ("-O2", "-ftree-vectorize", "-march=native", "-ffp-contract=off", "-std=c++17")

_ACCESS = [(name, "i4") for name in ("program", "epoch", "sync", "pc")]
_ACCESS += [(name, "i2") for name in ("warp", "lane")]
REPORT = np.dtype(
    [("kind", "i4"), ("between", "i4"), ("allocation", "i4"), ("now", _ACCESS),
     ("before", _ACCESS), ("address", "u8"), ("count", "u8")], align=True,
)  # fmt: skip
ALLOCATION = np.dtype(
    [(name, "u8") for name in ("base", "size", "writable", "written")] + [("cell", "i8")]
)
CONFIG = np.dtype(
    [("seed", "u8"), ("mode", "i4"), ("window", "i4"), ("ulp", "i4"), ("dropped", "i4"),
     ("most_steps", "u8")]
)  # fmt: skip
KINDS = (
    "out of bounds", "outside the view", "misaligned", "unwritten", "write after write",
    "read after write", "write after read", "divergent barrier", "divergent shuffle",
    "barrier after an exit", "endless", "unknown operation",
)  # fmt: skip
BETWEEN = ("", " between lanes", " between warps", " between programs")
SHARED = -2
MOST_REPORTS = 400
NO_NUMBER = {"r": 0x7FC0DEAD, "q": 0x7FF8DEADDEADDEAD}  # what a register holds before its value


def missing() -> str | None:
    """Why the machine cannot be built here."""
    return None if shutil.which("g++") else "the PTX machine is built by g++, which is not here"


@functools.cache
def library() -> ctypes.CDLL:
    here = Path(__file__).parent
    digest = hashlib.sha256(b"".join((here / name).read_bytes() for name in SOURCES))
    built = Path(tempfile.gettempdir()) / f"fastkd-ptx-{os.getuid()}" / f"{digest.hexdigest()}.so"
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        new = built.with_suffix(f".{os.getpid()}")
        command = ("g++", *FLAGS, "-shared", "-fPIC", "-o", str(new), str(here / SOURCES[0]))
        subprocess.run(command, check=True)
        new.replace(built)
    library = ctypes.CDLL(str(built))
    library.program.restype = library.hits.restype = ctypes.c_void_p
    library.operation.argtypes = [ctypes.c_char_p]
    return library


class Allocation(NamedTuple):
    """Memory that a kernel may touch; the arrays hold a byte for each cell."""

    name: str
    base: int
    cell: int  # bytes
    writable: np.ndarray
    written: np.ndarray

    @property
    def size(self) -> int:
        return len(self.written) * self.cell

    @property
    def bytes(self) -> np.ndarray:
        return np.ctypeslib.as_array((ctypes.c_uint8 * self.size).from_address(self.base))


class Kernel:
    """A kernel's PTX, ready to run."""

    def __init__(self, text: str) -> None:
        self.decoded = Decoder(text, lambda name: library().operation(name.encode()))
        self.name, self.text, self.code = self.decoded.name, text, self.decoded.code
        counts, code = self.decoded.counts, _pointer(self.code)
        self.handle = library().program(code, len(self.code), *counts)

    def launch(
        self, values: Sequence[int], grid: Sequence[int], shared: int,
        allocations: Sequence[Allocation], **config: int,
    ) -> tuple[list[str], int]:  # fmt: skip
        """What is wrong, and the instructions that warps took. values: the parameters' bits."""
        registers = self._registers(values)
        table = np.zeros(len(allocations), ALLOCATION)
        for row, one in zip(table, allocations, strict=True):
            row["base"], row["size"], row["cell"] = one.base, one.size, one.cell
            row["writable"], row["written"] = one.writable.ctypes.data, one.written.ctypes.data
        settings = np.zeros((), CONFIG)
        for name, value in ({"dropped": -1, "most_steps": 200_000_000} | config).items():
            settings[name] = value
        reports, steps = np.zeros(MOST_REPORTS, REPORT), np.zeros((), np.uint64)
        count = library().launch(
            ctypes.c_void_p(self.handle), *(_pointer(bank) for bank in registers),
            _pointer(np.array([*grid, 1, 1][:3], np.int32)), self.decoded.threads // 32, shared,
            _pointer(table), len(table), _pointer(settings), _pointer(reports), len(reports),
            _pointer(steps),
        )  # fmt: skip
        return [self._described(report, allocations) for report in reports[:count]], int(steps)

    def _registers(self, values: Sequence[int]) -> list[np.ndarray]:
        banks = {
            bank: np.full(count, NO_NUMBER[bank], np.uint32 if bank == "r" else np.uint64)
            for bank, count in zip("rq", self.decoded.counts, strict=False)
        }
        for bank, constants in self.decoded.constants.items():
            for register, value in constants.items():
                banks[bank][register] = value
        for bank, register, which, type_ in self.decoded.from_parameters:
            # Beyond the arguments come pointers of Triton's own, which no kernel here uses.
            value = values[which] if which < len(values) else 0
            if bank == "q" and type_.endswith("32"):
                value &= MASK["r"]
                value -= (type_ == "s32" and value >> 31) << 32
            banks[bank][register] = value & MASK[bank]
        return list(banks.values())

    def _described(self, report: Any, allocations: Sequence[Allocation]) -> str:
        which, address, now, before = (
            report[name] for name in ("allocation", "address", "now", "before")
        )
        where = "shared memory" if which == SHARED else "memory"
        if which >= 0:
            where, address = allocations[which].name, int(address) - allocations[which].base
        text = (
            f"{KINDS[report['kind']]}{BETWEEN[report['between']]}: {self.name}, byte {address} of"
        )
        text += f" {where}, {report['count']} times, by {self._source(now)}"
        return text + (f" and {self._source(before)}" if before["pc"] >= 0 else "")

    def _source(self, access: Any) -> str:
        line = int(self.code[access["pc"]]["line"])
        return (
            f"program {access['program'] - 1} warp {access['warp']} lane {access['lane']} at "
            f"<{line}: {self.decoded.lines[line - 1].strip()}>"
        )

    def places(self, operation: str) -> list[int]:
        """Of the instructions of this kind."""
        wanted = library().operation(operation.encode())
        return [int(pc) for pc in np.flatnonzero(self.code["op"] == wanted)]

    def hits(self) -> np.ndarray:
        """By instruction, whether a thread has executed it."""
        at = library().hits(ctypes.c_void_p(self.handle))
        return np.ctypeslib.as_array((ctypes.c_uint8 * len(self.code)).from_address(at)).copy()


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)
