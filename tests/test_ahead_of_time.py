"""Every kernel, compiled as it would be launched, without a GPU: held to budgets.

The interpreter, which the other tests use, replaces triton.jit; so the kernels are compiled in a
process of its own, by `python -m benchmarks.compiled`, which also writes them up as tables.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton")

import triton

from benchmarks import model
from benchmarks.configurations import EVERYTHING, configurations, tasks
from fastkd.divergences import Divergence
from fastkd.divergences.base import SLOPE_SUM
from fastkd.kernels import tuning

ROOT = Path(__file__).parents[1]
# SASS instructions per position on sm_90 in bf16, over all sweeps: loss and gradient in one launch,
# and the backward pass alone; 5 % are for ptxas. Then the exponentials and logarithms of the
# former. kernels/README.md says what the value costs that does not cancel.
BUDGET = {
    "forward_kl": (44.5, 25.5, 4.125, 0),
    "reverse_kl": (48, 17.5, 4.125, 0),
    "jeffreys": (61.5, 33.5, 4.125, 0),
    "jsd": (76, 23.5, 7.125, 2),
    "skew_kl": (102.5, 38, 8.125, 1),
    "skew_reverse_kl": (100.5, 32.5, 7.125, 2),
    "tvd": (64.5, 20, 5.125, 0),
    "alpha": (82.5, 33.5, 7.1875, 0),
    "renyi": (80, 32.5, 7.1875, 0),
}
# Of rows whose value the first sweep's sums give.
KNOWN = {"forward_kl": 28.5, "reverse_kl": 33.5}
# Beside a teacher that lists columns, by sweep; with all options.
LISTED, LISTED_EVERYTHING = (10.5, 7.5), (25.5, 22.5)
# A divergence without a line of its own may cost as much as the dearest, until it has one.
DEAREST = tuple(map(max, zip(*BUDGET.values(), strict=True)))
# Row losses: those that look at a label sweep the row without it, which costs 2 for each of two
# sweeps and 6 for the gradient.
ROW_BUDGET = {
    "dkd": (53, 31, 4.125, 0), "nkd": (54.5, 31, 4.125, 0), "taid": (68, 31.5, 5.1875, 0),
    "todi": (95, 37, 8.125, 0), "alpha_beta": (189, 50.5, 11.125, 0),
}  # fmt: skip
# A row in registers, by its width, per column that its parts hold: what is computed once per row
# weighs more where it is short.
RESIDENT = {
    5: 116, 16: 48, 32: 43.5, 37: 62, 64: 44.5, 128: 45, 256: 45.5, 512: 45.5, 1024: 45.5,
    2048: 49, 4096: 50,
}  # fmt: skip
RESIDENT_JSD = 24  # more than forward KL
# Of 10 and of 100 columns; of Triton 3.6 and later, where there is a difference.
NARROW = {
    "forward_kl": (69, 55), "reverse_kl": (72, 57), "jeffreys": (94, 76.5), "jsd": (91, 77),
    "skew_kl": (93, 78), "skew_reverse_kl": (99, 85), "tvd": (74, 58), "alpha": (111, 94.5),
    "renyi": (111.5, 94),
}  # fmt: skip
ROW_NARROW = {
    "dkd": (109, 94), "nkd": (93, 81), "taid": (103, 83.5), "todi": (90, 75),
    "alpha_beta": (175, 157),
}  # fmt: skip
DEAREST_SHORT = tuple(map(max, zip(*NARROW.values(), strict=True)))
# kl_div, per entry: at most two gradients from one upstream value, in fp32 by an exact logarithm.
ENTRIES = {"bf16": 24, "fp32": 42}
# All options at once add this much to a sweep.
OPTIONS = 40
BESIDE = 12  # and this, where the sweeps leave the label out
# Threads that a processor of sm_90 holds, of 2048, in whatever goes over a row by tiles: what hides
# the latency of its loads. Fewer where the loops would spill, as results/NOTES.md has it: (whether
# only the divergence is wanted, how many).
THREADS = 768
FEWER = {"nkd": {True: 512}, "alpha_beta": {True: 256, False: 256}}
if tuning.TRITON != (3, 7):
    FEWER |= {"alpha": {False: 512}, "nkd": {True: 512, False: 256}}
if tuning.TRITON < (3, 7):
    FEWER["dkd"] = {False: 512}
if tuning.TRITON >= (3, 8):
    FEWER |= {"skew_kl": {False: 512}, "renyi": {False: 512}}
# With more to do of rows that begin anywhere.
FEWER_ODD = dict.fromkeys(("reverse_kl", "skew_kl", "jeffreys", "alpha", "renyi", "dkd"), 512)
FEWER_ODD["nkd"] = 256
FEWER_SHARED = {"skew_kl": 512, "skew_reverse_kl": 512, "alpha_beta": 256}
OF_A_NEW_ONE = {False: 512}
# Under Triton 3.9, in the loop of the gradient: for 768 threads where else there were 512.
SPILLED = {("jeffreys", "everything"): 10 if tuning.TRITON >= (3, 8) else 0}
MORE_TO_DO = ("everything", "standardized", "slices, own gradient")
# Where a row lies in registers, or of other targets: all its loads are under way at once.
LEAST = 256
# Scalars that ptxas sets aside once per row, outside the loops; which of the kernels that happens
# to changes with its version, and more where a row's first and last columns are masked.
SET_ASIDE, ODD = 40, 64
# Of which a sweep with all options that is held to 80 registers sets aside more, for more threads.
MANY_ROW_SCALARS, MANY = ("alpha", "dkd", "nkd"), 112
# Rows of 100 with all options run out of registers; more so by Triton 3.6, which sends them through
# shared memory.
SHORT = 80 if triton.__version__.startswith("3.6.") else SET_ASIDE


def _params():
    quick, few = tasks("quick"), tasks("few")
    return [
        pytest.param(
            *task,
            marks=[] if task in quick else pytest.mark.slow if task in few else pytest.mark.full,
        )
        for task in tasks()
    ]


def _part(config):
    """Of the configurations."""
    if config.getoption("--full"):
        return "all"
    return "quick" if config.getoption("--quick") else "few"


@pytest.fixture(scope="session")
def compiled(request):
    """{(target, divergence): kernels}."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compiled", "--json", "--part", _part(request.config)],
        env=environment, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    kernels = {}
    for kernel in json.loads(done.stdout):
        kernels.setdefault((kernel["target"], kernel["divergence"]), []).append(kernel)
    return kernels


