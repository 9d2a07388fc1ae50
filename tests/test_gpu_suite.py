"""`--suite gpu` without a GPU: its steps by scripts in their place, its clock by a stand-in."""

from __future__ import annotations

import contextlib
import multiprocessing
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import cache, choices, gpu, machine, measure, verify
from benchmarks.check import Refused
from benchmarks.operators import OPERATORS
from benchmarks.results import ABSENT, OK, Results

ROOT = Path(__file__).parent.parent


# --- the clock of a GPU, by a stand-in for torch.cuda ---------------------------------------------


@pytest.fixture
def cuda(monkeypatch):
    """What was asked of the device, in order; each call takes it 2 ms."""
    asked = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            asked.append("event")

        def elapsed_time(self, other):
            return 2.0

    class Stream:
        def wait_stream(self, other):
            asked.append("wait")

    class Graph:
        def replay(self):
            asked.append("replay")

    fakes = {
        "Event": Event, "Stream": Stream, "CUDAGraph": Graph, "current_stream": Stream,
        "stream": contextlib.nullcontext, "graph": contextlib.nullcontext,
        "synchronize": lambda: asked.append("synchronize"),
        "_sleep": lambda clocks: asked.append(f"sleep {clocks}"),
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=1 << 20),
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return asked


def test_a_device_sleeps_before_the_first_event_while_the_host_queues_the_call(cuda):
    clock = measure.EventClock(torch.device("cpu"))
    clock.start()
    cuda.append("call")
    clock.stop()
    assert cuda == [f"sleep {measure.ASLEEP}", "event", "call", "event"]
    assert clock.times() == [2.0]
    assert cuda[-1] == "synchronize"


@pytest.mark.parametrize("late", [0.0, 0.02])
def test_work_on_another_stream_is_seen(cuda, late):
    contender = SimpleNamespace(prepare=lambda part: None, answer=lambda *_: time.sleep(late))
    refused = pytest.raises(Refused, match="worked on for") if late else contextlib.nullcontext()
    with refused:
        measure.refuse_other_streams(contender, "full")


def test_a_replay_calls_nobody(cuda):
    calls = []
    contender = SimpleNamespace(name="x", problem=None, answer=lambda part: calls.append(part) or 7)
    replayed = measure.Replayed(contender)
    captured = len(calls)
    assert replayed.answer("replay", replayed.prepare("replay")) == 7
    assert (cuda[-1], len(calls)) == ("replay", captured)


# --- the GPU suite's steps, by scripts in their place --------------------------------------------

# Says rows, and tells a witness of each that it has said.
ROWS = """
import sys, time
for row in range(int(sys.argv[2])):
    print(f"row {sys.argv[1]}.{row}")
    with open(sys.argv[3], "a") as file:
        file.write(f"row {sys.argv[1]}.{row}\\n")
    time.sleep(float(sys.argv[4]))
"""


def step(name, source, *arguments, seconds=60.0, **more):
    command = (sys.executable, "-S", "-u", "-c", source, *map(str, arguments))
    return gpu.Step(name, seconds, command, **more)


@pytest.fixture
def hurried(monkeypatch):
    """Steps of a second and less."""
    for name, value in {"LEAST": 0.05, "GRACE": 0.1, "CLOSING": 0.0}.items():
        monkeypatch.setattr(gpu, name, value)


def test_a_kill_at_each_tenth_of_the_budget_leaves_every_row_before(tmp_path, hurried):
    budget, steps = 2.0, 10
    began = []
    for tenth in range(1, 11):
        out = tmp_path / str(tenth)
        out.mkdir()
        chosen = [step(f"s{i}", ROWS, i, 4, out / "witness", 0.02) for i in range(steps)]
        suite = multiprocessing.get_context("fork").Process(
            target=gpu.run_all, args=(out, chosen, budget / 60, "")
        )
        suite.start()
        began.append((time.monotonic(), tenth, suite, out))
    for start, tenth, suite, _ in began:
        suite.join(max(0.0, start + budget * tenth / 10 - time.monotonic()))
        suite.kill()
    rows = []
    for _, _, suite, out in began:
        suite.join()
        witness = out / "witness"
        seen = witness.read_text().splitlines() if witness.exists() else []
        log = (out / gpu.LOG).read_text().splitlines() if seen else []
        assert set(seen) <= set(log)
        rows.append(len(seen))
    assert rows[-1] > rows[0], rows


