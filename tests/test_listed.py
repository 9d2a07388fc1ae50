"""The kernels beside a teacher that lists some columns: schedules, places in memory, and when."""

from __future__ import annotations

import math

import pytest
import torch

import fastkd
from tests.closeness import assert_close, assert_zero
from tests.conftest import DEVICE
from tests.running import NO_TRITON, defined
from tests.test_events import events

pytestmark = NO_TRITON
ROWS, VOCAB = 3, 150


def sides(k: int, *, dtype=torch.float32):
    student, other = torch.randn(ROWS, VOCAB) * 2, torch.randn(ROWS, VOCAB) * 2
    return student.to(DEVICE, dtype), fastkd.TopK.from_logits(other.to(DEVICE), k)


def rows_of(leaf, teacher, labels, temperature=1.0):
    """kd + ce + entropy of each row, by definition."""
    q, p = events(leaf, teacher, temperature)
    kd, _ = defined(q, p, divergence="jeffreys", reduction="none")
    tempered = (leaf / temperature).log_softmax(-1)
    entropy = -(tempered.exp() * tempered).sum(-1)
    ce = torch.nn.functional.cross_entropy(leaf, labels, reduction="none", label_smoothing=0.1)
    return 0.5 * kd + 0.5 * ce + 0.3 * entropy


OPTIONS = {
    "divergence": "jeffreys", "alpha": 0.5, "label_smoothing": 0.1, "entropy_weight": 0.3,
    "teacher_temperature": 1.0, "backend": "triton", "scale_by_temperature": False,
}  # fmt: skip


@pytest.mark.parametrize("k", [5, 100])
@pytest.mark.parametrize("place", ["whole", "slice", "in place"])
@pytest.mark.parametrize("plan", ["sweep", "split"])
def test_rows_in_several_tiles(plan, place, k, force):
    """Columns listed in every word of the marks, labels in and out of the list, rows that begin
    anywhere, and rows of several programs, one of which could write over what another reads."""
    force(plan)
    student, teacher = sides(k)
    labels = torch.tensor([VOCAB - 1, 0, 0], device=DEVICE)
    labels[1] = teacher.indices[1, 2]
    leaf = student.double().requires_grad_()
    truth = rows_of(leaf, teacher, labels).sum()
    truth.backward()
    if place == "slice":
        wide = torch.full((ROWS, VOCAB + 5), math.nan, device=DEVICE)
        wide[:, 3 : 3 + VOCAB] = student
        student = wide[:, 3 : 3 + VOCAB]
    ours = student.detach().requires_grad_()
    given = ours.clone() if place == "in place" else ours
    loss = fastkd.distillation_loss(
        given, teacher, labels, inplace=place == "in place", reduction="sum", **OPTIONS
    )
    loss.backward()
    assert_close(loss, truth)
    assert_close(ours.grad, leaf.grad, "gradient")


@pytest.mark.parametrize("plan", ["sweep", "split"])
def test_the_temperature_of_each_row(plan, force):
    force(plan)
    student, teacher = sides(9)
    labels = teacher.indices[:, 0].contiguous()
    warm = torch.tensor([0.7, 1.0, 2.5], device=DEVICE)
    leaf, exact = student.double().requires_grad_(), warm.double().requires_grad_()
    truth = rows_of(leaf, teacher, labels, exact[:, None])
    ours, temperature = student.requires_grad_(), warm.clone().requires_grad_()
    loss = fastkd.distillation_loss(
        ours, teacher, labels, temperature=temperature, reduction="none", **OPTIONS
    )
    upstream = torch.tensor([0.5, -1.5, 2.0], device=DEVICE)
    (truth * upstream).sum().backward()
    (loss * upstream).sum().backward()
    assert_close(loss, truth)
    assert_close(ours.grad, leaf.grad, "gradient")
    assert_close(temperature.grad, exact.grad, "gradient")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_padded_columns(dtype):
    student, teacher = sides(5, dtype=dtype)
    leaf = student.double().requires_grad_()
    labels = torch.tensor([7, 8, 9], device=DEVICE)
    truth = rows_of(leaf, teacher, labels).sum()
    truth.backward()
    ours = torch.nn.functional.pad(student, (0, 2), value=math.nan).requires_grad_()
    loss = fastkd.distillation_loss(
        ours, teacher, labels, reduction="sum", vocab_size=VOCAB, **OPTIONS
    )
    loss.backward()
    assert_close(loss, truth)
    assert_close(ours.grad[:, :VOCAB], leaf.grad, "gradient")
    assert_zero(ours.grad[:, VOCAB:])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_row_that_is_masked_throughout_counts_0(backend):
    student, teacher = sides(5)
    student[1] = -math.inf
    student.requires_grad_()
    loss = fastkd.distillation_loss(student, teacher, reduction="none", backend=backend)
    loss.sum().backward()
    assert_zero(loss[1])
    assert_zero(student.grad[1])
    assert loss[0] > 0
    assert student.grad[0].count_nonzero()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("divergence", ["forward_kl", "jeffreys"])
