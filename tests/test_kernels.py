"""The kernels against fp64 autograd over the textbook values: loops, masks, merges, layouts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import fastkd
from fastkd.problem import (
    AGREEMENT,
    CE,
    CONSTANT,
    ENTROPY,
    KD,
    TEACHER_ENTROPY,
    Coefficients,
    Problem,
)  # fmt: skip
from tests.cases import DIVERGENCES
from tests.closeness import assert_close, assert_zero
from tests.schedules import BLOCK, SCHEDULES

pytest.importorskip("triton", reason="the kernels need triton")
import triton
import triton.language as tl

from fastkd.kernels import logits, tuning
from fastkd.kernels.divergences import Device
from fastkd.sharding import run

FORWARD_KL = fastkd.ForwardKL()


@triton.jit
def hellinger(lp, lq, p, q, d, d2, c, a, b):
    root = tl.sqrt(p) - tl.sqrt(q)
    return 0.5 * root * root, -0.5 * root * tl.sqrt(q) - q * c


class Hellinger(fastkd.Divergence):
    name = "test_kernels_hellinger"
    device = Device(hellinger)

    @staticmethod
    def value(lp, lq, a, b):
        return 0.5 * ((lp / 2).exp() - (lq / 2).exp()) ** 2


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Memory from torch.empty holds NaN, so that an entry that is never written shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(math.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", poisoned)


def problem_of(
    z, y, divergence=FORWARD_KL, T=None, teacher_T=None, labels=None, counted=None,
    smoothing=0.0, V=None,
):  # fmt: skip
    z, y = (x if x.dim() == 3 else x[None] for x in (z, y))
    rows = z.size(0) * z.size(1)
    T = torch.ones(1, device=z.device).expand(rows) if T is None else T
    return Problem(
        z, y, T, teacher_T, labels, counted, smoothing, divergence.name, *divergence.parameters,
        V or z.size(-1),
    )  # fmt: skip


class Truth:
    """Row values, and each term's gradients to logits and temperature, by autograd in fp64."""

    def __init__(self, problem, divergence):
        self.problem, self.divergence = problem, divergence
        z = problem.student.flatten(0, 1)[:, : problem.vocab_size].double()
        T = problem.student_temperature.double()
        leaf, heat = z.clone().requires_grad_(), T.clone().requires_grad_()
        by_logits = self.terms(leaf, leaf / T[:, None])
        # -inf / T would give NaN.
        masked = z == -math.inf
        heated = torch.where(masked, z, torch.where(masked, 0.0, z) / heat[:, None])
        by_heat = self.terms(z, heated)
        self.values = {name: term.detach() for name, term in by_logits.items()}
        self.gradients = {}
        for name in self.values:
            (dz,) = torch.autograd.grad(by_logits[name].sum(), leaf, retain_graph=True)
            dT = torch.zeros_like(T)
            if name != "ce":
                (dT,) = torch.autograd.grad(by_heat[name].sum(), heat, retain_graph=True)
            undefined = ~dz.isfinite().all(-1)  # the kernels leave the term out of such a row
            self.gradients[name] = (
                dz.masked_fill(undefined[:, None], 0.0), dT.masked_fill(undefined, 0.0),
            )  # fmt: skip

    def terms(self, z, heated):
        problem, divergence = self.problem, self.divergence
        y = problem.teacher.flatten(0, 1)[:, : problem.vocab_size].double()
        T, teacher_T = problem.student_temperature, problem.teacher_temperature
        y = y / (T if teacher_T is None else teacher_T).double()[:, None]
        lq, lp = torch.log_softmax(heated, -1), torch.log_softmax(y, -1)
        masked = lq == -math.inf
        finite = torch.where(masked, 0.0, lq)
        a, b = divergence.parameters
        terms = {
            "kd": divergence.outer(divergence.value(lp, lq, a, b).sum(-1), a, b),
            "entropy": -torch.where(masked, 0.0, finite.exp() * finite).sum(-1),
        }
        if problem.labels is not None:
            terms["ce"] = F.cross_entropy(
                z, problem.labels, label_smoothing=problem.label_smoothing, reduction="none"
            )
        return terms

    def gradient(self, factors, counted=None):
        dz = dT = 0.0
        for name, factor in factors._asdict().items():
            if factor is not None:
                dz = dz + factor[:, None] * self.gradients[name][0]
                dT = dT + factor * self.gradients[name][1]
        if counted is not None:
            dz, dT = dz.masked_fill(~counted[:, None], 0.0), dT.masked_fill(~counted, 0.0)
        return dz, dT