def test_the_suite_never_runs_over_and_says_what_it_left_out(tmp_path, hurried, capsys):
    """A step that hangs is killed at its own limit, the flexible one leaves time to those after."""
    asleep = "import time; print('begun'); time.sleep(60)"
    chosen = [
        step("quick", "print('done')"),
        step("hangs", asleep, seconds=0.4),
        step("table", asleep, seconds=gpu.REST, again=True),
        step("last", "print('ended')", seconds=0.5),
        step("late", asleep),
        step("too late", "print('never')"),
    ]
    began = time.monotonic()
    assert gpu.run_all(tmp_path, chosen[:4], 2.5 / 60, "") == 1
    assert time.monotonic() - began < 3
    text = (tmp_path / gpu.SUMMARY).read_text()
    assert "quick: exit code 0" in text
    assert "hangs: killed at a limit" in text
    assert "table: killed at a limit" in text
    assert "last: exit code 0" in text
    assert gpu.run_all(tmp_path, chosen[4:], 0.6 / 60, "") == 1
    text = (tmp_path / gpu.SUMMARY).read_text()
    assert "late: killed at a limit" in text
    assert "too late: not begun, out of time" in text
    said = (tmp_path / gpu.LOG).read_text()
    assert said.count("begun") == 3
    assert "ended" in said
    assert "never" not in said
    assert "begun" in capsys.readouterr().out


def test_a_table_goes_on_after_a_process_that_died(tmp_path, hurried):
    """And takes --resume and --limit each time, until one ends by itself."""
    dies = f"""
import os, sys
tries = sum(1 for _ in open({str(tmp_path / gpu.LOG)!r}) if _.startswith("try"))
print("try", *sys.argv[1:])
os._exit([134, 3, 1][tries])
"""
    gpu.run_all(tmp_path, [step("table", dies, again=True)], 20 / 60, "")
    said = [x for x in (tmp_path / gpu.LOG).read_text().splitlines() if x.startswith("try")]
    assert len(said) == 3
    assert all(line.startswith("try --resume --limit ") for line in said)


def test_a_silent_step_is_killed(tmp_path, hurried, monkeypatch):
    monkeypatch.setattr(gpu, "PATIENCE", 0.3)
    ending = gpu.stream(step("mute", "import time; time.sleep(60)"), 30, tmp_path)
    assert str(ending).startswith("mute: killed at a limit after 0")


def test_whoever_hangs_in_the_driver_is_left_behind(tmp_path, monkeypatch):
    """Where not even the signal that nobody can refuse ends a process."""
    monkeypatch.setattr(gpu.os, "killpg", lambda *_: None)
    monkeypatch.setattr(gpu, "DYING", 0.1)
    began = time.monotonic()
    ending = gpu.stream(step("hangs", "import time; time.sleep(5)"), 0.2, tmp_path)
    assert time.monotonic() - began < 3
    assert str(ending).startswith("hangs: killed at a limit after 0")


# --- devices that break ---------------------------------------------------------------------------


@pytest.fixture
def broken(monkeypatch):
    """A device that answers nobody; what a new process was asked for."""
    asked = []

    def begin_again(module, arguments):
        asked.append((module, arguments))
        raise SystemExit

    monkeypatch.setattr(machine, "answers", lambda device: False)
    monkeypatch.setattr(machine, "begin_again", begin_again)
    return asked


def test_after_a_case_that_breaks_the_device_a_new_process_verifies_the_others(
    broken, monkeypatch, capsys
):
    monkeypatch.setattr(verify, "faults", lambda case, device: ["lost"] * (case.columns == 300))
    with pytest.raises(SystemExit):
        verify.main(["--dry-run"])
    assert broken == [("benchmarks.verify", ["--dry-run", "--first", "2"])]
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == ["ok", "WRONG"]
    assert verify.main(broken[0][1]) == 1
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == ["ok", "ok"]


def test_after_a_choice_that_breaks_the_device_a_new_process_goes_on(broken, monkeypatch, capsys):
    def call(*_):
        raise RuntimeError("lost")

    monkeypatch.setattr(choices, "call", call)
    with pytest.raises(SystemExit):
        choices.main(["--dry-run"])
    assert broken == [("benchmarks.choices", ["--dry-run", "--first", "1"])]
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_process_begins_again_as_another(tmp_path):
    source = "import sys; from benchmarks import machine; machine.begin_again('this', sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", source, "one", "two"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, "The Zen of Python" in done.stdout) == (0, True)


def test_programs_that_wait_for_each_other_come_last():
    waits = [any(one.shared for one in choices_) for *_, choices_ in choices.races(False)]
    assert waits == sorted(waits)
    assert set(waits) == {False, True}
    for *_, some in choices.races(False):
        assert some[0] == choices.Choice()