EVERY = pytest.mark.parametrize(("target", "name"), _params())
HOPPER = pytest.mark.parametrize(
    ("target", "name"),
    [p for p in _params() if p.values[0] == "sm_90" and p.values[1] != "kl_div"],
)


@EVERY
def test_every_configuration_is_compiled(target, name, compiled, request):
    expected = {one.name for one in configurations(target, name, _part(request.config))}
    assert {kernel["configuration"] for kernel in compiled[target, name]} == expected


@EVERY
def test_no_spills(target, name, compiled):
    for kernel in compiled[target, name]:
        few = SPILLED.get((name, kernel["configuration"]), 0)
        assert all(loop["spills"] <= few for loop in kernel["loops"]), kernel
        allowed = {"everything, hundred columns": SHORT, "odd": ODD, "shared": ODD}
        if name in MANY_ROW_SCALARS:
            allowed["everything"] = MANY
        spills = kernel["all"]["spills"]
        assert spills <= allowed.get(kernel["configuration"], SET_ASIDE), kernel


@EVERY
def test_rows_are_reduced_over_lanes_side_by_side(target, name, compiled):
    """Else Triton 3.7.1 adds up other rows: see benchmarks/layouts.py."""
    for kernel in compiled[target, name]:
        assert not kernel["scattered"], kernel


