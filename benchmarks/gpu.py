"""`--suite gpu`: steps on a machine with a GPU that is lent for minutes, the most valuable first.

Each step is a process of its own with a limit, and writes to a file itself, line by line: a kernel
that hangs or breaks the device costs a step its rest, and whoever is killed leaves every line
before.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from .machine import ROOT
from .report import is_ours, markdown, share_of_copy
from .results import BEGUN, FAILED, REFUSED, RESULTS, Results

# The time that is left but for the steps after it.
REST = float("inf")
# A step that has this much left is begun; a table ends by itself as long before it would be killed.
LEAST, GRACE = 5, 10
# Seconds to write what is known at the end, and for a process that is killed to be gone.
CLOSING, DYING = 5, 3
# A step that says nothing for so long hangs: no group of rows takes longer.
PATIENCE = 100
DEVICE_LOST = 3
SUMMARY, LOG, TEST_LOG, TABLE = "summary.txt", "suite.log", "tests.log", "table.md"
# Tests of these files run on the device; the others, which do not, would take its time.
ON_DEVICE = re.compile(
    r"^from tests\.(conftest import .*\bDEVICE\b|running import (?!NO_TRITON$))"
    r"|^def test_\w+\([^)]*\bdevice\b",
    re.MULTILINE,
)
# Where CUDA's tools are if not on the path, and parts of the names of the kernels that are checked.
TOOLKIT, CHECKED = "/usr/local/cuda/bin", ("resident", "sweep", "_scale")
VERDICT = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")


class Step(NamedTuple):
    """A process; its output goes to `log`."""

    name: str
    seconds: float  # at most
    command: Sequence[str]
    log: str = LOG
    again: bool = False  # takes --limit, and goes on after a process of it that died


class Ending(NamedTuple):
    """How a process ended: its exit code, negative where it was killed; None: not begun."""

    name: str
    code: int | None
    seconds: float

    def __str__(self) -> str:
        if self.code is None:
            return f"{self.name}: not begun, out of time"
        how = "killed at a limit" if self.code == -signal.SIGKILL else f"exit code {self.code}"
        return f"{self.name}: {how} after {self.seconds:.0f} s"


# --- the steps -----------------------------------------------------------------------------------


def steps(
    out: Path, options: Sequence[str], rehearsal: bool, lacking: Path | None = None
) -> list[Step]:
    """options: of each part of `--suite gpu`. lacking: a Triton cache without all kernels."""
    python = (sys.executable, "-u", "-m")
    part = (*python, "benchmarks", "--suite", "gpu", "--out", str(out), *options, "--step")
    small = ("--dry-run",) if rehearsal else ()
    found = [
        Step("versions", 40, (*part, "versions")),
        *(() if lacking is None else (_kernels(python, lacking),)),
        Step("verify", 50, (*python, "benchmarks.verify", *small)),
        Step("ceilings", 25, (*part, "ceilings")),
        Step("headline", 60, (*part, "headline"), again=True),
        Step("divergences", 45, (*part, "divergences"), again=True),
        Step("choices", 45, (*python, "benchmarks.choices", *small)),
        Step("tests", 150, _tests(rehearsal), TEST_LOG),
        Step("table", REST, (*part, "table"), again=True),
        Step("training", 30, (*python, "benchmarks.training", *small)),
        Step("racecheck", 25, _racecheck(python, small)),
    ]
    return [one._replace(seconds=4 * one.seconds) for one in found] if rehearsal else found


def _kernels(python: Sequence[str], cache: Path) -> Step:
    """By all processors at once, where the steps would compile one kernel after the other."""
    fill = (*python, "benchmarks.cache", str(cache), "--jobs", str(_spare()), "--limit", "30")
    return Step("kernels", 50, fill)


def _spare() -> int:
    """Processors, but for those that the suite itself takes."""
    return max(1, (os.cpu_count() or 2) - 2)


def tests_on_device() -> list[str]:
    """The files that have them, from the root of the checkout."""
    tests = sorted((ROOT / "tests").glob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in tests if ON_DEVICE.search(file.read_text())]


def _tests(rehearsal: bool) -> list[str]:
    """Verdicts come line by line, so that a kill costs only those to come; a rehearsal collects."""
    files = tests_on_device()
    command = [sys.executable, "-u", "-m", "pytest", "-v", "-rfE", "-p", "no:cacheprovider"]
    if rehearsal:
        return [*command, "--collect-only", files[0]]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(_spare()), "--dist", "worksteal"]
    if importlib.util.find_spec("pytest_timeout"):
        command += ["--timeout", "60"]
    return [*command, "--quick", *files]


def _racecheck(python: Sequence[str], small: Sequence[str]) -> tuple[str, ...]:
    """Without the tool the same cases run bare, which says nothing of races."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=TOOLKIT)
    ours = [word for name in CHECKED for word in ("--kernel-name", f"kns={name}")]
    checked = (tool, "--tool", "racecheck", "--error-exitcode", "1", *ours) if tool else ()
    return (*checked, *python, "benchmarks.verify", "--in-place", *small)


# --- running them --------------------------------------------------------------------------------


