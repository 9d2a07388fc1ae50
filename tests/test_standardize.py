"""Standardised logits: values and gradients against the fp64 truth, and what their scale does."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import fastkd
from fastkd import moments, problem
from fastkd.checks import HAS_TRITON
from tests.cases import DIVERGENCES, logits
from tests.closeness import assert_close, assert_zero
from tests.conftest import DEVICE
from tests.running import (
    BACKENDS,
    EVERY,
    FUSED,
    NO_TRITON,
    check,
    check_everything,
    defined,
    run,
    truth,
)
from tests.schedules import SCHEDULES

MODES = ["forward", "backward"]
# One divergence of each kind of row constant.
KINDS = [fastkd.ForwardKL(), fastkd.ReverseKL(), fastkd.JSD(0.5), fastkd.AlphaDivergence(2.0)]


def pair(backend, *shape, **settings):
    """Logits in fp32, and in fp64 for the reference, whose plain sums lose digits in fp32."""
    dtype = torch.float64 if backend == "reference" else torch.float32
    return tuple(x.to(DEVICE, dtype) for x in logits(*shape, **settings))


def standardized(logits):
    """The definition, in fp64."""
    logits = logits.double()
    return (logits - logits.mean(-1, keepdim=True)) / (logits.std(-1, keepdim=True) + 1e-7)


# --- against the truth -----------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_definition(backend):
    student, teacher = pair(backend, 4, 9, scale=5.0)
    z, y = standardized(student), standardized(teacher)
    p, log_q = (y / 3).softmax(-1), (z / 3).log_softmax(-1)
    loss, _ = run(
        student, teacher, temperature=3.0, standardize=True, reduction="batchmean", backend=backend
    )
    assert_close(loss, 9 * F.kl_div(log_q, p, reduction="batchmean"))


@EVERY
@pytest.mark.parametrize("mode", MODES)
def test_every_option_together(divergence, mode, backend):
    student, teacher = (x.float() for x in logits(6, 23, scale=4.0))
    labels = torch.tensor([0, -100, 3, 19, 7, 2])
    for settings in (
        {"entropy_weight": -0.2, "alpha": 0.3, "label_smoothing": 0.1, "vocab_size": 20},
        {"weight": torch.rand(6) + 0.1, "scale_by_temperature": False},
    ):
        check(
            student, teacher, labels, divergence=divergence, temperature=1.7,
            teacher_temperature=0.8, standardize=True, gradient=mode, backend=backend, **settings,
        )  # fmt: skip


@NO_TRITON
@pytest.mark.parametrize("plan", SCHEDULES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("divergence", KINDS, ids=str)
def test_every_schedule(divergence, mode, plan, force):
    force(plan)
    student, teacher = (x.float() + 10 for x in logits(5, 75))
    columns = torch.arange(75)
    student[1, columns % 3 == 0] = teacher[1, columns % 3 == 0] = -math.inf
    student[2, 40:] = teacher[2, 40:] = -math.inf
    check(
        student, teacher, torch.tensor([74, 1, 2, 10, -100]), divergence=divergence,
        temperature=torch.tensor([1.0, 2.0, 0.7, 1.5, 1.0]), alpha=0.6, entropy_weight=0.5,
        standardize=True, gradient=mode, backend="triton",
    )  # fmt: skip


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype(dtype, mode, backend):
    student, teacher = (x.to(dtype) for x in logits(6, 50))
    mode = "backward" if dtype == torch.float16 else mode  # which has no other
    check(
        student, teacher, temperature=2.0, reduction="sum", standardize=True, gradient=mode,
        backend=backend,
    )  # fmt: skip


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("divergence", [fastkd.JSD(0.1), fastkd.ForwardKL()], ids=str)
@pytest.mark.parametrize("teacher_temperature", [1.0, 1e5])
def test_high_temperatures(teacher_temperature, divergence, mode, backend):
    """log q and the entropy are then far larger than their sum, through which the width trains."""
    student, teacher = (x.float() for x in logits(3, 40))
    check(
        student, teacher, divergence=divergence, temperature=1e5,
        teacher_temperature=teacher_temperature, standardize=True, gradient=mode, backend=backend,
    )  # fmt: skip


@EVERY
@pytest.mark.parametrize("shared", [True, False])
def test_gradients_of_teacher_temperatures_and_weight(divergence, shared, backend):
    student, teacher = (x.float() for x in logits(5, 40))
    student[3, :9] = teacher[3, :9] = -math.inf
    settings = {"temperature": torch.tensor(1.7), "weight": torch.tensor([0.5, 2, 1, 0.3, 0])}
    if not shared:
        settings["teacher_temperature"] = torch.tensor([0.5, 1.0, 2.0, 1.3, 0.9])
    check_everything(
        student, teacher, torch.arange(5), divergence=divergence, alpha=0.7, entropy_weight=0.1,
        reduction="none", standardize=True, backend=backend, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_gradcheck(divergence, backend):
    student, teacher = logits(3, 5)
    leaves = [student, teacher, torch.tensor(1.5).double(), torch.tensor(0.7).double()]

    def loss(z, y, t_s, t_t):
        return fastkd.distillation_loss(
            z, y, torch.tensor([0, 4, -100]), divergence=divergence, temperature=t_s,
            teacher_temperature=t_t, alpha=0.4, label_smoothing=0.2, entropy_weight=0.3,
            standardize=True, teacher_grad=True, backend=backend, reduction="none",
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, [leaf.requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("backend", FUSED)
def test_metrics_are_those_of_the_scores(backend):
    student, teacher = (x.float().to(DEVICE) for x in logits(5, 12))
    labels = torch.arange(5, device=DEVICE)
    settings = {"temperature": 2.0, "return_metrics": True}
    _, metrics = fastkd.distillation_loss(
        student, teacher, labels, standardize=True, backend=backend, **settings
    )
    _, plain = defined(standardized(student), standardized(teacher), **settings)
    for name in ("kd", "student_entropy", "teacher_entropy", "agreement"):
        assert_close(getattr(metrics, name), getattr(plain, name))
    assert_close(metrics.ce, F.cross_entropy(student.double(), labels, reduction="none"))


# --- what the scale does ---------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", KINDS, ids=str)
def test_scale_and_shift_of_either_side_change_nothing(divergence, backend):
    student, teacher = pair(backend, 8, 30)
    settings = {"divergence": divergence, "temperature": 2.0, "standardize": True}
    loss, gradient = run(student, teacher, backend=backend, **settings)
    for scale in (0.1, 0.3, 3.0, 10.0):
        value, same = run(student, scale * teacher - 1, backend=backend, **settings)
        assert_close(value, loss.double())
        assert_close(same, gradient.double(), "gradient")
        value, scaled = run(scale * student + 1, teacher, backend=backend, **settings)
        assert_close(value, loss.double())
        assert_close(scaled * scale, gradient.double(), "gradient")


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("divergence", KINDS, ids=str)
def test_the_gradient_moves_neither_mean_nor_scale(divergence, mode, backend):
    student, teacher = (x.float() for x in logits(8, 30))
    _, gradient = run(
        student, teacher, divergence=divergence, standardize=True, entropy_weight=0.2,
        gradient=mode, backend=backend,
    )  # fmt: skip
    size = gradient.norm(dim=-1)
    centred = (student - student.mean(-1, keepdim=True)).to(DEVICE)
    assert (gradient.sum(-1).abs() < 1e-5 * size).all()
    assert ((gradient * centred).sum(-1).abs() < 1e-5 * size * centred.norm(dim=-1)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_one_value_are_uniform_without_gradient(backend):
    student, teacher = pair(backend, 5, 21)
    student[0], student[1], teacher[2] = 0.1, -1e4, 0.1
    student[3, 1:] = -math.inf  # the teacher's mass is elsewhere
    labels = torch.tensor([0, 0, 0, 0, -100])
    loss, gradient = run(
        student, teacher, labels, standardize=True, reduction="none", entropy_weight=0.1,
        backend=backend,
    )  # fmt: skip
    p = standardized(teacher).softmax(-1)
    entropy = -(p * p.log()).sum(-1)[:2]
    assert_close(loss[:2], math.log(21) - entropy + 0.1 * math.log(21))
    q = standardized(student).softmax(-1)[2]
    assert_close(loss[2], -math.log(21) - q.log().mean() - 0.1 * (q * q.log()).sum())
    assert loss[3] == math.inf
    assert gradient[[0, 1, 3, 4]].abs().max() < 1e-20
    assert gradient[2].abs().max() > 1e-4


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("mode", MODES)
def test_masks_of_one_side(mode, backend):
    student, teacher = (x.float() for x in logits(2, 40))
    student[0, 3:7] = teacher[1, 2] = -math.inf
    settings = {"gradient": mode, "temperature": 2.0, "standardize": True, "backend": backend}
    check(student[1:], teacher[1:], reduction="sum", **settings)
    loss, gradient = run(student[:1], teacher[:1], reduction="sum", **settings)
    assert loss == math.inf
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_count_nowhere_may_hold_nan(backend):
    student, teacher = pair(backend, 4, 9)
    settings = {"standardize": True, "entropy_weight": 0.1}
    true, true_gradient = truth(student[:2], teacher[:2], **settings)
    student[2], teacher[2] = math.nan, math.nan
    student[3] = -math.inf  # counts, as 0
    weight = torch.tensor([True, True, False, False], device=DEVICE)
    temperature = torch.ones(4, device=DEVICE, requires_grad=True)
    for heated in (1.0, temperature):
        loss, gradient = run(
            student, teacher, weight=weight, temperature=heated, backend=backend, **settings
        )
        assert_close(loss, true)
        assert_close(gradient[:2], true_gradient, "gradient")
        assert_zero(gradient[2:])
    assert temperature.grad.isfinite().all()
    loss, gradient = run(student[3:], teacher[3:] * 0 + 1, backend=backend, **settings)
    assert_zero(loss)
    assert_zero(gradient)


@pytest.mark.parametrize("backend", FUSED)
def test_inplace_and_expanded(backend):
    student, teacher = (x.to(DEVICE).float() for x in logits(4, 9))
    teacher = teacher[:1].expand(4, -1)
    leaf = student.clone().requires_grad_()
    hidden = leaf * 2
    settings = {"standardize": True, "entropy_weight": 0.1, "backend": backend}
    loss = fastkd.distillation_loss(hidden, teacher, inplace=True, **settings)
    loss.backward()
    expected, gradient = run(student * 2, teacher, gradient="forward", **settings)
    assert torch.equal(loss, expected)
    assert torch.equal(hidden.detach(), gradient)


def test_torch_func():
    student, teacher = (x.float() for x in logits(4, 9))

    def loss(z):
        return fastkd.distillation_loss(z, teacher, standardize=True, backend="torch")

    gradient = torch.func.grad(loss)(student)
    assert_close(gradient, truth(student, teacher, standardize=True)[1].cpu(), "gradient")


# --- the moments themselves ------------------------------------------------------------------


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("columns", [9, 75, 300, 1000])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_moments(offset, columns, backend):
    """Of rows dense, masked in part, far from 0, with an outlier, strided."""
    x = offset + torch.randn(2, 3, columns + 3, device=DEVICE)[..., :columns]
    x[0, 1, ::2] = -math.inf
    x[1, 2, 0] = -1e4
    x[1, 1] = 0.1
    out = moments._moments(x, x.half(), None, columns, backend, "")
    assert torch.isfinite(out).all()
    for rows, side in zip(out, (x, x.half()), strict=True):
        for row in range(6):
            kept = side.flatten(0, 1)[row].double()
            kept = kept[kept > -math.inf]
            mean, width, width_slope = rows[:, row]
            assert_close(mean, kept.mean())
            if row == 4:
                assert width == problem.FLAT
                assert width_slope == 0
            else:
                assert_close(width, kept.std() + 1e-7)
                assert_close(width_slope, 1 / ((len(kept) - 1) * kept.std()))


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("plan", SCHEDULES)
def test_moments_of_every_schedule(plan, force):
    force(plan)
    x, y = torch.randn(2, 1, 5, 75, device=DEVICE)
    counted = torch.tensor([True, False, True, True, True], device=DEVICE)
    x[0, 1] = math.nan
    out, true = (moments._moments(x, y, counted, 70, b, "") for b in ("triton", "torch"))
    for field in range(3):
        assert_close(out[:, field], true[:, field].double())


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("plan", SCHEDULES)
def test_moments_where_a_thread_meets_masked_columns_first(plan, force):
    force(plan)
    x, y = torch.randn(2, 1, 3, 75, device=DEVICE)
    x[..., :20] = -math.inf
    out = moments._moments(x, y, None, 75, "triton", "")
    kept = x[0, :, 20:].double()
    assert_close(out[0, 0], kept.mean(-1))
    assert_close(out[0, 1], kept.std(-1) + 1e-7)


def test_fp64_has_all_its_digits():
    student, teacher = logits(3, 7)
    ours, reference = (
        fastkd.distillation_loss(student, teacher, standardize=True, backend=name)
        for name in ("torch", "reference")
    )
    assert (ours - reference).abs() < 1e-12 * reference
