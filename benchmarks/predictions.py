"""How long the compiled kernels should take: `python -m benchmarks.predictions --divergence jsd`.

By the rates of `model.py`, and for the sweeps of Hopper by a replay of their code: `replay.py`.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor

from fastkd.kernels import tuning

from . import cases, model, replay
from .assembly import Binary
from .configurations import NAMES, Configuration, Measured, has_clusters, measure
from .report import table
from .work import tile_of, traffic, work

PREDICTED = (
    "case", "divergence", "pass", "schedule", "DRAM bytes", "instructions", "MUFU", "DRAM, ms",
    "L2, ms", "issue, ms", "MUFU, ms", "replayed, ms", "predicted, ms", "limit", "of the floor",
    "of a copy",
)  # fmt: skip
ALL = (*NAMES, "kl_div")
EVERY = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "tvd")
# Of rows whose KL is not small: the loss alone in one sweep, the gradient without a value.
ONE_SWEEP, GRADIENT_ALONE = "forward, large", "fused, large"
# (case, pass, divergences)
CASES = (
    ("llama3-8192", "fused", NAMES),
    ("qwen3-4096", "fused", EVERY), ("gemma3-4096", "fused", EVERY),
    ("llama2-8192", "fused", EVERY), ("gpt2-8192", "fused", EVERY),
    ("llama3-8192", "forward", EVERY), ("llama3-8192", "backward", EVERY),
    ("llama3-8192", ONE_SWEEP, EVERY[:2]),
    ("llama3-8192", GRADIENT_ALONE, EVERY[:2]), ("llama2-8192", GRADIENT_ALONE, EVERY[:2]),
    ("gpt2-8192", GRADIENT_ALONE, EVERY[:2]),
    ("imagenet-65536", "fused", EVERY), ("cifar100-65536", "fused", EVERY),
    ("cifar10-65536", "fused", EVERY), ("llama3-64", "fused", EVERY), ("qwen3-512", "fused", EVERY),
    ("llama3-8192", "sum", ("kl_div",)), ("llama3-8192", "input's gradient", ("kl_div",)),
)  # fmt: skip

# Bytes of bf16 that must move per position.
FLOOR = {
    "fused": 6, GRADIENT_ALONE: 6, "forward": 4, ONE_SWEEP: 4, "backward": 6, "sum": 4,
    "input's gradient": 4,
}  # fmt: skip


def report(gpu: model.Gpu, target: str, names: Sequence[str], pool: Executor) -> list[str]:
    """A heading, what the model holds, and the table."""
    lines = pool.map(_predictions, [gpu] * len(names), [target] * len(names), names)
    return [
        f"## Predicted for {gpu.name}",
        f"{gpu.processors} processors at {gpu.clock} GHz, copy {gpu.copy} TB/s, L2 "
        f"{gpu.cached} TB/s: the longest of five limits, and {1e6 * model.LAUNCH:.0f} us a launch; "
        "the fifth is a sweep's replay. The floor is every operand moved once at the copy's rate, "
        "a copy the same with its launch.",
        table((PREDICTED, *(line for part in lines for line in part))),
    ]


def _predictions(gpu: model.Gpu, target: str, name: str) -> list[list[str]]:
    return [
        _prediction(gpu, target, case, launcher, name, cluster)
        for case, launcher, divergences in CASES
        if name in divergences
        for cluster in _choices(target, case, launcher)
    ]


def _choices(target: str, case: str, launcher: str) -> list[int]:
    """The columns of a cluster that make a difference to the case."""
    vocab, most = cases.case_of(case).vocab, tuning.CLUSTER * tuning.SHARE
    fits = launcher in ("fused", "forward") and tuning.COLUMNS["resident"] < vocab <= most
    return [0, most] if fits and target in ("sm_90", "sm_100") and has_clusters() else [0]


def _prediction(
    gpu: model.Gpu, target: str, case: str, launcher: str, name: str, cluster: int
) -> list[str]:
    shape = cases.case_of(case)
    call = Configuration(case, launcher.split(",")[0], shape.rows, shape.vocab, cluster=cluster)
    kernels = measure(target, name, [call])
    if launcher == ONE_SWEEP:
        (one,) = kernels
        kernels = [one._replace(binary=one.binary._replace(loops=one.binary.loops[:1]))]
    known = launcher == GRADIENT_ALONE
    done = [work(one.binary, one.entry, gpu.width, known) for one in kernels]
    first = kernels[0].binary
    padding = _held(first) / shape.vocab if _held(first) else 1.0
    instructions = padding * sum(part.instructions for part in done)
    special = padding * sum(part.special for part in done)
    bytes_ = traffic(gpu, kernels, shape.vocab, shape.rows)
    if "parts" in first.constants and launcher == "fused":
        torn = _written(first, kernels[0].entry / 2, shape.vocab) - kernels[0].entry / 2
        bytes_ = bytes_._replace(moved=bytes_.moved + torn)
    programs = math.prod(first.programs)
    positions = shape.rows * shape.vocab
    replayed = 0.0
    if target == replay.TARGET and _schedule_of(kernels) == "sweep" and launcher != ONE_SWEEP:
        replayed = replay.seconds(first, known, kernels[0].entry, shape.vocab, shape.rows, gpu)
    found = model.times(
        gpu, positions, bytes_, instructions, special, programs, len(kernels), replayed
    )
    floor = positions * FLOOR[launcher] / (gpu.copy * 1e12)
    return [
        case, name, launcher, _schedule_of(kernels), f"{bytes_.shared:.1f}", f"{instructions:.1f}",
        f"{special:.1f}", *(f"{1e3 * t:.3f}" if t else "" for t in found[:5]),
        f"{1e3 * found.predicted:.3f}", found.limit, f"{floor / found.predicted:.0%}",
        f"{(floor + model.LAUNCH) / found.predicted:.0%}",
    ]  # fmt: skip


def _written(binary: Binary, size: float, columns: int) -> float:
    """Bytes per position that a resident row's gradient takes in whole sectors, at most."""
    piece, align = binary.constants["stored"], binary.constants["align"]
    pieces = [
        min(begin + at + min(piece, held), columns) - begin - at
        for begin, held in binary.constants["parts"]
        for at in range(0, held, piece)
        if begin + at < columns
    ]
    return sum(model.sectors(n * size, align * size) for n in pieces) / columns


def _held(binary: Binary) -> int:
    """Columns that the programs of a row hold, with what pads it; 0 where it goes by in tiles."""
    return 0 if binary.loops else tile_of(binary)[-1]


def _schedule_of(kernels: Sequence[Measured]) -> str:
    first = kernels[0].binary
    if first.blocks > 1:
        return "cluster"
    if first.name in ("resident", "shared"):
        return first.name
    if "vector" not in first.constants:
        return "elementwise"
    return "split" if len(kernels) > 1 else "sweep"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.predictions", description=__doc__)
    parser.add_argument("--target", choices=model.GPUS, default=replay.TARGET)
    parser.add_argument("--divergence", nargs="+", choices=ALL, default=ALL)
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile and replay")
    options = parser.parse_args(arguments)
    with ProcessPoolExecutor(options.jobs) as pool:
        found = report(model.GPUS[options.target], options.target, options.divergence, pool)
    print("\n\n".join(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