def assert_fused_is_right(problem, divergence):
    """Loss and gradient of whole rows, in one call."""
    truth = Truth(problem, divergence)
    one = Coefficients(torch.ones(problem.rows, device=problem.student.device), None, None)
    loss, _, gradient = logits.fused(problem, one, metrics=False, out=None)
    assert_close(loss, truth.values["kd"])
    assert_close(gradient, truth.gradient(one)[0], "gradient")


def masked_rows(device, V=75, smoothing=0.0):
    """Rows: dense; -inf on both sides; on the student's; on the teacher's; ignored, all NaN."""
    teacher = 2 * torch.randn(5, V, device=device)
    student = teacher + torch.randn(5, V, device=device)
    columns = torch.arange(V, device=device)
    student[1, columns % 3 == 0] = teacher[1, columns % 3 == 0] = -math.inf
    student[2, 5:40], teacher[3, 5:40] = -math.inf, -math.inf
    student[4] = teacher[4] = math.nan
    labels = torch.tensor([V - 1, 1, 2, 10, 0], device=device)
    counted = torch.tensor([True, True, True, True, False], device=device)
    return student, teacher, labels, counted


def close_where_finite(ours, truth, kind):
    """assert_close row by row: a row's infinite value must not hide the others' errors."""
    for mine, true in zip(ours, truth, strict=True):
        if true.isfinite().all() and true.count_nonzero():
            assert_close(mine, true, kind)
        elif not true.isfinite().all():
            assert torch.equal(mine.double(), true)
        else:
            assert_zero(mine)


# One divergence of each kind of row constant; with one program per row the rest cost minutes in
# the interpreter, and differ in what a tile computes only, which the resident rows test.
KINDS = {"ForwardKL()", "ReverseKL()", "JSD(beta=0.5)", "AlphaDivergence(alpha=2.0)"}
EVERY = [
    pytest.param(
        divergence, plan, id=f"{divergence}-{plan}",
        marks=[] if plan == "resident" or str(divergence) in KINDS else pytest.mark.full,
    )
    for divergence in DIVERGENCES
    for plan in SCHEDULES
]  # fmt: skip


@pytest.mark.parametrize(("divergence", "plan"), EVERY)
def test_values_and_gradients(divergence, plan, force, device):
    force(plan)
    z, y, labels, counted = masked_rows(device)
    T = torch.tensor([1.0, 2.0, 0.7, 1.5, 1.0], device=device)
    teacher_T = T.flip(0) * 1.3 if plan == "split" else None
    problem = problem_of(z, y, divergence, T, teacher_T, labels, counted)
    truth = Truth(problem, divergence)
    live = counted.nonzero().squeeze(1)

    values, state = run("", logits.phases(problem, entropy=True, metrics=False))
    for row, name in ((KD, "kd"), (CE, "ce"), (ENTROPY, "entropy")):
        close_where_finite(values[row, live], truth.values[name][live], "value")
    assert_zero(values[:, ~counted])

    factors = Coefficients(*torch.tensor(
        [[1.0, -0.5, 2.0, 0.3, 1.0], [0.2, 1.0, 0.3, 0.7, 1.0], [0.1, 0.4, -1.0, 0.5, 1.0]],
        device=device,
    ))  # fmt: skip
    dz, dT = truth.gradient(factors, counted)
    gradient, temperature_grad = logits.backward(
        problem, state, factors, gradient=True, temperature=True
    )
    close_where_finite(gradient, dz, "gradient")
    assert temperature_grad.isfinite().all()
    known = truth.values["kd"].isfinite() | ~counted
    close_where_finite(temperature_grad[known], dT[known], "gradient")

    loss, nothing, gradient = logits.fused(problem, factors, metrics=False, out=None)
    assert nothing is None
    expected = sum(f * truth.values[n] for n, f in factors._asdict().items())
    close_where_finite(loss[live], expected[live], "value")
    assert_zero(loss[~counted])
    close_where_finite(gradient, dz, "gradient")


