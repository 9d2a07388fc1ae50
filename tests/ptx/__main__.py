"""Executes the compiled kernels without a GPU: `python -m tests.ptx`, from the root of a checkout.

A line for what is wrong, and a verdict as the last one; the exit code is 1 where anything is.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.ptx", description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name holds this; a|b: any of them")
    parser.add_argument("--few", action="store_true", help="those that stand for all")
    parser.add_argument("--faults", action="store_true", help="those put in on purpose instead")
    parser.add_argument("--part", default="0/1", metavar="i/n", help="every nth, from the ith on")
    parser.add_argument("--ulp", type=int, default=0, help="approximate results are so far off")
    parser.add_argument("--seed", type=int, default=0, help="of the orders of warps and programs")
    parser.add_argument("--list", action="store_true", help="the names alone")
    parser.add_argument("--json", action="store_true", help="{name: [what is wrong]}, at the end")
    options = parser.parse_args(arguments)

    os.environ.pop("TRITON_INTERPRET", None)  # read when Triton is imported
    os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")
    from . import cases, faults, gpu

    wanted, (part, parts) = options.only.split("|"), map(int, options.part.split("/"))
    listed = faults.FAULTS if options.faults else cases.few() if options.few else cases.every()
    chosen = [one for one in listed if any(word in one.name for word in wanted)][part::parts]
    if options.list:
        print(*(one.name for one in chosen), sep="\n")
        return 0

    machine = gpu.Gpu(options.ulp, options.seed).install()
    results: dict[str, list[str]] = {}
    began = time.monotonic()
    for one in chosen:
        machine.begin()
        try:
            if isinstance(one, faults.Fault):
                found = one.found(machine)
                caught = any(word in text for text in found for word in one.expected)
                wrong = [] if caught else [f"{one.expected} was expected, found {found}"]
            else:
                wrong = [*one.run(), *machine.findings]
        except Exception:
            wrong = [traceback.format_exc()]
        results[one.name] = wrong
        for text in wrong:
            print(f"{one.name}: {text}", file=sys.stderr, flush=True)
    bad = sum(map(bool, results.values()))
    for kernel in dict.fromkeys(one.name for one in machine.kernels.values()):
        hits = [one.hits() for one in machine.kernels.values() if one.name == kernel]
        share = sum(int(h.sum()) for h in hits) / sum(map(len, hits))
        print(f"{kernel}: {share:.1%} of the instructions executed", file=sys.stderr)
    verdict = f"{bad} of {len(results)} failed, {machine.steps / 1e6:.0f} M instructions of warps"
    print(f"{verdict}, {time.monotonic() - began:.0f} s", file=sys.stderr)
    if options.json:
        print(json.dumps(results))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
