"""Schedules, adaptive and learned temperatures."""

from __future__ import annotations

import math
import pickle

import pytest
import torch

import fastkd
from fastkd.temperature import (
    Annealing,
    Constant,
    Cosine,
    Exponential,
    LearnableTemperature,
    Linear,
    TwoStage,
    by_entropy,
    dtkd,
    ttm,
)
from tests.cases import logits
from tests.closeness import assert_close, assert_zero

SCHEDULES = [
    Constant(4.0),
    Linear(8.0, 1.0, 10),
    Cosine(8.0, 1.0, 10),
    Exponential(8.0, 1.0, 10),
    TwoStage(8.0, 1.0, 5),
]


def positive_logits(*shape):
    student, teacher = logits(*shape)
    return student + 10, teacher + 10


# --- schedules -------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_schedules_never_rise_hold_their_end_and_are_values(schedule):
    path = [schedule(step) for step in range(30)]
    assert all(type(value) is float for value in path)
    assert path == sorted(path, reverse=True)
    assert path[0] == (4.0 if isinstance(schedule, Constant) else 8.0)
    assert path[10:] == [path[10]] * 20
    assert path[10] == (4.0 if isinstance(schedule, Constant) else 1.0)
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    with pytest.raises(AttributeError):
        schedule.start = 2.0


def test_schedules_halfway():
    assert Linear(8.0, 2.0, 10)(5) == 5.0
    assert Cosine(8.0, 2.0, 10)(5) == pytest.approx(5.0)
    assert Cosine(8.0, 2.0, 3)(1) == pytest.approx(6.5)
    assert Exponential(8.0, 2.0, 10)(5) == pytest.approx(4.0)
    assert TwoStage(8.0, 2.0, 5)(4) == 8.0
    assert TwoStage(8.0, 2.0, 5)(5) == 2.0


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Constant(0.0), ValueError, "Constant: value .* > 0, got 0.0"),
        (lambda: Linear(8.0, 0, 10), ValueError, "Linear: end .* > 0, got 0"),
        (lambda: Exponential(math.inf, 1.0, 10), ValueError, "Exponential: start .* finite"),
        (lambda: Cosine("8", 1.0, 10), TypeError, "Cosine: start must be a number, got str"),
        (lambda: Linear(8.0, 1.0, 0), ValueError, "Linear: steps must be at least 1, got 0"),
        (lambda: TwoStage(8.0, 1.0, 2.5), TypeError, "TwoStage: steps .* whole number, got float"),
        (lambda: ttm(-1.0), ValueError, "ttm: temperature .* > 0, got -1.0"),
        (lambda: LearnableTemperature(initial=30.0), ValueError, "low < initial < high .*30.0"),
        (lambda: LearnableTemperature(ramp=-1), ValueError, "ramp must be at least 0, got -1"),
        (lambda: LearnableTemperature(classes=3)(0), TypeError, r"\(step, student, teacher\)"),
        (
            lambda: dtkd(*logits(4, 5), sharpness="lse"),
            ValueError,
            "sharpness must be one of max, logsumexp, got 'lse'",
        ),
        (
            lambda: dtkd(-torch.ones(4, 5), torch.ones(4, 5)),
            ValueError,
            "student needs a positive max, got -1: subtract the mean",
        ),
        (lambda: by_entropy(*logits(4, 5), low=0.0), ValueError, "by_entropy: low .* got 0.0"),
        (lambda: by_entropy(*logits(4, 5), of="me"), ValueError, "of must be one of teacher"),
        (
            lambda: dtkd(torch.ones(4, 5), torch.ones(3, 5)),
            ValueError,
            "equal leading shapes",
        ),
    ],
)
def test_wrong_arguments_are_named(make, error, words):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize("schedule", [s for s in SCHEDULES if isinstance(s, Annealing)])
def test_annealing_upwards_mirrors_annealing_downwards(schedule):
    upwards = type(schedule)(schedule.end, schedule.start, schedule.steps)
    for step in range(11):
        assert upwards(step) == pytest.approx(schedule(10 - step))


# --- adaptive --------------------------------------------------------------------------------


@pytest.mark.parametrize("sharpness", ["max", "logsumexp"])
def test_dtkd_equalises_sharpness_and_keeps_the_average(sharpness):
    student, teacher = positive_logits(2, 6, 12)
    rows = dtkd(student, teacher, 3.0, sharpness)
    assert rows.student.shape == rows.teacher.shape == (2, 6)
    assert_close((rows.student + rows.teacher) / 2, torch.full((2, 6), 3.0))
    measure = torch.amax if sharpness == "max" else torch.logsumexp
    assert_close(measure(student, -1) / rows.student, measure(teacher, -1) / rows.teacher)
    assert (rows.student.std() > 0.01).all()


