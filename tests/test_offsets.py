"""Operands that begin anywhere in memory: slices of wider tensors, rows of odd strides."""

from __future__ import annotations

import math
from itertools import cycle

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton")

import fastkd
from fastkd.kernels import labels, logits
from fastkd.kernels.arguments import number, varying
from fastkd.kernels.pieces import STATISTICS_FIELDS, SUMS_FIELDS
from fastkd.problem import CE, KD, Coefficients
from fastkd.sharding import run
from tests.closeness import assert_close
from tests.test_kernels import FORWARD_KL, Truth, problem_of


@pytest.mark.parametrize(
    ("divergence", "plan"),
    [(FORWARD_KL, "resident"), (FORWARD_KL, "split"), (fastkd.JSD(0.3), "sweep")],
    ids=str,
)
@pytest.mark.parametrize(
    ("strides", "V"),
    [
        ((75, 75, 75), 75),  # contiguous: row r begins 75 r columns on
        ((83, 91, 75), 71),  # equal modulo the vector of 8; 4 columns of padding
        ((77, 77, 77), 33),  # the first tile is all but the whole row
        ((83, 84, 75), 75),  # the teacher's unlike the others
    ],
)
def test_rows_that_begin_anywhere(divergence, strides, V, plan, force, device):
    """Odd strides: head and tail of every row, and nothing written beside it."""
    force(plan)
    rows, width = 9, 75  # every remainder modulo 8
    z, y, out = (
        torch.randn(rows, stride + 5, device=device).flatten()[: rows * stride].view(rows, stride)
        for stride in strides
    )
    labels = torch.randint(V, (rows,), device=device)
    problem = problem_of(z[:, :width], y[:, :width], divergence, labels=labels, V=V)
    truth = Truth(problem, divergence)
    factors = Coefficients(*torch.rand(2, rows, device=device) + 0.5, None)
    gradient = torch.zeros(rows, width, device=device, dtype=torch.float64)
    gradient[:, :V] = truth.gradient(factors)[0]

    values, state = run("", logits.phases(problem, entropy=False, metrics=False))
    assert_close(values[KD], truth.values["kd"])
    assert_close(values[CE], truth.values["ce"])
    ours, _ = logits.backward(problem, state, factors, gradient=True, temperature=False)
    assert_close(ours, gradient, "gradient")
    beside = out.clone()
    loss, _, _ = logits.fused(problem, factors, metrics=False, out=out[:, :width])
    assert_close(loss, factors.kd * truth.values["kd"] + factors.ce * truth.values["ce"])
    assert_close(out[:, :width], gradient, "gradient")
    assert torch.equal(out[:, width:], beside[:, width:])


# First columns of student, teacher and gradient: each at another place, all alike, two alike.
EACH = [(n, n % 7 + 1, (n + 2) % 7 + 1) for n in range(1, 8)]
FIRSTS = [*EACH, (1, 1, 1), (6, 6, 6), (1, 1, 0), (0, 5, 5), (4, 0, 0)]
CASES = list(zip(FIRSTS, cycle(("sweep", "split"))))
CASES += [(EACH[1], "sweep"), (EACH[0], "resident")]


def slice_of(x, first, stride):
    """x as columns of a wider tensor that is NaN elsewhere, and that tensor."""
    wide = torch.full((len(x), stride), math.nan, dtype=x.dtype, device=x.device)
    view = wide[:, first : first + x.size(1)]
    view.copy_(x)
    return view, wide


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("firsts", "plan"), CASES, ids=str)
def test_slices_of_wider_tensors(firsts, dtype, plan, force, device):
    """Nothing beside them is read or written, at strides that are multiples of 16 bytes and not."""
    force(plan)
    stride = 88 if firsts[0] % 2 else 83
    z, y, nothing = torch.randn(3, 3, 75, device=device).to(dtype)
    (z, z_wide), (y, y_wide), (out, out_wide) = (
        slice_of(x, first, stride) for x, first in zip((z, y, nothing), firsts, strict=True)
    )
    before = [x.clone() for x in (z_wide, y_wide)]
    problem = problem_of(z, y)
    truth = Truth(problem, FORWARD_KL)
    one = Coefficients(torch.ones(3, device=device), None, None)
    gradient = truth.gradient(one)[0]
    loss, _, _ = logits.fused(problem, one, metrics=False, out=out)
    assert_close(loss, truth.values["kd"])
    assert_close(out, gradient, "gradient", gradient.to(dtype))
    rest = torch.ones(stride, dtype=torch.bool, device=device)
    rest[firsts[2] : firsts[2] + 75] = False
    assert out_wide[:, rest].isnan().all()
    for wide, was in zip((z_wide, y_wide), before, strict=True):
        assert torch.equal(wide.nan_to_num(7.0), was.nan_to_num(7.0))


