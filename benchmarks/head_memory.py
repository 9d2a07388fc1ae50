"""Memory of heads on both sides at full size: `python -m benchmarks.head_memory --out DIR`.

Forward KL and its gradients, each case in a process of its own: the most that was resident at once
during the call, less what was before it and the gradients. Products' own buffers are part of it.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fastkd
from fastkd import chunks

from . import machine

ROWS, HIDDEN, VOCAB = 4096, 1024, 128256
MIB = 2**20


class Case(NamedTuple):
    """What is asked for: the hidden states' gradient, and the weight's where the head trains."""

    dtype: str
    trains: bool


CASES = (Case("float32", False), Case("float32", True), Case("bfloat16", False))


def main(arguments: Sequence[str]) -> None:
    top = argparse.ArgumentParser(prog="benchmarks.head_memory", description=__doc__)
    top.add_argument("--out", type=Path, help="results.json and table.md")
    top.add_argument("--rows", type=int, default=ROWS, help=f"default: {ROWS}")
    top.add_argument("--case", type=int, choices=range(len(CASES)), help=argparse.SUPPRESS)
    options = top.parse_args(arguments)
    if options.case is not None:
        print(json.dumps(measured(CASES[options.case], options.rows)))
        return
    rows = [child(case, options.rows) for case in range(len(CASES))]
    header = machine.header(torch.device("cpu"), arguments, None)
    header["command"] = header["command"].replace("benchmarks", "benchmarks.head_memory", 1)
    text = table(rows)
    print(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "results.json").write_text(json.dumps({**header, "rows": rows}, indent=1))
        (options.out / "table.md").write_text(text + "\n")


def child(case: int, rows: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.head_memory", "--case", str(case), "--rows", str(rows)],
        check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(case: Case, rows: int) -> dict[str, Any]:
    hidden, other = drawn(case, rows), drawn(case, rows)
    weight, other_weight = drawn(case, VOCAB), drawn(case, VOCAB)
    hidden.requires_grad_()
    weight.requires_grad_(case.trains)
    loss(hidden[:16], weight[:1000], other[:16], other_weight[:1000]).backward()  # loads libraries
    hidden.grad = weight.grad = None
    before = reset()
    loss(hidden, weight, other, other_weight).backward()
    grown = status("VmHWM") - before
    gradients = sum(x.grad.nbytes for x in (hidden, weight) if x.grad is not None)
    return {
        **case._asdict(), "rows": rows, "hidden": HIDDEN, "vocab": VOCAB,
        "inputs": 2 * hidden.nbytes + 2 * weight.nbytes, "gradients": gradients,
        "beyond": grown - gradients, "budget": chunks.CPU_BYTES,
        "logits": 2 * rows * VOCAB * 4,
    }  # fmt: skip


def drawn(case: Case, rows: int) -> torch.Tensor:
    """Written in place: nothing of it is left over for the measured call."""
    x = torch.empty(rows, HIDDEN, dtype=getattr(torch, case.dtype))
    return x.normal_(std=HIDDEN**-0.25)


def loss(
    hidden: torch.Tensor, weight: torch.Tensor, other: torch.Tensor, other_weight: torch.Tensor
) -> torch.Tensor:
    student, teacher = fastkd.LinearHead(hidden, weight), fastkd.LinearHead(other, other_weight)
    return fastkd.distillation_loss(student, teacher)


def reset() -> int:
    """The peak begins anew: what is resident now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(name: str) -> int:
    found = re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"N = {rows[0]['rows']}, H = {HIDDEN}, V = {VOCAB}; MiB.",
        "",
        "| dtype | head | inputs | gradients | beyond both | of a chunk's bytes | logits, whole |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        head = "trains" if row["trains"] else "frozen"
        sizes = [row[name] / MIB for name in ("inputs", "gradients", "beyond")]
        lines.append(
            f"| {row['dtype']} | {head} | {sizes[0]:.0f} | {sizes[1]:.0f} | {sizes[2]:.1f} | "
            f"{row['beyond'] / row['budget']:.2f} | {row['logits'] / MIB:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
