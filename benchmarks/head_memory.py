"""Memory of heads on both sides at full size: `python -m benchmarks.head_memory --out DIR`.

Forward KL and its gradients, each case in a process of its own: the most that was resident at once
during the call, less what was before it and the gradients. Products' own buffers are part of it.
The last column is what whole logits of both sides would take, in fp32.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fastkd
from fastkd import chunks

from . import machine
from .publish import publish_table

HIDDEN, VOCAB = 1024, 128256
MIB = 2**20


class Case(NamedTuple):
    """What is asked for: the hidden states' gradient, and the weight's where the head trains."""

    dtype: str
    trains: bool
    rows: int


CASES = (
    Case("float32", False, 4096),
    Case("float32", True, 4096),
    Case("bfloat16", False, 4096),  # whose weights are converted for every chunk
)


def main(arguments: Sequence[str]) -> None:
    top = argparse.ArgumentParser(prog="benchmarks.head_memory", description=__doc__)
    top.add_argument("--out", type=Path, help="results.json and table.md")
    top.add_argument("--rows", type=int, default=4096, help="at most; default: 4096")
    top.add_argument("--case", type=int, choices=range(len(CASES)), help=argparse.SUPPRESS)
    options = top.parse_args(arguments)
    if options.case is not None:
        case = CASES[options.case]
        print(json.dumps(measured(case._replace(rows=min(case.rows, options.rows)))))
        return
    rows = [child(case, options.rows) for case in range(len(CASES))]
    header = machine.header(torch.device("cpu"), arguments, None, "benchmarks.head_memory")
    text = table(rows)
    print(text)
    if options.out:
        publish_table(options.out, text + "\n", header, rows=rows)


def child(case: int, rows: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.head_memory", "--case", str(case), "--rows", str(rows)],
        check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(case: Case) -> dict[str, Any]:
    hidden, other = (drawn(case.rows, case.dtype) for _ in range(2))
    weight, other_weight = (drawn(VOCAB, case.dtype) for _ in range(2))
    hidden.requires_grad_()
    weight.requires_grad_(case.trains)
    loss(hidden[:16], weight[:1000], other[:16], other_weight[:1000]).backward()  # loads libraries
    hidden.grad = weight.grad = None
    before, _ = machine.resident()
    loss(hidden, weight, other, other_weight).backward()
    grown = machine.resident()[1] - before
    gradients = sum(x.grad.nbytes for x in (hidden, weight) if x.grad is not None)
    return {
        **case._asdict(), "hidden": HIDDEN, "vocab": VOCAB,
        "inputs": 2 * hidden.nbytes + 2 * weight.nbytes, "gradients": gradients,
        "beyond": grown - gradients, "budget": chunks.CPU_BYTES,
        "logits": 2 * case.rows * VOCAB * 4,
    }  # fmt: skip


def drawn(rows: int, dtype: str) -> torch.Tensor:
    """Written in place: nothing of it is left over for the measured call."""
    x = torch.empty(rows, HIDDEN, dtype=getattr(torch, dtype))
    return x.normal_(std=HIDDEN**-0.25)


def loss(
    hidden: torch.Tensor, weight: torch.Tensor, other: torch.Tensor, other_weight: torch.Tensor
) -> torch.Tensor:
    student, teacher = fastkd.LinearHead(hidden, weight), fastkd.LinearHead(other, other_weight)
    return fastkd.distillation_loss(student, teacher)


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"H = {HIDDEN}, V = {VOCAB}; MiB.",
        "",
        "| dtype | head | N | inputs | gradients | beyond both | of a chunk's bytes | logits |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        head = "trains" if row["trains"] else "frozen"
        inputs, gradients, beyond, logits = (
            row[name] / MIB for name in ("inputs", "gradients", "beyond", "logits")
        )
        lines.append(
            f"| {row['dtype']} | {head} | {row['rows']} | {inputs:.0f} | {gradients:.0f} | "
            f"{beyond:.1f} | {row['beyond'] / row['budget']:.2f} | {logits:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