@pytest.mark.parametrize("V", [2, 5, 10, BLOCK - 1, BLOCK, BLOCK + 1, 100, 130])
@pytest.mark.parametrize("plan", ["sweep", "split", None])
def test_every_width(V, plan, force, device):
    """None: what tuning.py chooses. Splits beyond the last column hold nothing."""
    if plan is not None:
        force(plan)
    z, y = torch.randn(2, 2, V, device=device)
    divergence = fastkd.JSD(0.3)
    problem = problem_of(z, y, divergence)
    truth = Truth(problem, divergence)
    factors = Coefficients(torch.ones(1, device=device).expand(2), None, None)
    loss, _, gradient = logits.fused(problem, factors, metrics=False, out=None)
    assert_close(loss, truth.values["kd"])
    assert_close(gradient, truth.gradient(factors)[0], "gradient")


@pytest.mark.parametrize("plan", SCHEDULES)
def test_smoothing_and_metrics(plan, force, device):
    force(plan)
    y = torch.randn(3, 75, device=device)
    z = y + 0.1 * torch.randn(3, 75, device=device) + 1000.0  # a common offset costs no accuracy
    z[0, 3], y[0, 3], z[1, 4], y[1, 5] = 1010.0, 10.0, 1010.0, 10.0
    z[2, 6] = z[2, 70] = 1010.0
    y[2, 9] = y[2, 70] = 10.0  # one of several maxima in common
    z = z.half().float()
    divergence = fastkd.ReverseKL()
    labels = torch.tensor([0, 74, 40], device=device)
    problem = problem_of(z, y, divergence, labels=labels, smoothing=0.2)
    truth = Truth(problem, divergence)
    values, _ = run("", logits.phases(problem, entropy=False, metrics=True))
    ones = torch.ones(3, device=device)
    factors = Coefficients(ones, 2 * ones, 0 * ones)
    loss, again, gradient = logits.fused(problem, factors, metrics=True, out=None)
    for these in (values, again):
        assert_close(these[KD], truth.values["kd"])
        assert_close(these[CE], truth.values["ce"])
        assert_close(these[ENTROPY], truth.values["entropy"])
        teacher = torch.distributions.Categorical(logits=y.double()).entropy()
        assert_close(these[TEACHER_ENTROPY], teacher)
        assert these[AGREEMENT].tolist() == [1.0, 0.0, 1.0]
    assert_close(loss, truth.values["kd"] + 2 * truth.values["ce"])
    assert_close(gradient, truth.gradient(factors)[0], "gradient")


@pytest.mark.parametrize("plan", SCHEDULES)
def test_rows_far_from_0(plan, force, device):
    """Products of their logits, rounded, would put the exponents off by 1e-3."""
    force(plan)
    y = torch.randn(3, 75, device=device) - 3e4
    z = y + torch.randn(3, 75, device=device) + 6e4
    divergence = fastkd.JSD(0.3)
    assert_fused_is_right(problem_of(z, y, divergence), divergence)


@pytest.mark.parametrize(
    ("divergence", "plan"), [case for case in EVERY if case.values[1] in ("resident", "sweep")]
)
@pytest.mark.parametrize("case", ["small", "hot"])
def test_small_divergences(divergence, plan, case, force, device):
    """A divergence near 5e-7, and T = 1000: the textbook sum would be 2 to 40 percent off."""
    V = 8192
    large = {"resident": (1, V, 1, 8, 1, 256), "sweep": (256, 8, 1, 4)}
    force((plan, *large[plan]))
    y = torch.randn(1, V, device=device) * 2 + 20
    z = y + (1e-3 if case == "small" else 1.0) * torch.randn(1, V, device=device) - 30
    T = torch.full((1,), 1.0 if case == "small" else 1000.0, device=device)
    problem = problem_of(z, y, divergence, T)
    truth = Truth(problem, divergence)
    one = Coefficients(torch.ones(1, device=device), None, None)
    loss, _, gradient = logits.fused(problem, one, metrics=False, out=None)
    assert 1e-9 < loss.item() < 1e-2
    assert_close(loss / truth.values["kd"], torch.ones(1, device=device), "gradient")
    if divergence.name != "tvd":  # whose slope jumps where p = q
        error = (gradient - truth.gradient(one)[0]).norm() / truth.gradient(one)[0].norm()
        assert error < 3e-4, error


