"""The kernels as compiled for sm_90, executed: see tests/ptx/. In a process of its own, as the
interpreter, which the other tests use, replaces triton.jit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need triton")

from benchmarks.layouts import scattered
from tests.ptx import cases, faults, machine

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
pytestmark = pytest.mark.skipif(machine.missing() is not None, reason=str(machine.missing()))
FEW = [case.name for case in cases.few()]
NAMES = [
    pytest.param(case.name, marks=[] if case.name in FEW else pytest.mark.full)
    for case in cases.every()
]


def _results(*options: str) -> dict[str, list[str]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.ptx", "--json", *options],
        env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout, done.stderr[-5000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def executed(request):
    """{case: what is wrong}."""
    return _results(*([] if request.config.getoption("--full") else ["--few"]))


@pytest.fixture(scope="module")
def noticed():
    """{fault: [] where it was reported}."""
    return _results("--faults")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_compiled_kernels_compute_the_loss(name, executed):
    """Against fp64, under three orders of warps and programs, without a race or a stray access."""
    assert executed[name] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [fault.name for fault in faults.FAULTS])
def test_the_machine_sees_faults(name, noticed):
    assert noticed[name] == []


def test_the_few_meet_what_all_meet():
    """Every option, dtype and way to the gradient."""
    telling = {*cases.KINDS, *cases.NAMES.values(), "heads", "masked", "saturated", "apart"}
    telling |= {"inplace", "fused", "forward", "backward", "all"}

    def words(chosen):
        return {word for case in chosen for word in case.name.split()} & telling

    assert words(cases.every()) == telling
    assert words(cases.few()) == telling


OF_ITS_OWN = """
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from tests.ptx.gpu import Gpu
backend = CUDABackend(GPUTarget("cuda", 90, 32))
of_a_gpu = backend.hash()
Gpu().install()
assert backend.hash() != of_a_gpu
"""


def test_no_gpu_loads_what_it_compiles():
    """Triton's cache keeps these kernels, which have no machine code."""
    subprocess.run([sys.executable, "-c", OF_ITS_OWN], env=ENVIRONMENT, cwd=ROOT, check=True)


SLICE = "#ttg.slice<{dim = 2, parent = #linear}>"
REDUCTION = """
#linear = #ttg.linear<{register = [[0, 1]], lane = LANES, warp = [], block = []}>
%1 = "tt.reduce"(%0) <{axis = 1 : i32}> ({
  ^bb0(%a: f32, %b: f32):
    tt.reduce.return %c : f32
}) : (tensor<4x128xf32, LAYOUT>) -> tensor<4xf32, #ttg.slice<{dim = 1, parent = #linear}>>
"""


@pytest.mark.parametrize(
    ("lanes", "layout", "found"),
    [
        ("[[0, 4], [0, 8], [1, 0], [2, 0], [0, 16]]", "#linear", 1),
        ("[[0, 4], [0, 8], [0, 16], [1, 0], [2, 0]]", "#linear", 0),
        ("[[1, 0], [0, 4], [0, 8], [0, 16], [2, 0]]", "#linear", 0),
        ("[[0, 4], [0, 0], [0, 8], [1, 0], [2, 0]]", "#linear", 1),
        ("[[0, 4, 0], [0, 0, 1], [0, 8, 0], [1, 0, 0], [2, 0, 0]]", SLICE, 1),
        ("[[0, 4, 0], [0, 8, 0], [0, 0, 1], [1, 0, 0], [2, 0, 0]]", SLICE, 0),
        ("[[0, 4], [0, 8], [1, 0], [2, 0], [0, 16]]", "#blocked", 0),
    ],
)  # fmt: skip
def test_reductions_over_lanes_that_are_no_neighbours(lanes, layout, found):
    text = REDUCTION.replace("LANES", lanes).replace("LAYOUT", layout)
    assert len(scattered(text)) == found
