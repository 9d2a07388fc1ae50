"""A divergence that looks at the label of a row, as DKD does: one of a test's own."""

from __future__ import annotations

import math

import pytest
import torch

import fastkd
from fastkd.divergences.pair import plogr
from tests.cases import logits
from tests.closeness import assert_close
from tests.conftest import DEVICE
from tests.running import FUSED, NO_TRITON, assert_everything_close, everything
from tests.schedules import SCHEDULES

try:
    import triton
    import triton.language as tl

    from fastkd.kernels.divergences import Device
except ImportError:
    ON_DEVICE = ON_DEVICE_TOO = None
else:
    # By textbook, with c the sum of the slopes: nothing here is held to digits.

    @triton.jit
    def terms(lp, lq, p, q, d, d2, c, a, b):
        return p * tl.where(p > 0, d, 0.0), -p - q * c

    @triton.jit
    def shares(label):
        p, q = 1 / (1 + tl.exp2(-label.t_odds)), 1 / (1 + tl.exp2(-label.s_odds))
        return p, q, p * tl.log(p / q) + (1 - p) * tl.log((1 - p) / (1 - q))

    @triton.jit
    def outer(total, c, a, b, label):
        _, _, target = shares(label)
        return a * target + b * total

    @triton.jit
    def at_label(total, c, a, b, label):
        p, q, _ = shares(label)
        return b, a * (q - p)

    @triton.jit
    def curved_outer(total, c, a, b, label):
        _, q, target = shares(label)
        return tl.sqrt(a + total) * target - b * tl.log(q)

    @triton.jit
    def curved_at_label(total, c, a, b, label):
        p, q, target = shares(label)
        root = tl.sqrt(a + total)
        return target / (2 * root), root * (q - p) - b * (1 - q)

    ON_DEVICE = Device(terms, outer, at_label=at_label)
    ON_DEVICE_TOO = Device(terms, curved_outer, at_label=curved_at_label)

N, V = 6, 12
LABEL_AWARE = [
    fastkd.DKD(),
    fastkd.DKD(1.0, 0.0),
    fastkd.DKD(0.0, 2.0),
    fastkd.NKD(),
    fastkd.NKD(0.0),
]
LABELS = torch.tensor([3, 0, -100, 11, 7, 2], device=DEVICE)


class Decoupled(fastkd.Divergence):
    """a * KL of (label, rest) + b * KL of the rest alone (Zhao et al. 2022, arXiv 2203.08679)."""

    name = "decoupled"
    label_aware = True
    parameters = (0.7, 1.3)
    device = ON_DEVICE

    @staticmethod
    def value(lp, lq, a, b):
        return plogr(lp, lp - lq)

    @staticmethod
    def outer(total, a, b, lp, lq):
        p, rest_p, rest_q = lp.exp(), torch.log1p(-lp.exp()), torch.log1p(-lq.exp())
        known = p * (lp - lq)
        target = known + (1 - p) * (rest_p - rest_q)
        rest = (total - known) / (1 - p) - rest_p + rest_q
        return a * target + b * rest


class Curved(fastkd.Divergence):
    """sqrt(a + KL of the rest) * KL of (label, rest) - b log q: the one factor needs the other."""

    name = "curved"
    label_aware = True
    parameters = (0.7, 1.3)
    device = ON_DEVICE_TOO

    @classmethod
    def of_rows(cls, lp, lq, a, b, labels=None):
        pair_p, rest_p, pair_q, rest_q = (x for side in (lp, lq) for x in _apart(side, labels))
        target, others = _kl(pair_p, pair_q), _kl(rest_p, rest_q)
        return (a + others).sqrt() * target - b * pair_q[:, 0]


def _apart(logs, labels):
    label = torch.nn.functional.one_hot(labels.long(), V).bool()
    known = logs[label]
    pair = torch.stack([known, torch.log1p(-known.exp())], -1)
    return pair, logs[~label].view(-1, V - 1).log_softmax(-1)


def _kl(lp, lq):
    return (lp.exp() * (lp - lq)).sum(-1)


def _exact(student, teacher, temperature, own):
    """By the events themselves: the label's column and the others, normalised anew."""
    counts = LABELS != -100
    z, y, labels = student[counts] / temperature, teacher[counts] / own, LABELS[counts]
    label = torch.nn.functional.one_hot(labels, V).bool()
    sides = []
    for side in (z, y):
        p = side.softmax(-1)
        known = p[label]
        rest = side[~label].view(-1, V - 1).log_softmax(-1)
        sides.append((torch.stack([known, 1 - known], -1).log(), rest))
    (pair_q, rest_q), (pair_p, rest_p) = sides
    target = (pair_p.exp() * (pair_p - pair_q)).sum(-1)
    others = (rest_p.exp() * (rest_p - rest_q)).sum(-1)
    scale = temperature * own
    return (scale * (0.7 * target + 1.3 * others)).mean()


def _leaves():
    student, teacher = (x.float().to(DEVICE) for x in logits(N, V))
    student[2] = torch.nan
    return [student, teacher, torch.tensor(2.0, device=DEVICE), torch.tensor(1.5, device=DEVICE)]