def test_by_entropy_falls_with_the_entropy_of_the_side_asked_for():
    student, teacher = logits(50, 12)
    _, metrics = fastkd.distillation_loss(student, teacher, return_metrics=True)
    for of in ("teacher", "student"):
        rows = by_entropy(student, teacher, low=1.5, high=6.0, of=of)
        entropy = getattr(metrics, f"{of}_entropy")
        assert_close(rows.student, 6.0 - 4.5 * entropy / math.log(12))
        assert rows.student is rows.teacher
    masked = teacher.index_fill(1, torch.tensor([0, 3]), -math.inf)
    assert by_entropy(student, masked).teacher.isfinite().all()


@pytest.mark.parametrize(
    "rule",
    [
        lambda s, t: dtkd(s, t, 2.0, "max"),
        lambda s, t: dtkd(s, t, 2.0, "logsumexp"),
        by_entropy,
        lambda s, t: by_entropy(s, t, of="student"),
    ],
    ids=["dtkd-max", "dtkd-logsumexp", "entropy-teacher", "entropy-student"],
)
def test_adaptive_rules_work_with_the_loss_in_value_and_gradient(rule):
    student, teacher = (x.requires_grad_() for x in positive_logits(3, 6))

    def loss(s, t, backend="torch"):
        rows = rule(s, t)
        return fastkd.distillation_loss(
            s, t, temperature=rows.student, teacher_temperature=rows.teacher,
            teacher_grad=True, backend=backend, gradient="backward",
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, (student, teacher))
    assert_close(loss(student, teacher), loss(student, teacher, "reference"))
    plain = fastkd.distillation_loss(student, teacher, temperature=2.0, teacher_grad=True)
    assert not torch.isclose(loss(student, teacher), plain)


# --- learned ---------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [None, 6])
@pytest.mark.parametrize(("step", "reversal"), [(0, 0.0), (5, 0.5), (10, 1.0), (99, 1.0)])
def test_learnable_temperature_reverses_its_gradient_along_the_ramp(classes, step, reversal):
    student, teacher = logits(4, 6)
    module = LearnableTemperature(initial=4.0, ramp=10, classes=classes).double()
    temperature = module(step, student.requires_grad_(), teacher)
    assert temperature.shape == (() if classes is None else (4,))
    if classes is None:
        assert temperature.item() == pytest.approx(4.0)
    (ours,) = torch.autograd.grad(
        fastkd.distillation_loss(student, teacher, temperature=temperature), module.theta
    )
    leaf = temperature.detach().requires_grad_()
    (upstream,) = torch.autograd.grad(
        fastkd.distillation_loss(student, teacher, temperature=leaf), leaf
    )
    share = (temperature.detach() - 1) / 20
    truth = -reversal * (upstream * 20 * share * (1 - share)).sum()
    if reversal:
        assert_close(ours, truth, "gradient")
    else:
        assert_zero(ours)


def test_learnable_temperature_climbs_while_the_student_descends():
    student, teacher = (x.float() for x in logits(64, 6))
    student.requires_grad_()
    module = LearnableTemperature(initial=4.0)
    loss = fastkd.distillation_loss(student, teacher, temperature=module(0))
    loss.backward()
    with torch.no_grad():
        module.theta -= 0.1 * module.theta.grad
        worse = fastkd.distillation_loss(student, teacher, temperature=module(0))
        better = fastkd.distillation_loss(student - student.grad, teacher, temperature=4.0)
    assert better < loss < worse


def test_learnable_temperature_per_row_trains_its_network_and_not_the_student():
    student, teacher = (x.float().requires_grad_() for x in logits(2, 5, 6))
    module = LearnableTemperature(classes=6)
    temperature = module(0, student, teacher)
    assert temperature.shape == (2, 5)
    assert (temperature > 1).all()
    assert (temperature < 21).all()
    temperature.sum().backward()
    assert student.grad is None
    assert teacher.grad is None
    assert all(weight.grad.abs().sum() > 0 for weight in module.parameters())
    again = LearnableTemperature(classes=6)
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(0, student, teacher), temperature)


# --- settings ------------------------------------------------------------------------------


def test_ttm_is_the_teacher_alone_at_a_temperature():
    student, teacher = logits(4, 6)
    p, log_q = (teacher / 4).softmax(-1), student.log_softmax(-1)
    truth = torch.nn.functional.kl_div(log_q, p, reduction="batchmean")
    assert_close(fastkd.distillation_loss(student, teacher, **ttm(4.0)), truth)
    assert_close(fastkd.DistillationLoss(**ttm(4.0))(student, teacher), truth)
