"""What the compiled kernels promise, without a GPU: `python -m benchmarks.compiled`.

A table per target, read from its machine code. With tables of an earlier commit beside it, what
has changed. What times follow says `python -m benchmarks.predictions`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from . import changes, machine, model
from .assembly import replaced
from .configurations import (
    EVERYTHING,
    MAIN,
    PARTS,
    TARGETS,
    Configuration,
    Measured,
    configurations,
    measure,
    tasks,
)
from .report import table
from .work import tile_of, traffic, way, work

# --- tables ----------------------------------------------------------------------------------

COLUMNS = (
    "configuration", "divergence", "kernel", "tile", "warps", "registers", "shared", "spills",
    "programs per SM", "loaded", "stored", "DRAM, no reuse", "DRAM, L2 reuse", "instructions",
    "value known", "EX2", "LG2", "MUFU",
)  # fmt: skip


def _line(one: Measured) -> list[str]:
    binary, gpu = one.binary, model.GPUS[one.target]
    done = work(binary, one.entry, gpu.width)
    held = model.occupancy(gpu, binary.registers, binary.shared, binary.warps)
    bytes_ = traffic(gpu, [one], 128256, 8192)
    return [
        one.configuration, one.divergence, binary.name.strip("_"),
        " x ".join(map(str, tile_of(binary))), str(binary.warps),
        str(binary.registers), str(binary.shared), str(binary.all.spills), str(held),
        *(f"{x:.2f}" for x in (sum(done.loads), done.stored, bytes_.unshared, bytes_.shared)),
        f"{done.instructions:.1f}", f"{work(binary, one.entry, gpu.width, True).instructions:.1f}",
        *(f"{x:.2f}" for x in (done.exp2, done.log2, done.special)),
    ]  # fmt: skip


# --- what does not cancel -----------------------------------------------------------------------

CANCELLING = (
    "divergence",
    "sweeps",
    "instructions",
    "textbook",
    "cost",
    "registers",
    "its registers",
)


def _against_textbook(target: str, name: str) -> list[str]:
    """Instructions per position of the sweep, ours and with the values that cancel."""
    from fastkd.kernels import launch

    from .textbook import TABLE

    (ours,) = measure(target, name, MAIN[:1])
    with replaced(launch, "device_of", lambda name, a, b: TABLE[name]):
        (theirs,) = measure(target, name, MAIN[:1])
    width = model.GPUS[target].width
    count, plain = (work(one.binary, one.entry, width).instructions for one in (ours, theirs))
    loops = way(ours.binary.loops, known=False)
    sweeps = [loop.instructions * ours.entry / loop.loaded for loop in loops]
    return [
        name, " + ".join(f"{n:.1f}" for n in sweeps),
        *(f"{n:.1f}" for n in (count, plain, count - plain)),
        *(str(one.binary.registers) for one in (ours, theirs)),
    ]  # fmt: skip


# --- the command -----------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="benchmarks.compiled", description=__doc__)
    top.add_argument("--target", nargs="+", choices=TARGETS, default=TARGETS)
    top.add_argument("--divergence", nargs="+", choices=EVERYTHING, default=EVERYTHING)
    top.add_argument("--configuration", nargs="+", metavar="NAME", help="these alone")
    top.add_argument("--out", type=Path, metavar="FOLDER", help="a file per target; else printed")
    top.add_argument("--before", type=Path, metavar="FOLDER", help="where earlier tables lie")
    top.add_argument("--jobs", type=int, default=2, help="processes that compile")
    top.add_argument("--json", action="store_true", help="what the tests read: the kernels")
    top.add_argument("--part", choices=PARTS, default=PARTS[0], help="with --json: how much of it")
    return top


def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    with ProcessPoolExecutor(options.jobs) as pool:
        if options.json:
            wanted = set(product(options.target, options.divergence))
            chosen = [task for task in tasks(options.part) if task in wanted]
            found = pool.map(partial(_task, options.part, options.configuration), chosen)
            print(json.dumps([kernel for part in found for kernel in part]))
            return 0
        for target in options.target:
            text = _report(target, options, pool, arguments)
            if options.before:
                before = (options.before / f"{target}.md").read_text()
                text += "\n" + changes.report(before, text)
            if options.out:
                options.out.mkdir(parents=True, exist_ok=True)
                (options.out / f"{target}.md").write_text(text)
            else:
                print(text)
    return 0


def _chosen(
    target: str, name: str, only: Sequence[str] | None, part: str = PARTS[0]
) -> list[Configuration]:
    found = configurations(target, name, part)
    return [one for one in found if only is None or one.name in only]


def _task(part: str, only: Sequence[str] | None, task: tuple[str, str]) -> list[dict[str, Any]]:
    """The kernels of a target and a divergence, as plain values."""
    target, name = task
    return [
        {
            "target": target,
            "divergence": name,
            "configuration": one.configuration,
            "kernel": one.binary.name,
            "warps": one.binary.warps,
            "registers": one.binary.registers,
            "scattered": one.binary.scattered,
            "all": one.binary.all._asdict(),
            "main": one.binary.main._asdict(),
            "loops": [loop._asdict() for loop in one.binary.loops],
            "work": work(one.binary, one.entry, model.GPUS[target].width)._asdict(),
            "known": work(one.binary, one.entry, model.GPUS[target].width, True)._asdict(),
            "occupancy": model.occupancy(
                model.GPUS[target], one.binary.registers, one.binary.shared, one.binary.warps
            ),
        }
        for one in measure(target, name, _chosen(target, name, only, part))
    ]


def _report(
    target: str, options: argparse.Namespace, pool: ProcessPoolExecutor, arguments: Sequence[str]
) -> str:
    names, only = options.divergence, options.configuration
    found = pool.map(partial(_table, target, only), names)
    lines = [line for part in found for line in part]
    header = machine.header(torch.device("cpu"), (), None)
    command = shlex.join(["python", "-m", "benchmarks.compiled", *arguments])
    parts = [
        f"# Compiled for {target}",
        "Read from the machine code, nothing was run. Per logit position, over all sweeps of a "
        "kernel; bytes of DRAM for 8192 rows of 128256.",
        *([GCN_COUNTS] if "gfx" in target else []),
        f"- {header['date']}, triton {header['versions']['triton']}, fastkd at commit "
        f"{header['commit'] or 'unknown'}\n- `{command}`",
        table((COLUMNS, *sorted(lines))),
    ]
    if target == OF_TEXTBOOK and (only is None or MAIN[0].name in only):
        from .textbook import TABLE

        known = [name for name in names if name in TABLE]
        parts += [
            "## What values that do not cancel cost",
            "Instructions of the sweep, against the same kernel with the textbook's values.",
            table((CANCELLING, *pool.map(partial(_against_textbook, target), known))),
        ]
    return "\n\n".join(parts) + "\n"


OF_TEXTBOOK = "sm_90"
GCN_COUNTS = (
    "Registers, spills and widths hold; what a loop does per position is an upper bound, since a "
    "masked tile is not told from its unmasked twin here, and counts as one more sweep."
)


def _table(target: str, only: Sequence[str] | None, name: str) -> list[list[str]]:
    return [_line(one) for one in measure(target, name, _chosen(target, name, only))]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
