"""Labels that are a distribution over the classes, as of mixup: against the oracle."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import fastkd
from fastkd import chunks
from tests.cases import logits
from tests.closeness import assert_close, assert_zero
from tests.running import BACKENDS, FUSED, check, check_everything, defined, run, truth

ROWS, VOCAB = 10, 23
MODES = ["forward", "backward"]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    for budget in ("CPU_BYTES", "GPU_BYTES"):
        monkeypatch.setattr(chunks, budget, 3 * 4 * VOCAB * 4 * 5 // 4 + 1)
    monkeypatch.setattr(chunks, "LEAST_ROWS", 4)


def mixup(rows=ROWS, columns=VOCAB, share=0.7):
    """Two classes to a row."""
    one, other = torch.randint(columns, (2, rows))
    return share * F.one_hot(one, columns) + (1 - share) * F.one_hot(other, columns)


def sides(**kind):
    return (x.float() for x in logits(ROWS, VOCAB, **kind))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_every_option(mode, backend):
    student, teacher = sides()
    for labels in (mixup(), torch.rand(ROWS, VOCAB)):
        check(
            student, teacher, labels, backend=backend, gradient=mode, alpha=0.3,
            label_smoothing=0.1, entropy_weight=0.2, temperature=1.7,
            weight=torch.rand(ROWS) + 0.2, divergence="jeffreys",
        )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_metrics_and_all_gradients(backend):
    student, teacher = sides()
    check_everything(
        student, teacher, torch.randn(ROWS, VOCAB).softmax(-1), backend=backend, alpha=0.4,
        temperature=torch.tensor(1.3), label_smoothing=0.2, standardize=True,
        weight=torch.rand(ROWS) + 0.1, reduction="none",
    )  # fmt: skip


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_as_cross_entropy(alpha, backend):
    """At alpha = 0 that of PyTorch; at 1 labels are for the metrics."""
    student, teacher = sides()
    labels = mixup()
    loss, gradient = run(student, teacher, labels, alpha=alpha, backend=backend)
    if alpha == 1:
        assert_close(loss, defined(student, teacher)[0])
        return
    leaf = student.double().requires_grad_()
    F.cross_entropy(leaf, labels.double()).backward()
    assert_close(gradient, leaf.grad, "gradient")


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, backend):
    student, teacher = (x.to(dtype) for x in sides())
    check(student, teacher, mixup(), alpha=0.2, backend=backend)


def test_a_gradient_that_is_small_keeps_its_digits_in_half_precision():
    """Labels near the student's own distribution, whose gradient is 1e-3 of the parts it has."""
    student = torch.randn(ROWS, VOCAB).bfloat16()
    labels = (student.double() + 0.01 * torch.randn(ROWS, VOCAB)).softmax(-1)
    _, gradient = run(student, student, labels.float(), alpha=0.0, reduction="sum")
    _, true = truth(student, student, labels, alpha=0.0, reduction="sum")
    assert_close(gradient.float(), true.bfloat16().double(), "gradient", gradient * 0 + true * 1.01)
    assert (gradient.double() - true).abs().max() < 0.01 * true.abs().max()


@pytest.mark.parametrize("backend", FUSED)
def test_beside_heads_lists_and_ensembles(backend, on_device):
    student, teacher = sides()
    labels, settings = mixup(), {"alpha": 0.3, "backend": backend}
    hidden = torch.randn(ROWS, 5, requires_grad=True)
    weight = torch.randn(VOCAB, 5)
    top = fastkd.TopK.from_logits(teacher, VOCAB)
    mixed = fastkd.Ensemble([teacher, teacher])
    head = fastkd.LinearHead(hidden, weight)
    exact = hidden.detach().double().requires_grad_()
    true, _ = defined(exact @ weight.double().mT, teacher, labels, alpha=0.3)
    true.backward()
    for form in (teacher, top, mixed):
        hidden.grad = None
        loss = fastkd.distillation_loss(head, form, labels, **settings)
        loss.backward()
        assert_close(loss, true)
        assert_close(hidden.grad, exact.grad, "gradient")
    loss, gradient = run(student, top, labels, **settings)
    true_loss, true_gradient = truth(student, teacher, labels, alpha=0.3)
    assert_close(loss, true_loss)
    assert_close(gradient, true_gradient, "gradient")


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_padding_and_rows_that_do_not_count(backend):
    """-inf where labels say 0, and where they do not; dead rows; NaN in a row of weight 0."""
    student, teacher = (torch.cat([x, x[:, :2]], -1) for x in sides())
    labels = mixup()
    labels[:, 0] = 0
    labels[1, 3] = 0.9
    labels[6] = 0
    student[:, 0] = teacher[:, 0] = -math.inf
    student[1, 3] = teacher[1, 3] = -math.inf
    student[2], teacher[3] = -math.inf, -math.inf
    weight = torch.ones(ROWS)
    weight[4] = 0
    student[4] = math.nan
    settings = {"alpha": 0.5, "weight": weight, "vocab_size": VOCAB, "reduction": "none"}
    loss, gradient = run(student, teacher, labels, backend=backend, **settings)
    true_loss, true_gradient = truth(student, teacher, labels, **settings)
    assert_close(loss, true_loss)
    assert loss[1] == math.inf
    assert_close(gradient, true_gradient, "gradient")
    for dead in (2, 3, 4):
        assert_zero(gradient[dead])


