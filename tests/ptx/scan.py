"""Compiles every launch that a user can reach, up to PTX, under the Triton that is installed.

`python -m tests.ptx.scan`, from the root of a checkout: {call: what is wrong} as the last line. The
exit code is 1 where a call does not compile, or reduces over lanes in a way that Triton 3.7.1 gets
wrong. A launch takes some 0.4 s; nothing is executed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

import torch

import fastkd
from benchmarks.layouts import scattered

from .problems import placed, settings

DIVERGENCES = (
    fastkd.ForwardKL(), fastkd.ReverseKL(), fastkd.Jeffreys(), fastkd.JSD(0.3),
    fastkd.SkewKL(0.1), fastkd.SkewReverseKL(0.1), fastkd.TVD(), fastkd.AlphaDivergence(0.5),
    fastkd.Renyi(0.5), fastkd.Bernoulli(1, 1), fastkd.DKD(), fastkd.NKD(), fastkd.TAID(),
    fastkd.AlphaBeta(0.2, 0.7), fastkd.ToDi(),
)  # fmt: skip
COLUMNS = (
    2, 3, 7, 10, 16, 17, 33, 64, 100, 250, 257, 1000, 2048, 4096, 5001, 16387,  # the last in pieces
)  # fmt: skip
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GRADIENTS = (None, "forward", "backward")
KINDS = ("plain", "full", "std")
PLACES = ("plain", "pad16")
ROWS = (1, 5)
IN_CI = 149  # of so many calls one


class Call(NamedTuple):
    divergence: fastkd.Divergence
    columns: int
    dtype: torch.dtype
    gradient: str | None
    kind: str
    place: str

    @property
    def name(self) -> str:
        words = (self.columns, str(self.dtype)[6:], self.gradient or "loss", self.kind, self.place)
        return f"{self.divergence} {' '.join(map(str, words))}"

    def run(self) -> None:
        multi_label, labelled = self.divergence.name == "bernoulli", self.kind == "full"
        kind = f"heads{' full' * labelled}" if multi_label else self.kind
        options = settings(kind, ROWS, self.columns, 0)
        z, y = (
            placed(torch.randn(*ROWS, self.columns).to(self.dtype), self.place, side)
            for side in (0, 1)
        )
        if self.place != "plain":
            options["vocab_size"] = self.columns
        if self.gradient:
            options["gradient"] = self.gradient
            z.requires_grad_()
        loss = fastkd.distillation_loss(
            z, y, options.pop("labels", None), divergence=self.divergence, backend="triton",
            **options,
        )  # fmt: skip
        loss = loss[0] if labelled else loss
        if self.gradient:
            (3 * loss).backward()


def every() -> Iterator[Call]:
    for call in product(DIVERGENCES, COLUMNS, DTYPES, GRADIENTS, KINDS, PLACES):
        one = Call(*call)
        forward_in_half = one.dtype == torch.float16 and one.gradient == "forward"
        standardized_heads = one.divergence.name == "bernoulli" and one.kind == "std"
        unlabelled = one.divergence.label_aware and one.kind != "full"
        if not (forward_in_half or standardized_heads or unlabelled):  # which fastkd refuses
            yield one


def few() -> list[Call]:
    """Those that stand for all, and those that Triton 3.6 did not compile once."""
    calls = list(every())
    ten = [c for c in calls if c[1:] == (10, torch.float16, None, "full", "plain")]
    split = Call(fastkd.JSD(0.3), 16387, torch.bfloat16, "forward", "full", "plain")
    return [split, *calls[::IN_CI], *ten]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.ptx.scan", description=__doc__)
    parser.add_argument("--few", action="store_true", help="calls that stand for all")
    parser.add_argument("--only", default="", help="calls whose name holds this; a|b: any of them")
    parser.add_argument("--part", default="0/1", metavar="i/n", help="every nth, from the ith on")
    options = parser.parse_args(arguments)

    os.environ.pop("TRITON_INTERPRET", None)  # read when Triton is imported
    from .gpu import Argument, Gpu

    class Compiler(Gpu):
        def launch(
            self, compiled: object, arguments: Sequence[Argument], grid: Sequence[int]
        ) -> None:
            self.findings += scattered(compiled.asm["ttgir"])  # type: ignore[attr-defined]

    compiler = Compiler().install()
    wanted, (part, parts) = options.only.split("|"), map(int, options.part.split("/"))
    chosen = few() if options.few else every()
    results = {}
    for call in [c for c in chosen if any(word in c.name for word in wanted)][part::parts]:
        compiler.begin()
        try:
            call.run()
            wrong = list(compiler.findings)
        except Exception as found:
            error: BaseException = found
            while error.__cause__ is not None:
                error = error.__cause__
            wrong = [f"{type(error).__name__}: {error}"]
        results[call.name] = wrong
        if wrong:
            print(f"{call.name}: {wrong}", file=sys.stderr, flush=True)
    print(json.dumps(results))
    return 1 if any(results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
