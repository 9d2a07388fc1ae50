"""`--suite gpu`: ceilings, the whole test suite, the table; each guarded, each saved as it comes.

Each runs in processes of its own, so that a kernel that hangs or breaks the device costs a test
file or a group of rows, and the rest goes on.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TextIO

from .machine import ROOT
from .publish import publish
from .report import is_ours, share_of_copy
from .results import BEGUN, FAILED, REFUSED, RESULTS, Results

# Seconds: 8 minutes and 40 seconds in all.
CEILINGS, TESTS, TABLE = 50, 210, 260
# The table's process ends by itself this long before it would be killed, and is not begun anew
# with less than this left.
GRACE = 15
# A process that says nothing for so long hangs: no group of rows takes longer.
PATIENCE = 120
DEVICE_LOST = 3
SUMMARY, LOG, TEST_LOG = "summary.txt", "suite.log", "tests.log"
NO_TESTS = 5  # pytest's exit code


class Ending(NamedTuple):
    """How a process ended: its exit code, negative where it was killed."""

    name: str
    code: int
    seconds: float

    def __str__(self) -> str:
        how = "killed at a limit" if self.code == -signal.SIGKILL else f"exit code {self.code}"
        return f"{self.name}: {how} after {self.seconds:.0f} s"


def run_all(out: Path, options: Sequence[str], command: str, rehearsal: bool) -> int:
    """0 if all tests passed and no row of fastkd's was refused or failed, else 1."""
    out.mkdir(parents=True, exist_ok=True)
    if rehearsal:  # of Triton in its interpreter, and of torch.compile without compiling
        os.environ.update(TRITON_INTERPRET="1", TORCHDYNAMO_DISABLE="1")
    common = ["-m", "benchmarks", "--suite", "gpu", "--out", str(out), *options]
    with (out / LOG).open("w") as log:
        endings = [_stream("ceilings", [*common, "--step", "ceilings"], CEILINGS, log)]
        tests = run_tests(out / TEST_LOG, rehearsal)
        endings += _table(common, log)
    text, healthy = _summary(endings, tests, command, out)
    (out / SUMMARY).write_text(text)
    print(text, flush=True)
    return 0 if healthy else 1


def _table(common: Sequence[str], log: TextIO) -> list[Ending]:
    """As many processes as it takes: one that dies is followed by one that goes on after it."""
    deadline, endings = time.monotonic() + TABLE, list[Ending]()
    while (left := deadline - time.monotonic()) > 2 * GRACE:
        command = [*common, "--step", "table", "--resume", "--limit", f"{left - GRACE:.0f}"]
        endings.append(_stream("table", command, left, log))
        if endings[-1].code in (0, 1, 2):  # done, done with a finding, not understood
            break
    return endings


def _stream(name: str, arguments: Sequence[str], seconds: float, log: TextIO) -> Ending:
    """Runs Python on the arguments; what it says goes to the terminal and the log."""
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    heard = began

    def guard() -> None:
        while process.poll() is None:
            now = time.monotonic()
            if now - began > seconds or now - heard > PATIENCE:
                os.killpg(process.pid, signal.SIGKILL)
            time.sleep(0.5)

    threading.Thread(target=guard, daemon=True).start()
    assert process.stdout is not None
    for line in process.stdout:
        heard = time.monotonic()
        print(line, end="", file=log, flush=True)
        print(line, end="", flush=True)
    return Ending(name, process.wait(), time.monotonic() - began)


# --- the tests -----------------------------------------------------------------------------------


def run_tests(log: Path, rehearsal: bool) -> list[Ending]:
    """A process per test file, the largest files first; a rehearsal only collects one of them."""
    files = sorted((ROOT / "tests").glob("test_*.py"), key=lambda file: -file.stat().st_size)
    names = [str(file.relative_to(ROOT)) for file in files] + ["fastkd"]
    command = [sys.executable, "-m", "pytest", "-q", "-rfEs", "-p", "no:cacheprovider"]
    if rehearsal:
        names, command = names[-2:-1], [*command, "--collect-only"]
    deadline, lock = time.monotonic() + TESTS, threading.Lock()

    def run_one(name: str) -> Ending:
        began = time.monotonic()
        ending, text = _pytest([*command, name], max(1.0, deadline - began))
        with lock, log.open("a") as file:
            file.write(f"=== {name}\n{text}\n")
        return Ending(name, ending, time.monotonic() - began)

    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
        return list(pool.map(run_one, names))


def _pytest(command: Sequence[str], seconds: float) -> tuple[int, str]:
    process = subprocess.Popen(
        command, cwd=ROOT, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        text, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        text, _ = process.communicate()
    return process.returncode, text


# --- the end -------------------------------------------------------------------------------------


def _summary(
    endings: Sequence[Ending], tests: Sequence[Ending], command: str, out: Path
) -> tuple[str, bool]:
    bad_tests = [test for test in tests if test.code not in (0, NO_TESTS)]
    lines = ["", "--- summary ---", *map(str, endings)]
    lines += [f"tests: {len(tests) - len(bad_tests)} of {len(tests)} files passed ({TEST_LOG})"]
    lines += [f"  FAILED {test}" for test in bad_tests]
    if not (out / RESULTS).exists():
        return "\n".join([*lines, "no results: see " + LOG]), False
    results = Results.load(out / RESULTS)
    results.header["command"] = command
    results.save(out / RESULTS)
    lines += [f"ceilings: {name} {value:.4g}" for name, value in results.ceilings.items()]
    lines += _highlights(results)
    count = Counter(row.status for row in results.rows)
    lines += ["rows: " + ", ".join(f"{number} {status}" for status, number in count.items())]
    bad_rows = [row for row in results.rows if row.status in (REFUSED, FAILED, BEGUN)]
    lines += [f"  {' '.join(row.key)}: {row.note}" for row in bad_rows]
    lines += publish(results, out)
    healthy = not bad_tests and not any(map(is_ours, bad_rows)) and endings[-1].code in (0, 1)
    return "\n".join(lines), healthy


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