def test_choices_are_judged_by_the_first_that_runs(monkeypatch, capsys):
    losses = iter([RuntimeError("too large"), 2.0, 2.1, 2.0])

    def call(*_):
        if isinstance(loss := next(losses), Exception):
            raise loss
        return torch.tensor(loss)

    monkeypatch.setattr(choices, "call", call)
    monkeypatch.setattr(choices, "milliseconds", lambda *_: 3.0)
    choices.race("jsd", "1x2", choices.CHOICES[:4], torch.device("cpu"))
    said = capsys.readouterr().out.splitlines()
    for word, line in zip(("too large", "3 ms, x 1.000", "WRONG", "3 ms"), said, strict=True):
        assert word in line


@pytest.mark.parametrize(
    ("said", "known"),
    [("580.159.04, 1980 MHz, 3201 MHz, 1980 MHz, 31, 120.00 W", 6), ("No devices were found", 0)],
)
def test_a_device_of_which_nothing_tells_has_no_clocks(monkeypatch, said, known):
    monkeypatch.setattr(machine, "_output", lambda command: said)
    assert len(machine.clocks(torch.device("cuda"))) == known


def test_races_are_looked_for_in_the_kernels_alone(tmp_path, monkeypatch):
    """By a tool that is not on the path either; a finding of it is an exit code."""
    tool = tmp_path / "compute-sanitizer"
    tool.touch(0o755)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(gpu, "TOOLKIT", str(tmp_path))
    *_, last = gpu.steps(tmp_path, [], False)
    assert last.command[:5] == (str(tool), "--tool", "racecheck", "--error-exitcode", "1")
    assert "kns=resident" in last.command


def test_the_device_runs_the_tests_that_use_it(tmp_path):
    (tests,) = (step for step in gpu.steps(tmp_path, [], False) if step.name == "tests")
    assert {"tests/test_kernels.py", "tests/test_logits.py", "tests/test_nan.py"} < {*tests.command}
    others = {"tests/test_readme.py", "tests/test_distill.py", "tests/test_a_new_divergence.py"}
    assert not others & {*tests.command}


def test_what_a_cache_lacks_is_compiled_before_it_is_needed(tmp_path):
    """By as many processes as there are processors, for less time than the step has."""
    without = gpu.steps(tmp_path, [], False)
    (step,) = (one for one in gpu.steps(tmp_path, [], False, tmp_path) if one not in without)
    assert gpu.steps(tmp_path, [], False, tmp_path)[1] == step
    options = cache.parser().parse_args(step.command[step.command.index("benchmarks.cache") + 1 :])
    assert options.folder == tmp_path
    assert options.limit < step.seconds - 10


def test_verdicts_of_tests_count_as_far_as_they_came(tmp_path):
    (tmp_path / gpu.TEST_LOG).write_text(
        "[gw1] [  1%] PASSED tests/test_a.py::test_one \n"
        "tests/test_a.py::test_two FAILED    [ 2%]\n"
        "FAILED tests/test_a.py::test_two - assert 0\n"
        "tests/test_a.py::test_three "
    )
    passed, lines = gpu._verdicts(tmp_path / gpu.TEST_LOG)
    assert not passed
    assert lines[0] == "tests: 1 passed, 1 failed (tests.log)"
    assert lines[1:] == ["  tests/test_a.py::test_two FAILED    [ 2%]"]


@pytest.mark.slow
def test_the_gpu_suite_rehearsed(tmp_path):
    """Every line that needs no GPU."""
    command = [sys.executable, "-m", "benchmarks", "--suite", "gpu", "--dry-run"]
    command += ["--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    results = Results.load(tmp_path / "results.json")
    statuses = {row.status for row in results.rows if row.provider.startswith("fastkd")}
    assert statuses == {OK}
    assert {row.operator for row in results.rows} == set(OPERATORS)
    assert {row.status for row in results.rows if row.provider == "orda"} == {ABSENT}
    assert "copy_gb_s" in results.ceilings
    assert results.header["command"].startswith("python -m benchmarks --suite gpu --dry-run")
    assert (tmp_path / "summary.txt").read_text() in done.stdout
    assert "A rehearsal" in (tmp_path / "table.md").read_text()
    said = (tmp_path / "suite.log").read_text()
    names = [step.name for step in gpu.steps(tmp_path, [], True)]
    assert [name for name in names if f"=== {name}," in said] == names[:6] + names[7:]
    assert said.count("ok    ") >= 5
    assert "x 1.000" in said
    assert "a step, peak" in said
    assert "test_" in (tmp_path / "tests.log").read_text()
    assert len(list(tmp_path.iterdir())) <= 8
