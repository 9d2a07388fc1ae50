"""How many registers a sweep needs: `python -m benchmarks.registers`, for tuning.REGISTERS.

Each kernel is compiled once to PTX, then assembled under every candidate of a cap. A line says how
many threads a processor holds, and what is spilled in loops and in all.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from . import configurations, model
from .assembly import SASS, compiled, count, sass
from .cubins import disassembled
from .report import table

TARGET = "sm_90"
NAMES = (*configurations.NAMES, *configurations.ROWS)
CANDIDATES = (0, 64, 80, 96, 128)  # 0: no cap
SWEPT = (
    *(one for one in (*configurations.MAIN, *configurations.MORE) if one.columns > 4096),
    *(one for one in configurations.OTHERS if one.columns > 4096 and "multi" not in one.name),
    configurations.Configuration("everything, odd", "fused", 8192, 50257, everything=True),
)


def assembled(ptx: str, cap: int) -> bytes:
    """The machine code of a kernel whose threads have at most `cap` registers."""
    from triton.backends.nvidia.compiler import get_ptxas

    tool = get_ptxas(int(TARGET.removeprefix("sm_"))).path
    text = re.sub(r"\.maxnreg \d+\n?", "", ptx)
    if cap:
        text = re.sub(r"(\.reqntid [\d, ]+)", rf"\1\n.maxnreg {cap}", text, count=1)
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(text)
        command = (tool, f"--gpu-name={TARGET}a", "-O3", source, "-o", cubin)
        subprocess.run(command, check=True, capture_output=True)
        return cubin.read_bytes()


def lines(name: str, one: configurations.Configuration) -> list[list[str]]:
    gpu, call = model.GPUS[TARGET], configurations.call_of(name, one)
    found = []
    for kernel in compiled(TARGET, call, gpu.processors):
        if kernel.name != "sweep":
            continue
        ptx, metadata = kernel.kernel.asm["ptx"], kernel.kernel.metadata
        codes = disassembled(TARGET, [assembled(ptx, cap) for cap in CANDIDATES])
        for cap, (text, registers) in zip(CANDIDATES, codes, strict=True):
            code, loops = sass(text)
            threads = 32 * metadata.num_warps
            threads *= model.occupancy(gpu, registers, metadata.shared, metadata.num_warps)
            spills = [count(loop, SASS) for loop in loops]
            found.append([
                name, one.name, str(kernel.constants.get("shifted", 0)), str(cap or "-"),
                str(registers), str(threads),
                str(sum(c.spills for c in spills if c.loaded or c.stored)),
                str(count([line for _, line in code], SASS).spills),
            ])  # fmt: skip
    return found


HEAD = (
    "divergence", "configuration", "shifted", "cap", "registers", "threads", "spills in loops",
    "spills",
)  # fmt: skip


def main(arguments: Sequence[str], show: Callable[[str], None] = print) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.registers", description=__doc__)
    parser.add_argument("--divergence", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument(
        "--only", nargs="+", metavar="CONFIGURATION", default=[one.name for one in SWEPT]
    )
    options = parser.parse_args(arguments)
    found = [
        line
        for name in options.divergence
        for one in SWEPT
        if one.name in options.only
        for line in lines(name, one)
    ]
    show(table((HEAD, *found)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