@pytest.mark.parametrize("backend", ["reference", *FUSED])
@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_value_and_gradient(mode, backend):
    student, teacher, temperature, own = _leaves()
    leaf = student.clone().requires_grad_()
    loss = fastkd.distillation_loss(
        leaf, teacher, LABELS, divergence=Decoupled(), temperature=temperature,
        teacher_temperature=own, gradient=mode, backend=backend,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, leaf)
    exact = student.double().requires_grad_()
    true = _exact(exact, teacher.double(), temperature.double(), own.double())
    assert_close(loss, true)
    (true_gradient,) = torch.autograd.grad(true, exact)
    assert_close(gradient, torch.nan_to_num(true_gradient), "gradient")


@NO_TRITON
@pytest.mark.parametrize("plan", SCHEDULES)
def test_a_factor_of_the_others_that_their_sum_gives(plan, force):
    """It is known when all of the row was seen, hence to no gradient before."""
    force(plan)
    student, teacher, *_ = _leaves()
    for mode in ("forward", "backward"):
        leaf, exact = student.clone().requires_grad_(), student.double().requires_grad_()
        settings = {"divergence": Curved(), "temperature": 2.0, "gradient": mode}
        loss = fastkd.distillation_loss(leaf, teacher, LABELS, backend="triton", **settings)
        true = fastkd.distillation_loss(
            exact, teacher.double(), LABELS, backend="reference", **settings | {"gradient": "auto"}
        )
        assert_close(loss, true)
        gradients = (torch.autograd.grad(*pair)[0] for pair in ((loss, leaf), (true, exact)))
        assert_close(*gradients, "gradient")


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradients_of_teacher_and_temperatures(backend):
    leaves = [x.requires_grad_() for x in _leaves()]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    loss = fastkd.distillation_loss(
        leaves[0], leaves[1], LABELS, divergence=Decoupled(), temperature=leaves[2],
        teacher_temperature=leaves[3], teacher_grad=True, backend=backend,
    )  # fmt: skip
    ours = torch.autograd.grad(loss, leaves)
    for one, true in zip(ours, torch.autograd.grad(_exact(*exact), exact), strict=True):
        assert_close(one, torch.nan_to_num(true), "gradient")


MASKS = {
    "the student's label": ([1], []),
    "the teacher's label": ([], [1]),
    "both labels": ([1], [1]),
    "another of the student": ([2], []),
    "another of the teacher": ([], [2]),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", *FUSED])
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("divergence", LABEL_AWARE, ids=str)
def test_masked_columns(divergence, masks, backend):
    """What is infinite has its finite gradient, a masked entry's too, or none."""
    sides = [x.float() for x in logits(2, 5)]
    for side, columns in zip(sides, MASKS[masks], strict=True):
        side[0, columns] = -math.inf
    settings = {"labels": torch.tensor([1, 3]), "divergence": divergence, "reduction": "none"}
    ours = everything(*sides, backend=backend, **settings)
    assert_everything_close(ours, everything(*sides, backend=None, **settings))


@pytest.mark.parametrize("backend", ["reference", *FUSED])
@pytest.mark.parametrize("divergence", LABEL_AWARE, ids=str)
def test_a_student_without_other_columns_has_no_gradient(divergence, backend):
    """No logit of its changes anything."""
    student, teacher = (x.float() for x in logits(2, 5))
    student[0, [0, 2, 3, 4]] = -math.inf
    ours = everything(
        student, teacher, labels=torch.tensor([1, 3]), divergence=divergence, reduction="none",
        backend=backend,
    )  # fmt: skip
    assert ours["loss"][0] == (0.0 if divergence == fastkd.NKD(0.0) else math.inf)
    for side in ("student", "teacher"):
        assert ours[f"to {side}"][0].abs().max() < 1e-15, side
    assert ours["to student"][1].any()


def test_a_head_beside_it():
    teacher = _leaves()[1]
    hidden = torch.randn(N, V, device=DEVICE).requires_grad_()
    settings = {"divergence": Decoupled(), "temperature": 2.0, "backend": "torch"}
    head = fastkd.LinearHead(hidden, torch.eye(V, device=DEVICE))
    loss = fastkd.distillation_loss(head, teacher, LABELS, **settings)
    plain = fastkd.distillation_loss(hidden, teacher, LABELS, **settings)
    assert_close(loss, plain.double())
    ours, theirs = (torch.autograd.grad(x, hidden)[0] for x in (loss, plain))
    assert_close(ours, theirs.double(), "gradient")


def test_needs_labels_and_logits():
    student, teacher, *_ = _leaves()
    with pytest.raises(ValueError, match=r"Decoupled.* looks at the label of each row"):
        fastkd.distillation_loss(student, teacher, divergence=Decoupled())
    top = fastkd.TopK(torch.zeros(N, 1, dtype=torch.long), torch.full((N, 1), -1.0))
    with pytest.raises(ValueError, match="Decoupled, which looks at labels, needs the teacher's"):
        fastkd.distillation_loss(student, top, LABELS, divergence=Decoupled())