@pytest.mark.parametrize(("divergence", "plan"), EVERY)
def test_equal_logits_give_exactly_zero(divergence, plan, force, device):
    force(plan)
    z = 5 * torch.randn(2, 75, device=device)
    z[1, ::3] = -math.inf
    one = Coefficients(torch.ones(2, device=device), None, None)
    loss, _, gradient = logits.fused(problem_of(z, z, divergence), one, metrics=False, out=None)
    assert_zero(loss)
    assert_zero(gradient)


@pytest.mark.parametrize(("divergence", "plan"), EVERY)
def test_masked_throughout(divergence, plan, force, device):
    """Rows that are -inf on both sides, and rows far below every threshold but finite."""
    force(plan)
    z = torch.full((2, 40), -math.inf, device=device)
    z[1] = -1e6
    one = Coefficients(torch.ones(2, device=device), None, None)
    loss, _, gradient = logits.fused(problem_of(z, z, divergence), one, metrics=False, out=None)
    assert_zero(loss)
    assert_zero(gradient)


@pytest.mark.parametrize("plan", SCHEDULES)
def test_disjoint_supports(plan, force, device):
    """Infinite divergences are +inf with a gradient of 0, bounded ones are at their bound."""
    force(plan)
    z, y = torch.randn(2, 1, 64, device=device)
    z[:, ::2], y[:, 1::2] = -math.inf, -math.inf
    one = Coefficients(torch.ones(1, device=device), None, None)
    for divergence in DIVERGENCES:
        loss, _, gradient = logits.fused(problem_of(z, y, divergence), one, False, None)
        truth = divergence.outer(
            divergence.value(
                y.double().log_softmax(-1), z.double().log_softmax(-1), *divergence.parameters
            ).sum(-1), *divergence.parameters,
        )  # fmt: skip
        close_where_finite(loss, truth, "value")
        assert gradient.isfinite().all(), divergence
        if truth.isinf() and divergence.constant not in ("none", "slope_sum"):
            assert_zero(gradient)


@pytest.mark.parametrize("plan", SCHEDULES)
def test_a_factor_of_0_leaves_no_gradient(plan, force, device):
    """Of rows with a NaN, or with an infinite slope."""
    force(plan)
    z, y = torch.randn(2, 3, 75, device=device)
    z[0, 5], y[1, 5] = math.nan, -math.inf
    factors = Coefficients(torch.tensor([0.0, 0.0, 1.0], device=device), None, None)
    for divergence in (FORWARD_KL, fastkd.ReverseKL(), fastkd.JSD()):
        loss, _, gradient = logits.fused(problem_of(z, y, divergence), factors, False, None)
        assert_zero(loss[:2])
        assert_zero(gradient[:2])
        assert gradient[2].abs().max() > 1e-3, divergence


@pytest.mark.parametrize("plan", SCHEDULES)
def test_absent_terms_touch_nothing(plan, force, device):
    """A factor of 0 removes an infinite term; a row whose factors are all 0 is not read."""
    force(plan)
    z, y, labels, counted = masked_rows(device)
    problem = problem_of(z, y, fastkd.ReverseKL(), labels=labels, counted=counted)
    kd = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0], device=device)
    ce = torch.ones(5, device=device)
    loss, _, gradient = logits.fused(problem, Coefficients(kd, ce, None), False, None)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()
    assert_close(loss[3:4], Truth(problem, fastkd.ReverseKL()).values["ce"][3:4])
    everything = problem._replace(counted=None, labels=None)
    state = torch.zeros(5, 5, device=device)
    none = torch.zeros(5, device=device)
    gradient, temperature_grad = logits.backward(
        everything, state, Coefficients(none, None, None), True, True
    )
    assert_zero(gradient)
    assert_zero(temperature_grad)


@pytest.mark.parametrize("plan", SCHEDULES)
def test_label_out_of_range(plan, force, device):
    force(plan)
    z, y = torch.randn(2, 3, 75, device=device)
    problem = problem_of(z, y, labels=torch.tensor([-1, 75, 74], device=device))
    values, _ = run("", logits.phases(problem, entropy=False, metrics=False))
    assert values[CE].isnan().tolist() == [True, True, False]
    assert values[KD].isfinite().all()


