"""The command line: `python -m benchmarks`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler otherwise reports each start

import torch

from . import cache, cases, gpu, host, machine, sharded
from .ceilings import all_ceilings, copy_bandwidth
from .operators import OPERATORS
from .publish import publish
from .report import comparison, is_ours, markdown
from .results import BEGUN, FAILED, REFUSED, RESULTS, Results, check_folder
from .run import DeviceLost, Settings, groups_of, run

FIXED = ("op", "divergence", "case", "dtype", "passes")
SUITES = {"cpu": cases.CPU, "gpu": cases.GPU}
STEPS = {"headline": cases.HEADLINE, "divergences": cases.DIVERGENCES, "table": cases.GPU}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, where argparse adds the usage."""
        self.exit(2, f"benchmarks: {message}\n")


def parser() -> Parser:
    top = Parser(prog="benchmarks", description="Benchmarks of fastkd and its peers.")
    what = top.add_argument_group("what to measure: all combinations of")
    what.add_argument("--op", choices=OPERATORS, help="default: logits")
    what.add_argument("--divergence", nargs="+", help="default: the operator's first")
    what.add_argument("--case", nargs="+", help="a name, or a shape such as 64x1000")
    what.add_argument("--dtype", nargs="+", choices=cases.DTYPES)
    what.add_argument(
        "--pass", dest="passes", nargs="+", choices=cases.PASSES, help="default: full"
    )
    what.add_argument(
        "--provider", nargs="+", metavar="NAME|MODULE:FUNCTION",
        help="with --suite: on logits, besides the suite's own",
    )  # fmt: skip
    what.add_argument(
        "--suite", choices=(*SUITES, "host", "sharded"), help="a fixed selection in their stead"
    )
    what.add_argument("--list", action="store_true", help="show the names, measure nothing")

    how = top.add_argument_group("how")
    how.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    how.add_argument("--threads", type=int, help="of the CPU")
    how.add_argument("--temperature", type=float, default=2.0)
    how.add_argument("--rounds", type=int, default=2, help="how often each provider is timed")
    how.add_argument("--seconds", type=float, default=0.5, help="per provider, pass and round")
    how.add_argument("--limit", type=float, default=float("inf"), help="seconds for everything")
    how.add_argument("--minutes", type=float, default=9.0, help="that --suite gpu takes at most")
    how.add_argument(
        "--triton-cache",
        type=Path,
        metavar="FOLDER",
        help="of benchmarks.cache: kernels for --suite gpu, which compiles what it lacks",
    )
    how.add_argument(
        "--step", choices=("versions", "ceilings", *STEPS), help="that part of --suite gpu alone"
    )
    how.add_argument("--dry-run", action="store_true", help="tiny shapes: rehearse, do not measure")

    files = top.add_argument_group("files")
    files.add_argument("--out", type=Path, metavar="FOLDER", help="results.json, table.md, plots")
    files.add_argument("--resume", action="store_true", help="keep the rows that --out has")
    files.add_argument("--load", type=Path, metavar="JSON", help="report it, measure nothing")
    files.add_argument("--compare", type=Path, metavar="JSON", help="print what changed since")
    files.add_argument("--commit", help="of fastkd, where git cannot tell")
    return top


def main(arguments: Sequence[str]) -> int:
    top = parser()
    options = top.parse_args(arguments)
    if options.list:
        print(_names())
        return 0
    try:
        return _run(options, arguments)
    except ValueError as error:
        top.error(str(error))


