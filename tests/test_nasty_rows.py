"""Rows that break losses, drawn by hypothesis: each held to the oracle."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastkd
from fastkd.eager import solver
from tests.conftest import DEVICE
from tests.running import NO_TRITON, everything

pytestmark = pytest.mark.usefixtures("as_of_many")

VALUE, GRADIENT = 1e-4, 1e-4  # relative; of a gradient to the row's largest entry
LEAST = 1e-9  # of a value: below it there are no digits to promise
# Of a gradient's natural size, 1 / temperature: what is smaller is what nearly equal terms leave.
FLOOR = 3e-6
TINY = torch.finfo(torch.float32).tiny
LOWEST = torch.finfo(torch.float32).min
HUGE = 1e30  # a value beyond it is a mask's own number

DIVERGENCES = [
    fastkd.ForwardKL(), fastkd.ReverseKL(), fastkd.TVD(), fastkd.Jeffreys(0.3, 1.2),
    *map(fastkd.JSD, (1e-3, 0.1, 0.5, 0.9, 0.999)),
    *map(fastkd.SkewKL, (1e-3, 0.1, 0.9, 0.999)),
    *map(fastkd.SkewReverseKL, (1e-3, 0.1, 0.9, 0.999)),
    *map(fastkd.AlphaDivergence, (-0.5, 1e-3, 0.5, 0.999, 1.001, 2.0)),
    *map(fastkd.Renyi, (1e-3, 0.5, 0.999, 1.001, 2.0)),
]  # fmt: skip
TEMPERATURES = st.sampled_from([1e-3, 0.1, 1.0, 2.5, 1e3, 1e6])
OFFSETS = st.sampled_from([0.0, 0.0, 100.0, -1e4])
MASKS = st.sampled_from([-1e4, -1e9, LOWEST, -math.inf])
SHAPES = st.sampled_from(["apart", "near", "equal"])


@st.composite
def rows(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """[1, V] of each side: peaked or flat, apart or nearly equal, shifted, tiny, masked."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    columns = draw(st.sampled_from([3, 17, 70]))
    teacher = torch.randn(columns) * draw(st.sampled_from([1e-3, 1.0, 4.0, 12.0]))
    noise = draw(st.sampled_from([1e-3, 1e-2, 0.1, 1.0]))
    student = {
        "apart": 3 * torch.randn(columns),
        "near": teacher + noise * torch.randn(columns),
        "equal": teacher.clone(),
    }[draw(SHAPES)]
    places = st.integers(0, columns - 1)
    for side in (student, teacher):
        if draw(st.integers(0, 3)) == 3:
            side[draw(places)] += draw(st.sampled_from([8.0, 14.0, 40.0]))
        if draw(st.integers(0, 9)) == 9:
            side *= 1e-40
        side += draw(OFFSETS)
    if draw(st.booleans()):
        masked = torch.rand(columns) < draw(st.sampled_from([0.2, 0.7, 1.0]))
        masked[draw(places)] = False
        for side in draw(st.sampled_from([(student,), (teacher,), (student, teacher)])):
            side[masked] = draw(MASKS)
    return student[None], teacher[None]


@st.composite
def temperatures(draw: st.DrawFn) -> dict[str, Tensor]:
    """A number or one per row, shared or of each side."""
    shape = draw(st.sampled_from([(), (1,)]))
    found = {"temperature": torch.full(shape, draw(TEMPERATURES))}
    if draw(st.booleans()):
        found["teacher_temperature"] = torch.full(shape, draw(TEMPERATURES))
    return found


def rate(logits: Tensor, temperature: Tensor, standardize: bool) -> float:
    """1 / temperature; of the scores, in units of the logits."""
    kept = logits[logits > -math.inf].double()
    width = kept.std().nan_to_num(nan=1.0) + 1e-7 if standardize else 1.0
    return float(1 / (width * temperature.double()))


def check(divergence, sides, heat, standardize, backend):
    settings = {"divergence": divergence, "standardize": standardize, **heat}
    settings |= {"scale_by_temperature": False, "reduction": "sum", "weight": torch.tensor([1.0])}
    ours, true = (everything(*sides, backend=name, **settings) for name in (backend, None))
    loss, truth = ours["loss"].double(), true["loss"].float().double()
    gradients = [name for name in ours if name.startswith("to ") and name != "to weight"]
    if truth > HUGE:
        assert loss > HUGE / 2
        assert true["loss"].isfinite() or all(ours[name].isfinite().all() for name in gradients)
        return
    assert abs(loss - truth) <= VALUE * truth + LEAST, f"{loss:.9e}, expected {truth:.9e}"
    assert torch.allclose(ours["to weight"].double(), true["to weight"], VALUE, LEAST)
    other = heat.get("teacher_temperature", heat["temperature"])
    rates = {
        "to student": rate(sides[0], heat["temperature"], standardize),
        "to teacher": rate(sides[1], other, standardize),
    }
    for name, natural in rates.items():
        size = true[name].abs().max()
        if standardize:  # what moves mean or scale is taken out, however large
            natural = natural * max(1.0, float(truth))
        error = (ours[name].double() - true[name]).abs().max()
        assert error <= GRADIENT * size + FLOOR * natural + TINY, (
            f"{name}: {error:.2e} of {size:.2e}"
        )


CASES = st.sampled_from(DIVERGENCES), rows(), temperatures(), st.booleans()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(*CASES)
def test_on_torch(divergence, sides, heat, standardize):
    check(divergence, sides, heat, standardize, "torch")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(*CASES)
def test_few_on_torch(divergence, sides, heat, standardize):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solver, "FEW", sides[0].numel())
        check(divergence, sides, heat, standardize, "torch")


@NO_TRITON
@settings(
    max_examples=8 if DEVICE == "cpu" else 300, deadline=None, derandomize=True,
    phases=[Phase.generate],  # to shrink takes minutes in the interpreter
)  # fmt: skip
@given(*CASES)
def test_on_triton(divergence, sides, heat, standardize):
    check(divergence, sides, heat, standardize, "triton")
