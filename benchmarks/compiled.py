"""What the compiled kernels promise, without a GPU: `python -m benchmarks.compiled`.

A table per target, read from its machine code, and the time that a model of a GPU makes of it.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fastkd
from fastkd.divergences import BUILT_IN, ROW_LOSSES
from fastkd.forms import Events
from fastkd.kernels import tuning
from fastkd.problem import Coefficients, Problem
from fastkd.sharding import run

from . import machine, model
from .assembly import Binary, Counts, binaries, replaced
from .report import table

TARGETS = tuple(model.GPUS)
NAMES = tuple(BUILT_IN)
ROWS = tuple(kind.name for kind in ROW_LOSSES if kind.has_device_function)
EVERYTHING = (*NAMES, *ROWS, "kl_div")
BF16, FP32 = torch.bfloat16, torch.float32


class Configuration(NamedTuple):
    """A call of a launcher; `everything`: all options at once, for kl_div log_target."""

    name: str
    launcher: str
    rows: int
    columns: int
    dtype: torch.dtype = BF16
    everything: bool = False
    cluster: int = 0  # tuning.COLUMNS
    shared: int = 0  # tuning.SHARED
    first: int = 0  # columns of a wider tensor before these
    beyond: int = 0  # and after them


# Those of every target and divergence, and in CI of a few when in haste.
MAIN = (
    Configuration("sweep", "fused", 4096, 128256),
    Configuration("resident", "fused", 4096, 1000),
    Configuration("ten columns", "fused", 65536, 10),
    Configuration("hundred columns", "fused", 65536, 100),
    Configuration("everything", "fused", 4096, 128256, everything=True),
)
# Those of every divergence on sm_90.
MORE = (
    Configuration("forward", "forward", 4096, 128256),
    Configuration("backward", "backward", 4096, 128256),
    Configuration("split", "fused", 64, 128256),
    Configuration("fp32", "fused", 4096, 128256, FP32),
    Configuration("odd", "fused", 8192, 50257),
    Configuration("everything resident", "fused", 4096, 1000, everything=True),
    Configuration("everything, ten columns", "fused", 65536, 10, everything=True),
    Configuration("everything, hundred columns", "fused", 65536, 100, everything=True),
)
# Of every divergence on sm_90, of a few on NVIDIA's later targets.
SHARED = Configuration("shared", "fused", 4096, 128256, shared=8)
CLUSTER = Configuration("cluster", "fused", 4096, 128256, cluster=tuning.CLUSTER * tuning.SHARE)
# Those of forward KL on sm_90: what it shares with every other, and heads of sigmoids.
OTHERS = (
    Configuration("slices", "in place", 8192, 50257, first=3),
    Configuration("slices split", "in place", 64, 128253, first=3),
    Configuration("slices fp32", "in place", 8192, 50257, FP32, first=3),
    Configuration("slices, own gradient", "fused", 8192, 50257, first=3),
    Configuration("padded, 252 columns", "fused", 4, 252, beyond=4),
    Configuration("padded fp32, 250 columns", "fused", 4, 250, FP32, beyond=6),
    Configuration("standardized", "standardized", 4096, 128256),
    Configuration("standardized resident", "standardized", 4096, 1000),
    Configuration("multi-label", "multi-label", 4096, 32000),
    Configuration("multi-label resident", "multi-label", 4096, 1000),
    Configuration("multi-label everything", "multi-label", 4096, 32000, everything=True),
)
# Beside a teacher that lists LISTED columns: of every target, and on sm_90.
LISTED = 64
OF_LISTED = {
    "forward_kl": (Configuration("listed", "listed", 4096, 128256),),
    "jsd": (Configuration("listed, everything", "listed", 4096, 128256, everything=True),),
}
MORE_LISTED = (
    Configuration("listed, split", "listed", 64, 128256),
    Configuration("listed, odd", "listed", 8192, 50257),
)
# Every width that a resident row can have; on sm_90.
WIDTHS = tuple(
    Configuration(f"resident {width}", "fused", 65536, width)
    for width in (5, 16, 32, 37, 64, 128, 256, 512, 1024, 2048, 4096)
)
ALL_WIDTHS = ("forward_kl", "jsd")


# kl_div: per entry a value or their sum, and the gradients of one side or of both.
KL_DIV = tuple(
    Configuration(f"{launcher}{of} {name}", launcher, 1, 1 << 24, dtype, everything=bool(of))
    for launcher in ("values", "sum", "input's gradient", "both gradients")
    for name, dtype in (("bf16", BF16), ("fp32", FP32))
    for of in ("", " of logs")
)


class Measured(NamedTuple):
    """A kernel of a configuration."""

    target: str
    divergence: str
    configuration: str
    binary: Binary
    entry: int  # bytes of a logit of each side together


def configurations(target: str, name: str, quick: bool = False) -> Iterator[Configuration]:
    if name == "kl_div":
        yield from KL_DIV
        return
    yield from MAIN
    yield from OF_LISTED.get(name, ())
    if has_clusters() and (target == "sm_90" or (target == "sm_100" and name in ALL_WIDTHS)):
        yield CLUSTER
    if (target == "sm_90" and name in NAMES) or (target == "sm_100" and name in ALL_WIDTHS):
        yield SHARED
    if target == "sm_90":
        yield from MORE
        if name == "forward_kl":
            yield from OTHERS
            yield from MORE_LISTED
        if name in ALL_WIDTHS and not quick:
            yield from WIDTHS


def has_clusters() -> bool:
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2])) >= tuning.CLUSTERS


def tasks(quick: bool) -> list[tuple[str, str]]:
    """(target, divergence); the quick ones stand for the others."""
    if quick:
        names = ("forward_kl", "jsd", "kl_div")
        return [*(("sm_90", name) for name in names), ("gfx942", "forward_kl")]
    return [(target, name) for target in TARGETS for name in EVERYTHING]


def measure(target: str, name: str, chosen: Iterable[Configuration]) -> list[Measured]:
    processors = model.GPUS[target].processors
    return [
        Measured(
            target, name, one.name, binary, (2 - (one.launcher == "listed")) * one.dtype.itemsize
        )
        for one in chosen
        for binary in binaries(target, _call(name, one), processors, one.cluster, one.shared)
    ]


def _call(name: str, one: Configuration) -> Callable[[], object]:
    """The launcher on tensors that have a shape and nothing else."""
    from fastkd.kernels import bernoulli, elementwise, events, logits, moments

    rows, full = one.rows, one.everything

    def meta(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    if name == "kl_div":
        x, t, u, w = (meta(rows, one.columns, dtype=one.dtype) for _ in range(4))
        if one.launcher in ("values", "sum"):
            out = u if one.launcher == "values" else None
            return partial(elementwise.forward, x, t, out, full)
        upstream = meta(1, 1, dtype=one.dtype).expand_as(x)
        if one.launcher == "both gradients":
            return partial(elementwise.backward, upstream, x, t, u, w, full)
        return partial(elementwise.backward, upstream, None, t, u, None, full)
    wide = one.first + one.columns + one.beyond
    inside = slice(one.first, one.first + one.columns)
    z, y = (meta(1, rows, wide, dtype=one.dtype)[..., inside] for _ in range(2))
    kind = fastkd.Divergence.of_name(name)
    labels = meta(rows, dtype=torch.int64) if full or kind.label_aware else None
    counted = meta(rows, dtype=torch.bool) if full else None
    problem = Problem(
        z, y, meta(rows), None, labels, counted, 0.1 if full else 0.0, name, *kind().parameters,
        one.columns,
    )  # fmt: skip
    factors = Coefficients(meta(rows), *((meta(rows),) * 2 if full else (None, None)))
    if one.launcher == "multi-label":
        heads = fastkd.Bernoulli(1, 1 if full else 0)
        problem = problem._replace(
            labels=meta(rows, one.columns) if full else None, divergence=heads.name,
            a=heads.forward, b=heads.reverse,
        )  # fmt: skip
        return partial(bernoulli.fused, problem, factors, full, None)
    if one.launcher == "standardized":
        problem = problem._replace(moments=meta(2, 3, rows))

        def call() -> None:
            moments.fill(problem.moments, z, y, counted, one.columns)
            logits.fused(problem, factors, full, None)

        return call
    if one.launcher == "listed":
        exact = partial(meta, rows, dtype=torch.float64)
        teacher = Events(meta(rows, LISTED, dtype=torch.int64), exact(LISTED), exact())
        return partial(events.fused, problem._replace(teacher=teacher), factors, full, None)
    if one.launcher in ("fused", "in place"):
        out = z if one.launcher == "in place" else None
        return partial(logits.fused, problem, factors, full, out)
    if one.launcher == "forward":
        return lambda: run("", logits.phases(problem, False, False))
    return partial(logits.backward, problem, meta(5, rows), factors, True, False)


# --- tables ----------------------------------------------------------------------------------

COLUMNS = (
    "configuration", "divergence", "kernel", "tile", "warps", "registers", "shared", "spills",
    "programs per SM", "loaded", "stored", "DRAM, no reuse", "DRAM, L2 reuse", "instructions",
    "value known", "EX2", "LG2", "MUFU",
)  # fmt: skip


class Work(NamedTuple):
    """Per logit position, over the sweeps of one kernel; positions that pad a row count."""

    loads: list[float]  # bytes, by sweep
    stored: float
    instructions: float
    exp2: float
    log2: float
    special: float


def tile_of(binary: Binary) -> tuple[int, ...]:
    """Of a resident row what its parts hold together."""
    held = sum(columns for _, columns in binary.constants.get("parts", ())) or None
    sizes = [binary.constants.get(name) for name in ("lanes", "vector", "block")]
    return tuple(size for size in (sizes[0], held, *sizes[1:]) if size is not None)


def way(loops: Sequence[Counts], known: bool) -> list[Counts]:
    """What a row takes: of several loops that store its gradient one.

    known: the shortest, which serves where the first sweep's sums give the value.
    """
    storing = [loop for loop in loops if loop.stored]
    chosen = (min if known else max)(storing, key=lambda loop: loop.instructions, default=None)
    return [loop for loop in loops if not loop.stored or loop is chosen]


def work(binary: Binary, entry: int, width: int, known: bool = False) -> Work:
    """A resident kernel has no loop: all of it is spread over its tile."""
    if binary.loops:
        loops = way(binary.loops, known)
        loads = [entry] * len(loops)
        parts = [(loop, loop.loaded / entry) for loop in loops]
    else:
        tile = math.prod(tile_of(binary))
        parts = [(binary.main, tile / (width * binary.warps * binary.blocks))]
        # What a row needs once is loaded by each of its threads, but moved once.
        whole_rows = "lanes" in binary.constants
        loads = [entry if whole_rows else sum(part.loaded / n for part, n in parts)]

    def total(name: str) -> float:
        return sum(getattr(counts, name) / positions for counts, positions in parts)

    return Work(loads, *(total(name) for name in Work._fields[1:]))


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


def traffic(gpu: model.Gpu, kernels: Sequence[Measured], columns: int, rows: int) -> model.Traffic:
    """Of the kernels that work off the same rows, one after the other."""
    done = [work(one.binary, one.entry, gpu.width) for one in kernels]
    binary = kernels[0].binary
    programs = gpu.processors * min(
        model.occupancy(gpu, b.registers, b.shared, b.warps) for b in (k.binary for k in kernels)
    )
    return model.traffic(
        gpu, [n for part in done for n in part.loads], sum(part.stored for part in done),
        kernels[0].entry * columns, rows, programs // binary.constants.get("splits", 1),
        len(kernels) > 1,
    )  # fmt: skip


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
    from fastkd.kernels import logits

    from .textbook import TABLE

    (ours,) = measure(target, name, MAIN[:1])
    with replaced(logits, "device_of", lambda name, a, b: TABLE[name]):
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
    top.add_argument("--out", type=Path, metavar="FOLDER", help="a file per target; else printed")
    top.add_argument("--jobs", type=int, default=2, help="processes that compile")
    top.add_argument("--json", action="store_true", help="what the tests read: the kernels")
    top.add_argument("--quick", action="store_true", help="with --json: a few that stand for all")
    return top


def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    with ProcessPoolExecutor(options.jobs) as pool:
        if options.json:
            wanted = set(product(options.target, options.divergence))
            chosen = [task for task in tasks(options.quick) if task in wanted]
            found = pool.map(partial(_task, options.quick), chosen)
            print(json.dumps([kernel for part in found for kernel in part]))
            return 0
        for target in options.target:
            text = _report(target, options.divergence, pool, arguments)
            if options.out:
                options.out.mkdir(parents=True, exist_ok=True)
                (options.out / f"{target}.md").write_text(text)
            else:
                print(text)
    return 0


def _task(quick: bool, task: tuple[str, str]) -> list[dict[str, Any]]:
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
        for one in measure(target, name, configurations(target, name, quick))
    ]


def _report(
    target: str, names: Sequence[str], pool: ProcessPoolExecutor, arguments: Sequence[str]
) -> str:
    found = pool.map(_table, [target] * len(names), names)
    lines = [line for part in found for line in part]
    header = machine.header(torch.device("cpu"), (), None)
    command = shlex.join(["python", "-m", "benchmarks.compiled", *arguments])
    gpus = [model.GPUS[target], *([model.H100] if target == "sm_90" else [])]
    parts = [
        f"# Compiled for {target}",
        "Read from the machine code, nothing was run. Per logit position, over all sweeps of a "
        "kernel; bytes of DRAM for 8192 rows of 128256.",
        *([GCN_COUNTS] if "gfx" in target else []),
        f"- {header['date']}, triton {header['versions']['triton']}, fastkd at commit "
        f"{header['commit'] or 'unknown'}\n- `{command}`",
        table((COLUMNS, *sorted(lines))),
    ]
    from . import predictions  # which asks this module
    from .textbook import TABLE

    known = [name for name in names if name in TABLE]
    parts += [
        "## What values that do not cancel cost",
        "Instructions of the sweep, against the same kernel with the textbook's values.",
        table((CANCELLING, *pool.map(_against_textbook, [target] * len(known), known))),
    ]
    parts += [part for gpu in gpus for part in predictions.report(gpu, target, names, pool)]
    return "\n\n".join(parts) + "\n"


GCN_COUNTS = (
    "Registers, spills and widths hold; what a loop does per position is an upper bound, since a "
    "masked tile is not told from its unmasked twin here, and counts as one more sweep."
)


def _table(target: str, name: str) -> list[list[str]]:
    return [_line(one) for one in measure(target, name, configurations(target, name))]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
