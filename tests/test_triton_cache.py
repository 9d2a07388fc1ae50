"""A cache that was filled without a GPU serves whoever launches the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need triton")

from benchmarks import cache

ROOT = Path(__file__).parents[1]


def filled(folder):
    """What a process says that makes the launches of one small case."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.cache", folder, "--only", "tvd fp32 4096x10 plain"],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


def test_a_second_process_compiles_nothing_though_the_cache_has_moved(tmp_path):
    first, second = tmp_path / "here", tmp_path / "there"
    assert "\n4 compiled, 0 loaded, 0 failed\n" in filled(first)
    kept = {file.suffix for file in first.glob("*/*") if not file.name.startswith("__grp__")}
    assert {".cubin", ".json"} <= kept <= set(cache.KEPT)
    assert json.loads((first / cache.ABOUT).read_text())["kernels"] == 4
    first.rename(second)
    assert "\n0 compiled, 4 loaded, 0 failed\n" in filled(second)


def test_a_cache_of_another_triton_is_told_apart(tmp_path, monkeypatch):
    for name in ("TRITON_CACHE_DIR", "TRITON_DISABLE_LINE_INFO"):
        monkeypatch.setenv(name, "")
    assert "none was carried" in cache.verdict()
    with pytest.raises(ValueError, match="it has no about"):
        cache.enter(tmp_path)
    about = {**cache._about(), "kernels": 3}
    (tmp_path / cache.ABOUT).write_text(json.dumps(about))
    cache.enter(tmp_path)
    assert cache.verdict() == "Triton cache: built for this Triton, 3 kernels"
    about |= {"triton_key": "another", "triton": "3.6.0", "python": "3.12.3"}
    (tmp_path / cache.ABOUT).write_text(json.dumps(about))
    assert "of no use, built for Triton 3.6.0 for Python 3.12.3, this is" in cache.verdict()


EVERY_LAUNCH = """
from triton.runtime.jit import JITFunction
from benchmarks import cache, stub

stub.install()
launched = []
JITFunction.run = lambda self, *arguments, grid, warmup, **options: launched.append(self)
for name, launch in cache.launches():
    before = len(launched)
    launch()
    assert len(launched) > before, name
    print(name)
"""


def test_every_launch_of_the_suite_is_made_without_a_gpu():
    """What compiles it is left out: a renamed launcher or an operand of another form shows here."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", EVERY_LAUNCH],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-300:] + done.stderr[-3000:]
    said = done.stdout.splitlines()
    assert len(set(said)) > 200
    for word in ("verify jsd", "kl_div log_target", "cap 64", "ceilings", "training"):
        assert any(word in line for line in said), word