@pytest.mark.parametrize("backend", FUSED)
def test_a_row_without_labels_is_zero(backend):
    student, teacher = sides()
    labels, settings = mixup(), {"alpha": 0.0, "reduction": "none", "backend": backend}
    labels[0] = 0
    student[0, labels[0].argmax()] = -math.inf
    loss, gradient = run(student, teacher, labels, **settings)
    assert loss[0] == 0
    assert_zero(gradient[0])


def test_inplace_and_dim():
    student, teacher = (torch.randn(2, VOCAB, 3, 2) for _ in range(2))
    labels = torch.randn(2, VOCAB, 3, 2).softmax(1)
    settings = {"alpha": 0.5, "dim": 1, "reduction": "none"}
    loss, gradient = run(student, teacher, labels, **settings)
    moved = [x.movedim(1, -1) for x in (student, teacher, labels)]
    true_loss, true_gradient = truth(*moved, alpha=0.5, reduction="none")
    assert_close(loss, true_loss)
    assert_close(gradient, true_gradient.movedim(-1, 1), "gradient")
    leaf = moved[0].clone().requires_grad_()
    fastkd.distillation_loss(leaf * 1, *moved[1:], alpha=0.5, inplace=True).backward()
    assert_close(leaf.grad, truth(*moved, alpha=0.5)[1], "gradient")


@pytest.mark.slow
def test_compiled():
    student, teacher = sides()
    labels = mixup()

    def call(z):
        return fastkd.distillation_loss(z, teacher, labels, alpha=0.5)

    plain, compiled = (student.clone().requires_grad_() for _ in range(2))
    call(plain).backward()
    torch.compile(call, fullgraph=True, backend="aot_eager")(compiled).backward()
    assert torch.equal(plain.grad, compiled.grad)


@pytest.mark.parametrize(
    ("labels", "settings", "message"),
    [
        (torch.rand(ROWS, VOCAB - 1), {}, r"distribution over the vocabulary, \(10, 23\)"),
        (torch.rand(ROWS, VOCAB, requires_grad=True), {}, "detach"),
        (-torch.rand(ROWS, VOCAB), {}, "must be probabilities"),
        (torch.full((ROWS, VOCAB), math.nan), {}, "must be probabilities"),
        (torch.rand(ROWS, VOCAB), {"ignore_index": 3}, "`weight`"),
    ],
)
def test_refused(labels, settings, message):
    with pytest.raises(ValueError, match=message):
        fastkd.distillation_loss(*sides(), labels, alpha=0.5, **settings)
    top = fastkd.TopK.from_logits(torch.randn(ROWS, VOCAB), 3, tail="label")
    with pytest.raises(ValueError, match="one true token"):
        fastkd.distillation_loss(torch.randn(ROWS, VOCAB), top, mixup(), alpha=0.5)


@pytest.mark.parametrize("mode", MODES)
def test_no_rows(mode):
    student = torch.randn(2, 0, VOCAB, requires_grad=True)
    loss = fastkd.distillation_loss(
        student, torch.randn(2, 0, VOCAB), torch.rand(2, 0, VOCAB), alpha=0.5, gradient=mode
    )
    loss.backward()
    assert loss == 0
    assert student.grad.shape == student.shape


@pytest.mark.parametrize("mode", MODES)
def test_few_rows_count_in_half_precision(mode):
    student, teacher = sides()
    weight = torch.zeros(ROWS)
    weight[3] = 1.0
    check(
        student.bfloat16(), teacher, mixup(), backend="torch", gradient=mode, alpha=0.3,
        weight=weight,
    )  # fmt: skip
