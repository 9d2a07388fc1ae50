"""`fastkd doctor` and the command line around it."""

import os
import re
import subprocess
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from fastkd import __main__, doctor

ROOT = Path(__file__).parents[1]


def run_doctor(**environment):
    return subprocess.run(
        [sys.executable, "-m", "fastkd", "doctor"],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_every_path_of_this_machine_is_checked():
    done = run_doctor(TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stdout + done.stderr
    for device in ("cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))):
        assert done.stdout.count(f"\nok        {device} ") == (3 if device == "cpu" else 5)
    assert version("torch") in done.stdout


@pytest.mark.slow
def test_the_interpreter_lets_the_cpu_run_the_kernels():
    pytest.importorskip("triton")
    done = run_doctor(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\nok        cpu       triton, ") == 2


def test_without_triton_it_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_paths", lambda device: ())
    monkeypatch.setattr(doctor.checks, "HAS_TRITON", False)
    monkeypatch.setattr(doctor.platform, "system", lambda: "Linux")
    assert doctor.run() == 1
    assert 'FAIL      Triton is not installed: pip install "triton>=3.6"' in capsys.readouterr().out


def test_a_gpu_that_pytorch_cannot_use_is_a_fault(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_paths", lambda device: ())
    monkeypatch.setattr(doctor, "_driver", lambda: "NVIDIA 580")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert doctor.run() == 1
    assert "install a GPU build" in capsys.readouterr().out


def wrong_value(student, teacher):
    return 1.001 * doctor._distil("reference", "auto", student, teacher)


def wrong_gradient(student, teacher):
    right = doctor._distil("reference", "auto", student, teacher)
    return right + 0.001 * (student - student.detach()).sum()


def no_compiler(student, teacher):
    raise RuntimeError("no C compiler")


@pytest.mark.parametrize("fault", [wrong_value, wrong_gradient, no_compiler])
def test_a_path_at_fault_fails(fault, monkeypatch, capsys):
    paths = (("sound", partial(doctor._distil, "reference", "auto")), ("faulty", fault))
    monkeypatch.setattr(doctor, "_devices", lambda: [torch.device("cpu")])
    monkeypatch.setattr(doctor, "_paths", lambda device: paths)
    assert __main__.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert re.search("^ok .* sound ", out, re.MULTILINE)
    assert re.search("^FAIL .* faulty ", out, re.MULTILINE)
    assert ("no C compiler" in out) == (fault is no_compiler)
    assert "What to do: " in out


@pytest.mark.parametrize("command", ["doctor", "distill"])
def test_ctrl_c_is_one_line(command, tmp_path, monkeypatch, capsys):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "run", stop)
    monkeypatch.setattr("fastkd.distill.cli._start", stop)
    given = ["--out", str(tmp_path / "out")] if command == "distill" else []
    assert __main__.main([command, *given]) == 130
    assert capsys.readouterr().err == f"fastkd {command}: stopped\n"


def test_a_wrong_command_prints_the_usage(capsys):
    with pytest.raises(SystemExit) as ended:
        __main__.main(["nurse"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("usage: fastkd")


def test_no_command_prints_the_help(capsys):
    assert __main__.main([]) == 0
    assert "doctor" in capsys.readouterr().out


@pytest.mark.parametrize("words", ["few", "many " * 10_000])
def test_a_reader_that_goes_ends_a_command_in_silence(monkeypatch, capfd, words):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setattr(doctor, "run", lambda: stdout.write(words) and 0)
        assert __main__.main(["doctor"]) == 141
    assert capfd.readouterr().err == ""
