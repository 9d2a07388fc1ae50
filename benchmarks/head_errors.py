"""Errors of a bf16 head's gradients against fp64: `python -m benchmarks.head_errors --out DIR`.

Logits of a chunk in fp32, as `LinearHead` makes them, and logits made in bf16 and handed over: by
the standard deviation of the logits, whose rounding grows with them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import fastkd

from . import machine
from .publish import publish_table
from .truth import relative

ROWS, HIDDEN, VOCAB = 128, 256, 32000
DIVERGENCES = {"forward_kl": "forward_kl", "reverse_kl": "reverse_kl", "jsd:0.5": fastkd.JSD(0.5)}
SPREADS = (1, 3)


def main(arguments: Sequence[str]) -> None:
    top = argparse.ArgumentParser(prog="benchmarks.head_errors", description=__doc__)
    top.add_argument("--out", type=Path, help="results.json and table.md")
    options = top.parse_args(arguments)
    rows = [(name, spread, *errors(name, spread)) for name in DIVERGENCES for spread in SPREADS]
    text = table(rows)
    print(text)
    if options.out:
        header = machine.header(torch.device("cpu"), arguments, None, "benchmarks.head_errors")
        publish_table(options.out, text + "\n", header, rows=rows)


def errors(name: str, spread: float) -> list[list[float]]:
    """Relative, of the gradients of hidden states and weight, for each of the two."""
    draw = torch.Generator().manual_seed(0)
    states = [spread * torch.randn(ROWS, HIDDEN, generator=draw) for _ in range(2)]
    weights = [torch.randn(VOCAB, HIDDEN, generator=draw) / HIDDEN**0.5 for _ in range(2)]
    (hidden, other), (weight, other_weight) = ([x.bfloat16() for x in s] for s in (states, weights))

    def gradients(dtype: torch.dtype, loss: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        return torch.autograd.grad(loss(*leaves, other.to(dtype), other_weight.to(dtype)), leaves)

    def heads(hidden: Tensor, weight: Tensor, other: Tensor, other_weight: Tensor) -> Tensor:
        student, teacher = fastkd.LinearHead(hidden, weight), fastkd.LinearHead(other, other_weight)
        return fastkd.distillation_loss(student, teacher, divergence=DIVERGENCES[name])

    def logits(hidden: Tensor, weight: Tensor, other: Tensor, other_weight: Tensor) -> Tensor:
        student, teacher = hidden @ weight.mT, other @ other_weight.mT
        path = "reference" if hidden.dtype == torch.float64 else "auto"
        return fastkd.distillation_loss(
            student, teacher, divergence=DIVERGENCES[name], backend=path
        )

    exact = gradients(torch.float64, logits)
    return [
        [relative(got, truth) for got, truth in zip(found, exact, strict=True)]
        for found in (gradients(torch.bfloat16, heads), gradients(torch.bfloat16, logits))
    ]


def table(rows: Sequence[tuple[str, float, list[float], list[float]]]) -> str:
    lines = [
        f"N = {ROWS}, H = {HIDDEN}, V = {VOCAB}, T = 1; errors of hidden states, weight.",
        "",
        "| divergence | logits' deviation | chunks in fp32 | logits in bf16 |",
        "|---|---|---|---|",
    ]
    for name, spread, *both in rows:
        shown = " | ".join(", ".join(f"{error:.1e}" for error in errors) for errors in both)
        lines.append(f"| {name} | {spread} | {shown} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