@EVERY
def test_tiles_move_128_bits_at_a_time(target, name, compiled):
    for kernel in compiled[target, name]:
        any_row = kernel["configuration"].endswith((" columns", " 5", " 37"))  # not aligned
        assert any_row or kernel["all"]["wide"] > 0, kernel
        # A gradient whose rows begin elsewhere is stored entry by entry.
        stores = 16 if kernel["configuration"] == "slices, own gradient" else 0
        # And a word of marks beside each 16 bytes, in the sweep of what is not listed.
        words = kernel["kernel"] == "listed"
        for loop in kernel["loops"]:
            expected = stores if loop["stored"] else words * loop["wide"]
            assert loop["narrow"] == expected, kernel


def test_slices_of_wider_tensors_move_like_whole_ones(compiled):
    """At operands and rows that begin anywhere: instructions, and all loads 128 bits wide."""
    kernels = compiled["sm_90", "forward_kl"]
    work = {kernel["configuration"]: kernel["work"] for kernel in kernels}
    fused, *_ = BUDGET["forward_kl"]
    for name in ("slices", "slices fp32"):
        assert 0 < work[name]["instructions"] <= fused + 2
    assert 0 < work["slices, own gradient"]["instructions"] <= fused + 6
    split = [k["work"]["instructions"] for k in kernels if k["configuration"] == "slices split"]
    whole = [k["work"]["instructions"] for k in kernels if k["configuration"] == "split"]
    assert len(split) == len(whole) == 3
    assert sum(split) <= sum(whole) + 2


def least_threads(name, plain, odd):
    fewer = FEWER.get(name, {} if name in BUDGET | ROW_BUDGET else OF_A_NEW_ONE)
    least = fewer.get(plain, THREADS)
    return least if plain or not odd else min(least, FEWER_ODD.get(name, THREADS))


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("name", [*EVERYTHING[:-1], "one without a row of its own"])
def test_caps_of_registers_leave_room_for_enough_threads(name, plain, shifted, monkeypatch):
    """Every choice that tuning.py has; where it sets no cap, what is compiled tells."""
    monkeypatch.setattr(tuning, "generation", lambda device: tuning.HOPPER)
    cap = tuning.registers(torch.device("cuda"), name, shifted, plain)["maxnreg"]
    assert cap or (plain and not shifted)
    if cap:
        threads = 32 * 8 * model.occupancy(model.GPUS["sm_90"], cap, 0, 8)
        assert threads >= least_threads(name, plain, shifted)


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("name", EVERYTHING[:-1])
def test_shared_rows_leave_room_for_enough_threads(name, lean, monkeypatch):
    monkeypatch.setattr(tuning, "generation", lambda device: tuning.HOPPER)
    monkeypatch.setattr(tuning, "multiprocessors", lambda device: 1)
    programs, options = tuning.at_once(torch.device("cuda"), name, lean, 8)
    held = model.occupancy(model.GPUS["sm_90"], options["maxnreg"], 0, 8)
    assert programs == held
    assert 32 * 8 * held >= min(FEWER_SHARED.get(name, THREADS), THREADS if lean else 512)


@EVERY
def test_enough_warps_fit_a_processor(target, name, compiled):
    for kernel in compiled[target, name]:
        threads = kernel["occupancy"] * kernel["warps"] * (64 if "gfx" in target else 32)
        least = LEAST
        if target == "sm_90" and kernel["loops"]:
            configuration = kernel["configuration"]
            plain = not configuration.startswith(MORE_TO_DO)
            least = least_threads(name, plain, odd="slices" in configuration)
            if kernel["kernel"] == "shared":
                least = FEWER_SHARED.get(name, THREADS)
        assert threads >= least, kernel


@HOPPER
def test_instructions_per_position(target, name, compiled):
    work = {kernel["configuration"]: kernel["work"] for kernel in compiled[target, name]}
    fused, backward, exp2, log2 = (BUDGET | ROW_BUDGET).get(name, DEAREST)
    assert 0 < work["sweep"]["instructions"] <= fused
    if "shared" in work:
        assert 0 < work["shared"]["instructions"] <= fused + 1
    assert 0 < work["fp32"]["instructions"] <= fused
    assert 0 < work["odd"]["instructions"] <= fused + 2
    assert 0 < work["backward"]["instructions"] <= backward
    options = OPTIONS + BESIDE if Divergence.of_name(name).label_aware else OPTIONS
    assert 0 < work["everything"]["instructions"] <= fused + options
    if name in BUDGET | ROW_BUDGET:
        assert work["sweep"]["exp2"] == pytest.approx(exp2, abs=0.01)
        assert work["sweep"]["log2"] == pytest.approx(log2, abs=0.01)