@pytest.mark.parametrize("plan", SCHEDULES)
def test_layouts(plan, force, device):
    """Strided and padded rows of either side, an expanded teacher, output in place."""
    force(plan)
    V, divergence = 70, fastkd.JSD(0.5)
    storage = torch.randn(3, 2, 80, device=device)
    z, y = storage.transpose(0, 1), torch.randn(1, 3, 75, device=device).expand(2, 3, 75)
    problem = problem_of(z, y, divergence, V=V, labels=torch.arange(6, device=device))
    truth = Truth(problem, divergence)
    ones = torch.ones(6, device=device)
    factors = Coefficients(ones, ones, None)
    dz, _ = truth.gradient(factors)
    values, state = run("", logits.phases(problem, entropy=False, metrics=False))
    assert_close(values[KD], truth.values["kd"])
    separate, _ = logits.backward(problem, state, factors, gradient=True, temperature=False)
    loss, _, gradient = logits.fused(problem, factors, metrics=False, out=z)
    assert gradient is z
    assert_close(loss, truth.values["kd"] + truth.values["ce"])
    for g in (separate, z.flatten(0, 1)):
        assert_close(g[:, :V], dz, "gradient")
        assert_zero(g[:, V:])


@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("beyond", [0, 5])
@pytest.mark.parametrize("divergence", [fastkd.ForwardKL(), fastkd.DKD()], ids=str)
def test_what_does_not_count_has_no_gradient(divergence, beyond, mode, force, device):
    """Rows that are left out, and columns beyond a row's, be their logits NaN."""
    force("resident")
    V, labels = 70, torch.tensor([3, -100, 69, 0], device=device)
    student, teacher = torch.randn(2, 4, V + beyond, device=device)
    student[1] = teacher[1] = student[:, V:] = torch.nan
    loss = fastkd.distillation_loss(
        student.requires_grad_(), teacher, labels, divergence=divergence, alpha=0.5,
        label_smoothing=0.1, entropy_weight=0.3, vocab_size=V, gradient=mode, backend="triton",
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, student)
    assert_zero(gradient[1])
    assert_zero(gradient[:, V:])
    assert gradient.isfinite().all()
    assert (gradient[[0, 2, 3], :V] != 0).all()


@pytest.mark.parametrize("plan", ["resident", "sweep"])
@pytest.mark.parametrize("V", [75, 78])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype, V, plan, force, device):
    """fp32 from the load on: only the stored gradient is rounded."""
    force(plan)
    z, y = torch.randn(2, 2, V, device=device).to(dtype)
    problem = problem_of(z, y.float() if V % 2 else y)  # the dtypes may differ
    truth = Truth(problem, fastkd.ForwardKL())
    one = Coefficients(torch.ones(2, device=device), None, None)
    loss, _, gradient = logits.fused(problem, one, metrics=False, out=None)
    assert gradient.dtype == dtype
    assert_close(loss, truth.values["kd"])
    eager = truth.gradient(one)[0]
    # The interpreter truncates to bf16 where a device rounds.
    assert (gradient.double() - eager).abs().max() < 2 * torch.finfo(dtype).eps * eager.abs().max()


@pytest.mark.parametrize("plan", SCHEDULES)
def test_two_runs_are_bit_equal(plan, force, device):
    force(plan)
    z, y = torch.randn(2, 2, 75, device=device)
    one = Coefficients(torch.ones(2, device=device), None, None)
    first, second = (
        logits.fused(problem_of(z, y, fastkd.JSD(0.5)), one, False, None) for _ in range(2)
    )
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[2], second[2])


def test_no_rows(device):
    problem = problem_of(torch.empty(1, 0, 7, device=device), torch.empty(1, 0, 7, device=device))
    values, state = run("", logits.phases(problem, entropy=True, metrics=False))
    assert values.shape == (3, 0)
    assert state.shape == (8, 0)
    none = Coefficients(torch.ones(0, device=device), None, None)
    gradient, temperature_grad = logits.backward(
        problem, state, none, gradient=True, temperature=True
    )
    assert gradient.shape == (0, 7)
    assert temperature_grad.shape == (0,)
    loss, _, gradient = logits.fused(problem, none, metrics=False, out=None)
    assert loss.shape == (0,)
    assert gradient.shape == (0, 7)
    logits.scale_(gradient, torch.tensor(2.0, device=device))