def run_all(out: Path, chosen: Sequence[Step], minutes: float, command: str) -> int:
    """0 if every step and test passed and no row of fastkd's was refused or failed, else 1."""
    deadline = time.monotonic() + 60 * minutes - CLOSING
    out.mkdir(parents=True, exist_ok=True)
    endings: list[Ending] = []
    for at, step in enumerate(chosen):
        later = sum(other.seconds for other in chosen[at + 1 :])
        left = deadline - time.monotonic()
        seconds = left - later if step.seconds == REST else min(step.seconds, left)
        for ending in _run(step, seconds, out):
            endings.append(ending)
            text, healthy = summary(endings, command, out)
            (out / SUMMARY).write_text(text)
    print(text, flush=True)
    return 0 if healthy else 1


def _run(step: Step, seconds: float, out: Path) -> Iterator[Ending]:
    """As many processes as it takes, if it goes on after one that died."""
    deadline, code = time.monotonic() + seconds, None
    while (left := deadline - time.monotonic()) > LEAST:
        limit = ("--resume", "--limit", f"{max(left - GRACE, LEAST):.0f}") if step.again else ()
        yield (ending := stream(step._replace(command=(*step.command, *limit)), left, out))
        code = ending.code
        if not step.again or code in (0, 1, 2):  # done, done with a finding, not understood
            return
    if code is None:
        yield Ending(step.name, None, 0.0)


def stream(step: Step, seconds: float, out: Path) -> Ending:
    """Runs a step, which writes to its log itself; what goes to the suite's is shown too."""
    path, began = out / step.log, time.monotonic()
    with path.open("ab") as log, path.open("rb") as said:
        log.write(f"=== {step.name}, at most {seconds:.0f} s\n".encode())
        log.flush()
        said.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            step.command, cwd=ROOT, start_new_session=True, stdout=log, stderr=subprocess.STDOUT
        )
        heard, code = began, None
        while code is None:
            time.sleep(0.05)
            code = process.poll()
            now = time.monotonic()
            if text := said.read():
                heard = now
                if step.log == LOG:
                    print(text.decode(errors="replace"), end="", flush=True)
            if code is None and (now - began > seconds or now - heard > PATIENCE):
                code = _kill(process)
    return Ending(step.name, code, time.monotonic() - began)


def _kill(process: subprocess.Popen[bytes]) -> int:
    """Its exit code, and that of all it began. Whoever hangs in the driver is left behind."""
    os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(DYING)
    return -signal.SIGKILL


# --- what is known so far ------------------------------------------------------------------------


def summary(endings: Sequence[Ending], command: str, out: Path) -> tuple[str, bool]:
    """As text, and whether all is well; the table is written along with it."""
    passed, lines = _verdicts(out / TEST_LOG)
    healthy = passed and all(ending.code == 0 for ending in endings)
    lines = ["", "--- summary ---", *map(str, endings), *lines]
    if not (out / RESULTS).exists():
        return "\n".join([*lines, "no results: see " + LOG, ""]), False
    results = Results.load(out / RESULTS)
    if results.header["command"] != command:
        results.header["command"] = command
        results.save(out / RESULTS)
    (out / TABLE).write_text(markdown(results))
    lines += [f"ceilings: {name} {value:.4g}" for name, value in results.ceilings.items()]
    lines += _highlights(results)
    count = Counter(row.status for row in results.rows)
    lines += ["rows: " + ", ".join(f"{number} {status}" for status, number in count.items())]
    bad_rows = [row for row in results.rows if row.status in (REFUSED, FAILED, BEGUN)]
    lines += [f"  {' '.join(row.key)}: {row.note}" for row in bad_rows]
    return "\n".join([*lines, ""]), healthy and not any(map(is_ours, bad_rows))


def _verdicts(log: Path) -> tuple[bool, list[str]]:
    """Of the tests, as far as they came: whether none failed, and what there is to say."""
    if not log.exists():
        return True, []
    said = [line for line in log.read_text(errors="replace").splitlines() if "::" in line]
    once = [line for line in said if not line.startswith(("FAILED", "ERROR"))]  # not pytest's list
    found = [(hit[0], line) for line in once if (hit := VERDICT.search(line))]
    count = Counter(verdict for verdict, _ in found)
    bad = [line for verdict, line in found if verdict in ("FAILED", "ERROR")]
    text = ", ".join(f"{number} {verdict.lower()}" for verdict, number in count.items())
    return not bad, [f"tests: {text or 'no verdicts'} ({log.name})", *(f"  {line}" for line in bad)]


def _highlights(results: Results) -> list[str]:
    """The best of fastkd and of the others in every full pass."""
    full = [row for row in results.rows if row.part == "full" and row.times]
    lines = []
    for group in dict.fromkeys(row.key.group for row in full):
        its = [row for row in full if row.key.group == group]
        ranked = sorted(its, key=lambda row: row.times.median if row.times else 0.0)
        best = [next((r for r in ranked if is_ours(r) is ours), None) for ours in (True, False)]
        texts = []
        for row in best:
            if row is not None and row.times is not None:
                share = share_of_copy(row, results.ceilings.get("copy_gb_s"))
                of_copy = "" if share is None else f" ({share:.0%} of copy)"
                texts.append(f"{row.provider} {row.times.median:.3g} ms{of_copy}")
        lines.append(f"{' '.join(group[:-1])}: {', '.join(texts)}")
    return lines