@pytest.mark.parametrize("name", KNOWN)
def test_instructions_where_the_value_is_known(name, compiled):
    if ("sm_90", name) not in compiled:
        pytest.skip("not among the quick ones")
    known = {k["configuration"]: k["known"] for k in compiled["sm_90", name]}
    more = {"sweep": 0, "shared": 1, "fp32": 0, "odd": 2}
    for configuration in more.keys() & known.keys():
        assert 0 < known[configuration]["instructions"] <= KNOWN[name] + more[configuration]
        assert known[configuration]["loads"] == [known[configuration]["loads"][0]] * 2


@HOPPER
def test_every_operand_is_read_once_per_sweep(target, name, compiled):
    work = {kernel["configuration"]: kernel["work"] for kernel in compiled[target, name]}
    sweeps = 3 if Divergence.of_name(name).constant == SLOPE_SUM else 2
    assert work["sweep"]["loads"] == [4] * sweeps
    assert work["sweep"]["stored"] == 2
    assert "shared" not in work or work["shared"]["loads"] == work["sweep"]["loads"]
    assert work["backward"]["loads"] == [4]


@HOPPER
def test_instructions_of_resident_rows(target, name, compiled):
    more = RESIDENT_JSD if name == "jsd" else 0
    for kernel in compiled[target, name]:
        width = kernel["configuration"].removeprefix("resident ")
        if width.isdigit():
            assert 0 < kernel["work"]["instructions"] <= RESIDENT[int(width)] + more, kernel


@HOPPER
def test_instructions_of_short_rows(target, name, compiled):
    work = {kernel["configuration"]: kernel["work"] for kernel in compiled[target, name]}
    ten, hundred = (NARROW | ROW_NARROW).get(name, DEAREST_SHORT)
    assert 0 < work["ten columns"]["instructions"] <= ten
    assert 0 < work["hundred columns"]["instructions"] <= hundred


@HOPPER
def test_instructions_beside_listed_teachers(target, name, compiled):
    """A row's two sweeps: what is not listed, and the gradient; 16 entries to a thread."""
    for kernel in compiled[target, name]:
        if kernel["kernel"] == "listed":
            limits = LISTED_EVERYTHING if "everything" in kernel["configuration"] else LISTED
            loops = kernel["loops"]
            if kernel["configuration"] == "listed, split":  # a sweep to a launch
                limits = limits[:1] if loops[0]["stored"] == 0 else limits[1:]
            counts = [loop["instructions"] / 16 for loop in loops]
            assert len(counts) == len(limits), kernel
            assert all(0 < n <= most for n, most in zip(counts, limits, strict=True)), kernel


def test_kl_div_moves_every_entry_once(compiled):
    for kernel in compiled["sm_90", "kl_div"]:
        what, dtype = kernel["configuration"].rsplit(" ", 1)
        size = 2 if dtype == "bf16" else 4
        loads, stores = {
            "values": (2, 1), "sum": (2, 0), "input's gradient": (1, 1), "both gradients": (2, 2),
        }[what.removesuffix(" of logs")]  # fmt: skip
        work = kernel["work"]
        # The upstream gradient is one number here, and so is the sum of a tile.
        assert sum(work["loads"]) == pytest.approx(loads * size, abs=0.3)
        assert work["stored"] == pytest.approx(stores * size, abs=0.6)
        assert 0 < work["instructions"] <= ENTRIES[dtype]


@pytest.mark.slow
def test_the_tables_hold_a_sweep_against_its_textbook():
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.compiled", "--target", "sm_90"),
            *("--divergence", "forward_kl", "--configuration", "sweep"),
        ],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    ours, theirs = done.stdout.strip().splitlines()[-1].split("|")[3:5]
    assert float(ours) > float(theirs) > 0
