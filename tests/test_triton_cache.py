"""A cache that was filled without a GPU serves whoever launches the same."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need triton")

from benchmarks import cache

ROOT = Path(__file__).parents[1]


SMALL = ("--only", "tvd fp32 4096x10 plain")


def filled(folder, *options, only=SMALL):
    """What a process says that makes the launches of one small case."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.cache", folder, *only, *options],
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


@pytest.mark.full
def test_tests_launch_on_the_stand_in_what_they_will_on_a_gpu(tmp_path):
    tests = ("--tests", "--only", "test_dim")
    said = filled(tmp_path, only=tests)
    assert (found := re.search(r"^([1-9]\d*) compiled, \d+ loaded, 0 failed$", said, re.M))
    assert f"0 compiled, {found[1]} loaded, 0 failed" in filled(tmp_path, only=tests)


def test_no_launch_begins_after_the_limit(tmp_path):
    said = filled(tmp_path, "--limit", "0")
    assert said.startswith("0 compiled, 0 loaded, 0 failed\n")
    assert json.loads((tmp_path / cache.ABOUT).read_text())["kernels"] == 0


def test_a_cache_of_another_triton_or_other_code_is_told_apart(tmp_path, monkeypatch):
    for name in ("TRITON_CACHE_DIR", "TRITON_DISABLE_LINE_INFO"):
        monkeypatch.setenv(name, "")

    def verdict(**changes):
        (tmp_path / cache.ABOUT).write_text(json.dumps({**about, **changes}))
        return cache.verdict()

    about = {**cache._about(), "kernels": 3}
    cache.enter(tmp_path / "new")
    serves, said = cache.verdict()
    assert not serves
    assert "none was carried" in said
    cache.enter(tmp_path)
    assert verdict() == (True, "Triton cache: built for this Triton and code, 3 kernels")
    serves, said = verdict(triton_key="another", triton="3.6.0", python="3.12.3")
    assert not serves
    assert "of no use, built for Triton 3.6.0 for Python 3.12.3, this is" in said
    serves, said = verdict(code="another")
    assert not serves
    assert "what has changed is compiled" in said


EVERY_LAUNCH = """
import re
from triton.runtime.jit import JITFunction
from benchmarks import cache, stub

stub.install()
launched = []
def run(self, *arguments, grid, warmup, **options):
    assert len(self.arg_names) <= 16, self
    assert options["enable_fp_fusion"] is True, self  # whose default changes with Triton 3.10
    launched.append(options)

JITFunction.run = run
for name, launch in cache.launches():
    before = len(launched)
    launch()
    assert len(launched) > before, name
    if cap := re.search(r", cap (\\d+)", name):  # of a choice
        assert launched[-1].get("maxnreg") == (int(cap[1]) or None), name
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
    heads, shared = ("linear", "topk"), ("cap 64", "shared 8")
    for word in ("verify jsd", "kl_div log_target", *shared, *heads, "ceilings", "training"):
        assert any(word in line for line in said), word


NEW_BATCHES = """
import torch
from triton.runtime.jit import JITFunction
import fastkd
from benchmarks import stub
from fastkd.kernels import tuning

stub.install()
keys = {}

def leaves(value, type_, about):
    if isinstance(type_, tuple):
        for parts in zip(value, type_, about, strict=True):
            yield from leaves(*parts)
    else:
        yield value, str((type_, about))

def run(self, *arguments, grid, warmup, **options):
    bound, found, _ = self.device_caches[0][4](*arguments, **options)
    numbers, others = [], [self.__name__]
    for one, value, (type_, about) in zip(self.params, bound.values(), found, strict=True):
        for leaf, what in leaves(value, type_, about):
            number = type(leaf) is int and not one.is_constexpr
            (numbers if number else others).append(what)
    keys.setdefault(tuple(others), set()).add(tuple(numbers))

JITFunction.run = run

def launch(z, y, **options):
    loss = fastkd.distillation_loss(z.requires_grad_(), y, backend="triton", **options)
    (3 * loss.mean()).backward()

for columns in (10, 5003, 40000):
    keys.clear()
    for batch in (1, 2, 4, 15, 16, 17, 33, 64, 300, 512):
        per_row = torch.full((batch, 3), 2.0)
        for z in (torch.empty(batch, 3, columns), torch.empty(batch, 4, columns)[:, :-1]):
            y = torch.empty(batch, 3, columns)
            launch(z, y, temperature=2.0)
            launch(z, y, temperature=per_row, gradient="backward", reduction="none")
            launch(z, y, temperature=per_row[..., :1].expand(batch, 3), standardize=True)
            launch(z, y, divergence=fastkd.Bernoulli(1, 1), reduction="none")
    several = {key: found for key, found in keys.items() if len(found) > 1}
    assert not several, several
    print(columns, len(keys))
"""


def test_a_new_batch_size_compiles_nothing_new():
    """Numbers that vary with it are neither 1 nor multiples of 16 where Triton looks."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", NEW_BATCHES],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 3