@pytest.mark.parametrize("firsts", [(1, 3), (5, 1), (1, 5)], ids=str)
def test_dtypes_that_differ(firsts, force, device):
    """16 bytes hold half as many entries of one side as of the other."""
    force("sweep")
    z, y = torch.randn(2, 3, 75, device=device)
    (z, _), (y, _) = slice_of(z.bfloat16(), firsts[0], 88), slice_of(y, firsts[1], 88)
    problem = problem_of(z, y)
    values, _ = run("", logits.phases(problem, entropy=False, metrics=False))
    assert_close(values[KD], Truth(problem, FORWARD_KL).values["kd"])


@pytest.mark.parametrize("first", [0, 1, 2])
def test_storage_that_begins_anywhere(first, force, device):
    """Memory that another library allocated, from before which nothing may be read."""
    force("sweep")
    memory = torch.randn(300, device=device)
    z = torch.from_dlpack(memory[1:])[first : first + 222].view(3, 74)
    y = torch.randn(3, 74, device=device)
    problem = problem_of(z, y)
    values, _ = run("", logits.phases(problem, entropy=False, metrics=False))
    assert_close(values[KD], Truth(problem, FORWARD_KL).values["kd"])


def launched(monkeypatch, kernel):
    """What the launcher passes to a kernel, in place of its launch."""
    passed = {}

    class Recorder:
        def __getitem__(self, grid):
            return lambda **arguments: passed.update(arguments)

    monkeypatch.setattr(logits, kernel, Recorder())
    return passed


@pytest.mark.parametrize(
    ("places", "alike"),
    [  # the first column and the row stride of student, teacher and gradient
        (((0, 96), (8, 88), (0, 80)), 0),  # all at multiples of 16 bytes
        (((1, 96), (1, 96), (1, 96)), 7),
        (((3, 81), (3, 97), (3, 89)), 7),
        (((1, 96), (1, 88), (0, 75)), 3),
        (((0, 96), (0, 75), (0, 75)), 6),
        (((1, 96), (2, 96), (1, 80)), 5),
        (((1, 96), (2, 96), (3, 96)), 1),
    ],
)
def test_which_operands_begin_alike(places, alike, monkeypatch, force, device):
    """The most that do move 128 bits at a time."""
    force("sweep")
    passed = launched(monkeypatch, "sweep")
    x = torch.zeros(3, 75, device=device, dtype=torch.bfloat16)
    z, y, out = (slice_of(x, *place)[0] for place in places)
    one = Coefficients(torch.ones(3, device=device), None, None)
    logits.fused(problem_of(z, y), one, metrics=False, out=out)
    assert passed["TILE"].shifted == alike
    for side, (first, _) in zip(("student", "teacher", "gradient"), places, strict=True):
        assert passed[side].pointer.data_ptr() % 16 == 0
        assert passed[side].first == varying(first % 8)


def test_fields_of_many_rows_lie_as_far_as_they_may():
    """Where the last of them begins beyond 2^31, the number of rows comes in 64 bits."""
    fields = max(STATISTICS_FIELDS.value, SUMS_FIELDS.value, labels.LOGIT.value + 1)
    rows = -(-(2**31) // (fields - 1))
    assert varying(rows) >= 2**31
    assert number.fn(varying(rows)) == rows