def test_an_infinite_row_has_a_finite_gradient_to_its_temperature(divergence, backend):
    """The student masks what the teacher lists."""
    student, teacher = sides(5)
    student[1, teacher.indices[1, 2]] = -math.inf
    found = []
    for rows in (student, student[[0, 2]]):
        T = torch.tensor(1.5, device=DEVICE, requires_grad=True)
        some = [0, 1, 2] if len(rows) == ROWS else [0, 2]
        loss = fastkd.distillation_loss(
            rows, fastkd.TopK(teacher.indices[some], teacher.log_probs[some]), temperature=T,
            teacher_temperature=1.0, divergence=divergence, reduction="none", backend=backend,
        )  # fmt: skip
        loss.sum().backward()
        found.append(T.grad)
        assert loss.isinf().any() == (len(rows) == ROWS)
    assert found[0].isfinite()
    assert found[0] != found[1]  # its finite part is there


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_is_broken_comes_out(broken, backend):
    """Of a listed column and of another; in the gradients to all of the row and its temperature."""
    student, teacher = sides(5)
    student[0, teacher.indices[0, 1]] = broken
    free = [i for i in range(VOCAB) if i not in teacher.indices[1]]
    student[1, free[0]] = broken
    for tail in ("bucket", "drop"):
        given = fastkd.TopK(teacher.indices, teacher.log_probs, tail)
        for mode in ("forward", "backward"):
            leaf, heat = student.clone().requires_grad_(), torch.ones(ROWS, device=DEVICE)
            loss = fastkd.distillation_loss(
                leaf, given, temperature=heat.requires_grad_(mode == "backward"),
                teacher_temperature=1.0, backend=backend, gradient=mode, reduction="sum",
            )  # fmt: skip
            loss.backward()
            assert loss.isnan()
            for found in (leaf.grad, heat.grad):
                if found is not None:
                    assert found[:2].isnan().all(), (tail, mode)
                    assert found[2].isfinite().all(), (tail, mode)


def test_what_the_kernel_has_comes_to_it(monkeypatch):
    """Nothing else does, and nothing is computed by both."""
    from fastkd.kernels import events as launcher

    calls = []
    launch = launcher._launch
    monkeypatch.setattr(launcher, "_launch", lambda *a, **b: calls.append(1) or launch(*a, **b))
    student, teacher = sides(5)

    dropped = fastkd.TopK(teacher.indices, teacher.log_probs, tail="drop")
    for given, divergence, backend, expected in (
        (teacher, "forward_kl", "triton", 1), (dropped, "forward_kl", "triton", 1),
        (dropped, fastkd.Renyi(2.0), "triton", 0), (teacher, "forward_kl", "torch", 0),
    ):  # fmt: skip
        calls.clear()
        fastkd.distillation_loss(student, given, divergence=divergence, backend=backend)
        assert len(calls) == expected, (divergence, backend)


@pytest.mark.parametrize("labelled", [False, True])
def test_a_compiled_function_gives_the_same(labelled):
    student, teacher = sides(5)
    labels = teacher.indices[:, 1].contiguous() if labelled else None

    def loss(x, indices, log_probs, tail):
        given = fastkd.TopK(indices, log_probs, tail_log_prob=tail)
        return fastkd.distillation_loss(
            x, given, labels, alpha=0.5 if labelled else 1.0, gradient="backward", backend="triton"
        )

    gradients = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        leaf = student.clone().requires_grad_()
        function(leaf, teacher.indices, teacher.log_probs, teacher.tail_log_prob).backward()
        gradients.append(leaf.grad)
    assert gradients[0].count_nonzero()
    assert torch.equal(*gradients)