def _run(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    old = Results.load(options.compare) if options.compare else None
    if options.out and not options.step:
        check_folder(options.out, ours=options.resume or bool(options.load))
    if options.load:
        return _report(Results.load(options.load), old, options.out)
    if options.suite == "host":
        return host.run(options.out, options.commit)
    began = time.monotonic()
    if options.suite == "sharded":
        header = machine.header(torch.device("cpu"), arguments, options.commit)
        return sharded.run(max(options.rounds, 5), options.dry_run, header, options.out)
    device = machine.device_of(options.device or ("cpu" if options.dry_run else None))
    if options.step == "versions":
        return machine.announce(device, arguments, options.commit)
    groups = groups_of(_selections(options, device))
    if options.suite == "gpu" and options.step is None:
        return _run_gpu(options, device, machine.command(arguments))
    if device.type != "cuda" and any("replay" in group.parts for group in groups):
        raise ValueError("pass replay needs a CUDA device")
    if options.threads:
        torch.set_num_threads(options.threads)

    path = options.out / RESULTS if options.out else None
    results = _begin(options, arguments, device, path)
    if options.step == "ceilings":
        print(", ".join(f"{name} {value:.4g}" for name, value in results.ceilings.items()))
        return 0
    settings = Settings(
        device, options.temperature, options.rounds, options.seconds, began + options.limit
    )
    try:
        run(groups, settings, results, path)
    except DeviceLost as error:
        print(f"benchmarks: the device is lost to this process: {error}", file=sys.stderr)
        return gpu.DEVICE_LOST
    results.header["after"] = machine.clocks(device)
    if path:
        results.save(path)
    return _report(results, old, None if options.step else options.out)


def _selections(options: argparse.Namespace, device: torch.device) -> list[cases.Selection]:
    if options.suite != "gpu" and (options.dry_run or options.step):
        raise ValueError("--dry-run and --step go with --suite gpu")
    if options.suite:
        if given := [name for name in FIXED if getattr(options, name)]:
            raise ValueError(f"--suite fixes the {given[0]}: leave it out")
        suite = STEPS.get(options.step, SUITES[options.suite])
        suite = cases.REHEARSAL if options.dry_run else suite
        added = tuple(options.provider or ())
        return [
            line._replace(providers=(*line.providers, *added))
            if line.operator == "logits"
            else line
            for line in suite
        ]
    cuda = device.type == "cuda"
    operator = OPERATORS[options.op or "logits"]
    return [
        cases.Selection(
            operator.name,
            tuple(options.divergence or operator.divergences[:1]),
            tuple(options.case or ["llama3-8192" if cuda else "llama2-256"]),
            tuple(options.dtype or ["bf16" if cuda else "fp32"]),
            tuple(options.passes or ["full"]),
            tuple(options.provider or cases.CPU_PROVIDERS),
        )
    ]


def _run_gpu(options: argparse.Namespace, device: torch.device, command: str) -> int:
    if device.type != "cuda" and not options.dry_run:
        raise ValueError("--suite gpu needs a CUDA device; --dry-run rehearses it without one")
    if options.out is None:
        raise ValueError("--suite gpu needs --out FOLDER")
    passed_on = ["--device", str(device), "--seconds", "0" if options.dry_run else "0.2"]
    for name in ("provider", "commit"):
        if value := getattr(options, name):
            passed_on += [f"--{name}", *([value] if isinstance(value, str) else value)]
    if options.dry_run:  # of Triton in its interpreter, and of torch.compile without compiling
        passed_on += ["--dry-run", "--threads", "1", "--rounds", "1"]
        os.environ.update(TRITON_INTERPRET="1", TORCHDYNAMO_DISABLE="1")
    lacking = None
    if options.triton_cache:
        cache.enter(options.triton_cache)
        lacking = None if cache.verdict()[0] else options.triton_cache.resolve()
    out = options.out.resolve()
    chosen = gpu.steps(out, passed_on, options.dry_run, lacking)
    return gpu.run_all(out, chosen, options.minutes, command)


def _begin(
    options: argparse.Namespace, arguments: Sequence[str], device: torch.device, path: Path | None
) -> Results:
    """New results, or those to go on with, and the ceilings that they need."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
    if path and options.resume and path.exists():
        results = Results.load(path)
    else:
        results = Results(machine.header(device, arguments, options.commit))
        results.header["rehearsal"] = options.dry_run
    small = options.dry_run
    if options.step == "ceilings":
        results.ceilings = all_ceilings(device, small)
    elif "copy_gb_s" not in results.ceilings:
        results.ceilings["copy_gb_s"] = copy_bandwidth(device, small)
    if path:
        results.save(path)
    return results


def _report(results: Results, old: Results | None, out: Path | None) -> int:
    """1 where fastkd itself was refused or failed, else 0."""
    print("\n" + markdown(results))
    if out:
        print("\n".join(publish(results, out)))
    if old:
        print(comparison(old, results))
    bad = (REFUSED, FAILED, BEGUN)
    return int(any(is_ours(row) and row.status in bad for row in results.rows))


def _names() -> str:
    lines = [f"cases: {', '.join(cases.CASES)}, or NxV", f"dtypes: {', '.join(cases.DTYPES)}"]
    for name, operator in OPERATORS.items():
        lines += [f"{name}:", f"  divergences: {', '.join(operator.divergences)}"]
        lines += [f"  providers: {', '.join(operator.providers)}"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
