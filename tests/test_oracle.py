"""The oracle itself: its values in 60 digits, its gradients by differences."""

from __future__ import annotations

import math

import pytest
import torch
from mpmath import mp, mpf

from tests import oracle

INF = math.inf
CASES = [
    ("forward_kl", {}, lambda p, q: p * mp.log(p / q)),
    ("reverse_kl", {}, lambda p, q: q * mp.log(q / p)),
    ("jsd", {"beta": 1e-4}, lambda p, q: _jsd(p, q, mpf(1e-4))),
    ("jsd", {"beta": 0.5}, lambda p, q: _jsd(p, q, mpf(0.5))),
    ("skew_kl", {"alpha": 1 - 1e-6}, lambda p, q: p * mp.log(p / _mix(p, q, mpf(1 - 1e-6)))),
    ("skew_reverse_kl", {"alpha": 0.999}, lambda p, q: q * mp.log(q / _mix(q, p, mpf(0.999)))),
    ("tvd", {}, lambda p, q: abs(p - q) / 2),
    ("alpha", {"alpha": 1e-5}, lambda p, q: _alpha(p, q, mpf(1e-5))),
    ("alpha", {"alpha": 2.0}, lambda p, q: _alpha(p, q, mpf(2))),
]
ROWS = {
    "far apart": ([0.0, 30.0, -5.0, 1.0], [40.0, 0.0, 0.0, -9.0]),
    "nearly equal": ([1.0, 2.0, 3.0, -4.0], [1.0, 2.0 + 1e-4, 3.0, -4.0 - 1e-4]),
    "saturated": ([0.0, 16.0, 0.0, 1.0], [0.5, 0.0, 1.0, -1.0]),
    "both saturated": ([0.0, 14.0, 0.0, 1.0], [0.5, 15.0, 1.0, -1.0]),
    "offset": ([1e4, 1e4 + 2, 1e4 - 1, 1e4 + 1], [-1e4, -1e4 + 1, 1 - 1e4, -1e4]),
}


def _mix(p, q, a):
    return a * p + (1 - a) * q


def _jsd(p, q, beta):
    m = _mix(p, q, beta)
    return beta * p * mp.log(p / m) + (1 - beta) * q * mp.log(q / m)


def _alpha(p, q, a):
    return (p**a * q ** (1 - a) - _mix(p, q, a)) / (a * (a - 1))


def _softmax(logits, temperature):
    terms = [mp.exp(mpf(x) / mpf(temperature)) for x in logits]
    return [term / mp.fsum(terms) for term in terms]


@pytest.mark.parametrize("temperature", [1.0, 1e4])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize(
    ("name", "parameters", "term"), CASES, ids=[f"{name}{given}" for name, given, _ in CASES]
)
def test_values_in_60_digits(name, parameters, term, rows, temperature):
    z, y = (torch.tensor([row], dtype=torch.float64) for row in rows)
    ours, _ = oracle.distillation_loss(
        z, y, divergence=(name, parameters), temperature=temperature, scale_by_temperature=False
    )
    with mp.workdps(60):
        q, p = (_softmax(row, temperature) for row in rows)
        true = float(mp.fsum(term(*pair) for pair in zip(p, q, strict=True)))
    assert ours.item() == pytest.approx(true, rel=1e-6, abs=0)


@pytest.mark.parametrize("order", [1e-3, 0.5, 1 - 1e-6, 1 + 1e-6, 5.0])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_renyi_in_60_digits(rows, order):
    z, y = (torch.tensor([row], dtype=torch.float64) for row in rows)
    ours, _ = oracle.distillation_loss(z, y, divergence=("renyi", {"alpha": order}))
    with mp.workdps(60):
        q, p = (_softmax(row, 1) for row in rows)
        a = mpf(order)
        total = mp.fsum(x**a * w ** (1 - a) for x, w in zip(p, q, strict=True))
        true = float(mp.log(total) / (a - 1))
    assert ours.item() == pytest.approx(true, rel=1e-6, abs=0)


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("name", sorted(oracle.DIVERGENCES.keys() - {"taid", "todi", "akl"}))
def test_gradcheck(name, standardize):
    """To student, teacher, temperatures and weight, every option on.

    Three divergences are left out: what follows the student in them has no gradient by definition.
    """
    multi_label = name == "bernoulli"
    if multi_label and standardize:
        return
    parameters = {
        "jeffreys": {"forward": 0.3, "reverse": 1.2}, "jsd": {"beta": 0.3},
        "skew_kl": {"alpha": 0.1}, "skew_reverse_kl": {"alpha": 0.1},
        "alpha": {"alpha": 2.0}, "renyi": {"alpha": 0.5}, "alpha_beta": {"alpha": 0.2, "beta": 0.7},
        "dkd": {"alpha": 1.0, "beta": 8.0}, "nkd": {"gamma": 1.5}, "dist": {"beta": 1.0},
    }.get(name, {})  # fmt: skip
    labels = torch.rand(3, 4) if multi_label else torch.tensor([0, 3, -100])
    leaves = [2 * torch.randn(3, 5), 2 * torch.randn(3, 5), torch.rand(3) + 0.5, torch.rand(()) + 1]
    leaves = [x.double().requires_grad_() for x in (*leaves, torch.rand(3))]

    def loss(z, y, t_s, t_t, weight):
        return oracle.distillation_loss(
            z, y, labels, divergence=(name, parameters), temperature=t_s, teacher_temperature=t_t,
            standardize=standardize, alpha=0.4, entropy_weight=0.3, weight=weight, vocab_size=4,
            label_smoothing=0.0 if multi_label else 0.1,
        )[0]  # fmt: skip

    assert torch.autograd.gradcheck(loss, leaves, check_undefined_grad=False)


def test_infinite_and_masked():
    """-inf on both sides counts nowhere; on one, the loss is infinite and its gradient is not."""
    z = torch.tensor([[0.0, 1, -INF], [0, 1, -INF], [0, 1, 2]], dtype=torch.float64)
    y = torch.tensor([[1.0, 0, -INF], [1, 0, 2], [1, 0, -INF]], dtype=torch.float64)
    p, q = y.softmax(-1), z.softmax(-1)
    for name, infinite, expected in (
        ("forward_kl", [False, True, False], q - p),
        ("reverse_kl", [False, False, True], None),
        ("tvd", [False, False, False], None),
    ):
        leaf = z.clone().requires_grad_()
        loss, _ = oracle.distillation_loss(leaf, y, divergence=name, reduction="none")
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        assert loss.isinf().tolist() == infinite
        assert gradient.isfinite().all()
        if expected is not None:
            assert torch.allclose(gradient, expected, atol=1e-15)


def test_faults_stay_visible_in_their_row_alone():
    for fault in (math.nan, INF):
        z, y = torch.randn(3, 4).double(), torch.randn(3, 4).double()
        z[1, 2] = fault
        z.requires_grad_()
        loss, _ = oracle.distillation_loss(z, y, divergence="reverse_kl", reduction="none")
        (gradient,) = torch.autograd.grad(loss.sum(), z)
        assert loss.isnan().tolist() == [False, True, False]
        assert gradient.isnan().any(-1).tolist() == [False, True, False]
        weight = torch.tensor([1.0, 0.0, 1.0])
        loss, _ = oracle.distillation_loss(z, y, divergence="reverse_kl", weight=weight)
        (gradient,) = torch.autograd.grad(loss, z)
        assert gradient.isfinite().all()
        assert not gradient[1].any()