def test_state_constant(force, device):
    """The state is what problem.py says it is: the constant of reverse KL is the value."""
    force("sweep")
    z, y = torch.randn(2, 2, 75, device=device)
    values, state = run("", logits.phases(problem_of(z, y, fastkd.ReverseKL()), False, False))
    assert_close(state[CONSTANT], values[KD].double())
    assert_close(state[0], z.amax(-1).double())
    assert_close(state[1], (z.double() - z.double().amax(-1, keepdim=True)).exp().sum(-1))


def test_scale(device):
    storage = torch.randn(3, 2, 5000, device=device)
    view = storage.transpose(0, 1)[..., :4999]
    expected, rest = view * 3, storage[..., 4999:].clone()
    logits.scale_(view, torch.tensor(3.0, device=device))
    assert torch.equal(view, expected)
    assert torch.equal(storage[..., 4999:], rest)
    before = view.clone()
    logits.scale_(view, torch.tensor(1.0, device=device))
    assert torch.equal(view, before)


def rows_around_the_threshold(device):
    """Logits of both sides, from rows nearly alike to rows far apart."""
    noise = [1e-3, 0.03, 0.04, 0.06, 0.08, 0.11, 0.14, 0.18, 0.3, 0.45, 0.6, 2.0, 9.0]
    noise = torch.tensor(noise, device=device)[:, None]
    y = 2 * torch.randn(13, 300, device=device)
    return y + noise * torch.randn(13, 300, device=device), y


@pytest.mark.parametrize("divergence", [FORWARD_KL, fastkd.ReverseKL()], ids=str)
def test_loss_alone_sweeps_again_where_it_is_small(divergence, force, device):
    """By the first sweep's sums where they are right, and not where they would cancel."""
    force("sweep")
    z, y = rows_around_the_threshold(device)
    problem = problem_of(z, y, divergence)
    truth = Truth(problem, divergence).values["kd"]
    assert truth.min() < 1e-6
    assert (truth > 0.1).sum() > 2
    values, _ = run("", logits.phases(problem, entropy=False, metrics=False))
    assert_close(values[KD] / truth, torch.ones(13, device=device), "value")
    swept, _ = run("", logits.phases(problem, entropy=False, metrics=True))
    assert_close(swept[KD] / truth, torch.ones(13, device=device), "value")


def test_own_divergence(force, device):
    force("sweep")
    divergence = Hellinger()
    z, y = torch.randn(2, 2, 75, device=device)
    assert_fused_is_right(problem_of(z, y, divergence), divergence)


def test_no_device_function(device):
    class Plain(fastkd.Divergence):
        name = "test_kernels_plain"

    z, y = torch.randn(2, 2, 75, device=device)
    with pytest.raises(NotImplementedError, match="give its class a `device`"):
        run("", logits.phases(problem_of(z, y, Plain()), entropy=False, metrics=False))


@pytest.mark.parametrize("wave", [32, 64])
@pytest.mark.parametrize("held", [tuning.HELD, tuning.LEAN])
def test_parts_hold_a_row_with_little_padding(held, wave):
    """Every column once, in powers of two that pieces divide, by as many threads as there are."""
    for rows in (1, 100, 65536):
        for columns in (*range(2, 140), 1000, 4095, 4096):
            plan = tuning.table(rows, columns, 2, 132, held=held, wave=wave)
            assert plan.lanes * plan.threads == plan.warps * wave
            for vector in (1, 2, 4, 8):
                if columns % vector == 0:
                    parts, piece, _ = tuning.layout(plan, columns, vector, 2)
                    assert [begin for begin, _ in parts] == [
                        sum(size for _, size in parts[:i]) for i in range(len(parts))
                    ]
                    assert all(size & (size - 1) == 0 and size % piece == 0 for _, size in parts)
                    padding = sum(size for _, size in parts) - columns
                    assert 0 <= padding < max(piece, plan.vector / 16)


def test_schedules_fit_their_rows():
    """Every schedule covers its columns; splitting stops once the device is full."""
    for rows in (1, 7, 64, 264, 4096, 10**6):
        for columns in (2, 100, 1000, 4096, 4097, 32000, 128256, 262144):
            plan = tuning.table(rows, columns, 2, 132)
            if plan.kind == "resident":
                assert plan.vector >= columns
                assert plan.splits == 1
            else:
                assert plan.vector == 8
                assert plan.splits == 1 or rows * plan.splits <= 4 * 132
                assert columns >= plan.splits * plan.lanes * plan.vector
