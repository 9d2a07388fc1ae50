"""Row losses of the literature: values and all gradients against the oracle, limits, identities."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import fastkd
from fastkd import AKL, DIST, DKD, NKD, TAID, AlphaBeta, ToDi
from tests.cases import ROW_LOSSES, logits
from tests.closeness import assert_close, assert_zero
from tests.running import NO_TRITON, check, check_everything, defined, run, truth

ROWS, VOCAB = 7, 19
LN2 = math.log(2)
DTYPES = (torch.float32, torch.float64)
ON_DEVICE = [d for d in ROW_LOSSES if d.has_device_function]
OWN_DUAL = [d for d in ON_DEVICE if isinstance(d, AlphaBeta) or d.dual_on_device]
FUSED = ["torch", pytest.param("triton", marks=NO_TRITON)]
WITH_BACKEND = pytest.mark.parametrize(
    ("divergence", "backend"),
    [(d, "torch") for d in ROW_LOSSES]
    + [pytest.param(d, "triton", marks=NO_TRITON) for d in ON_DEVICE],
    ids=str,
)


def labels_of(rows=ROWS):
    labels = torch.randint(VOCAB - 2, (rows,))
    labels[1] = -100
    return labels


def sides(rows=ROWS, **kind):
    return (x.float() for x in logits(rows, VOCAB, **kind))


def value(divergence, p, q, labels=None):
    """Of probabilities; and its gradient to the student's logits."""
    z = torch.tensor([q], dtype=torch.float64).log().requires_grad_()
    labels = None if labels is None else torch.tensor([labels])
    loss = fastkd.distillation_loss(
        z, torch.tensor([p], dtype=torch.float64).log(), labels, divergence=divergence
    )
    loss.backward()
    return loss.item(), z.grad[0].tolist()


# --- against the oracle ----------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("divergence", ROW_LOSSES, ids=str)
def test_values_metrics_and_all_gradients(divergence, backend):
    student, teacher = sides()
    check_everything(
        student, teacher, labels_of(), backend=backend, divergence=divergence, alpha=0.7,
        temperature=torch.rand(ROWS) + 1, teacher_temperature=torch.tensor(1.4),
        weight=torch.rand(ROWS) + 0.1, reduction="none",
    )  # fmt: skip


@WITH_BACKEND
@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_with_every_option(mode, divergence, backend):
    student, teacher = sides()
    check(
        student, teacher, labels_of(), backend=backend, divergence=divergence, gradient=mode,
        temperature=2.0, alpha=0.6, entropy_weight=0.1, label_smoothing=0.1, vocab_size=VOCAB - 2,
        standardize=mode == "backward", weight=torch.rand(ROWS) + 0.1,
    )  # fmt: skip


@NO_TRITON
@pytest.mark.parametrize("divergence", OWN_DUAL, ids=str)
def test_gradients_of_the_teacher_on_the_device(divergence):
    student, teacher = sides()
    check_everything(
        student, teacher, labels_of(), backend="triton", divergence=divergence, alpha=0.7,
        temperature=torch.tensor(1.3),
    )  # fmt: skip


@WITH_BACKEND
def test_near_each_other(divergence, backend):
    """Where values are small differences: alike but for 1e-2, then far apart."""
    for noise in (1e-2, 4.0):
        (student, teacher), labels = sides(noise=noise), labels_of()
        settings = {"divergence": divergence, "reduction": "sum"}
        loss, gradient = run(student, teacher, labels, backend=backend, **settings)
        true_loss, true_gradient = truth(student, teacher, labels, **settings)
        assert_close(loss, true_loss)
        assert_close(gradient, true_gradient, "gradient")


@pytest.mark.parametrize("divergence", ROW_LOSSES, ids=str)
def test_gradcheck(divergence):
    """Where nothing is held constant the gradient is that of the value."""
    if isinstance(divergence, (TAID, AKL, ToDi)) and divergence != TAID(t=1.0):
        pytest.skip("a constant of the gradient is none of the value")
    student, teacher = logits(3, 6)
    labels = torch.tensor([1, 0, 5])

    def loss(z):
        return fastkd.distillation_loss(
            z, teacher, labels, divergence=divergence, reduction="none", gradient="backward"
        )

    assert torch.autograd.gradcheck(loss, student.requires_grad_())


@pytest.mark.parametrize("divergence", ROW_LOSSES, ids=str)
def test_beside_a_head_and_an_ensemble(divergence):
    student, teacher = sides()
    head = fastkd.LinearHead(student, torch.eye(VOCAB))
    labels = labels_of()
    truth_, _ = defined(student, teacher, labels, divergence=divergence)
    for side in (teacher, fastkd.Ensemble([teacher, teacher])):
        loss = fastkd.distillation_loss(head, side, labels, divergence=divergence, backend="torch")
        assert_close(loss, truth_)


# --- golden values ---------------------------------------------------------------------------

A = [1 / 3, 2 / 3], [2 / 3, 1 / 3]  # teacher, student


@pytest.mark.parametrize(
    ("divergence", "expected", "slope"),
    [
        (ToDi(), 2 * LN2 / 3, None),
        (AlphaBeta(0.5, 0.5), 4 * (1 - 2 * math.sqrt(2) / 3), 2 * math.sqrt(2) / 9),
        (AlphaBeta(0.2, 0.7), 0.2467770537, None),
        (AlphaBeta(1, 0), LN2 / 3, 1 / 3),
        (AlphaBeta(0, 1), LN2 / 3, 4 * LN2 / 9),
        (AlphaBeta(0, 0), LN2**2, LN2),
        (AlphaBeta(1, 1), 1 / 9, 4 / 27),
        (TAID(0.5), None, 1 / 6),
        (TAID(1.0), LN2 / 3, 1 / 3),
        (DIST(), 2.0, 0.0),
    ],
    ids=str,
)
def test_two_classes(divergence, expected, slope):
    found, gradient = value(divergence, *A)
    if expected is not None:
        assert found == pytest.approx(expected, rel=1e-9)
    if slope is not None:
        assert gradient == pytest.approx([slope, -slope], rel=1e-9, abs=1e-12)


def test_dkd():
    p, q = [0.5, 0.3, 0.2], [0.4, 0.4, 0.2]
    target, rest = 0.0204109973, 0.0097123133
    found, gradient = value(DKD(1, 8), p, q, 0)
    assert found == pytest.approx(target + 8 * rest, rel=1e-8)
    assert gradient == pytest.approx([-0.1, 0.6, -0.5], rel=1e-9)
    assert value(DKD(1, 0), p, q, 0)[0] == pytest.approx(target, rel=1e-8)
    whole = value("forward_kl", p, q)[0]
    assert value(DKD(1, 0.5), p, q, 0)[0] == pytest.approx(whole, rel=1e-9)  # 1 - p_k


def test_nkd():
    p, q = [0.5, 0.3, 0.2], [0.4, 0.4, 0.2]
    others = -(0.6 * math.log(2 / 3) + 0.4 * math.log(1 / 3))
    expected = -0.5 * math.log(0.4) + 1.5 * others
    found, gradient = value(NKD(1.5), p, q, 0)
    assert found == pytest.approx(expected, rel=1e-9)
    slope = [0.5 * (0.4 - 1), 0.5 * 0.4 + 1.5 * (2 / 3 - 0.6), 0.5 * 0.2 + 1.5 * (1 / 3 - 0.4)]
    assert gradient == pytest.approx(slope, rel=1e-9)


def test_akl_by_hand():
    """The head is the first entry alone, then the first two."""
    p, q = [0.5, 0.3, 0.2], [0.3, 0.3, 0.4]
    forward, reverse = value("forward_kl", p, q)[0], value("reverse_kl", p, q)[0]
    for mu, share in ((0.4, 0.5), (0.7, 0.5), (0.9, 1.0)):
        found, _ = value(AKL(mu), p, q)
        assert found == pytest.approx(share * forward + (1 - share) * reverse, rel=1e-9)
    p, q = [0.5, 0.3, 0.2], [0.4, 0.2, 0.4]
    forward, reverse = value("forward_kl", p, q)[0], value("reverse_kl", p, q)[0]
    for mu, share in ((0.45, 0.25), (0.55, 0.5)):
        found, _ = value(AKL(mu), p, q)
        assert found == pytest.approx(share * forward + (1 - share) * reverse, rel=1e-9)


# --- identities ------------------------------------------------------------------------------


def test_taid_has_renyi_s_gradient():
    student, teacher = sides()
    for t in (0.05, 0.4, 0.95):
        _, ours = run(student, teacher, divergence=TAID(t), reduction="sum")
        _, renyi = truth(student, teacher, divergence=fastkd.Renyi(t), reduction="sum")
        assert_close(ours, renyi, "gradient")


def test_alpha_beta_is_continuous_and_has_amari_s_line():
    """By PyTorch, where sides that are near to each other have fp64."""
    student, teacher = sides()
    for ends in ((1, 0), (0, 1), (0.4, -0.4), (0, 0)):
        limit = truth(student, teacher, divergence=AlphaBeta(*ends))
        for shift in ((0, 0), (1e-7, 0), (0, 1e-7), (-1e-7, 2e-7)):
            orders = [order + by for order, by in zip(ends, shift, strict=True)]
            for ours, true in zip(
                run(student, teacher, divergence=AlphaBeta(*orders), backend="torch"),
                limit,
                strict=True,
            ):
                assert_close(ours, true, "gradient")
    for a in (-0.5, 0.3, 2.0):
        for noise in (1e-4, 1.0):
            student, teacher = sides(noise=noise)
            ours = run(student, teacher, divergence=AlphaBeta(a, 1 - a), backend="torch")
            true = truth(student, teacher, divergence=fastkd.AlphaDivergence(a))
            for one, other, kind in zip(ours, true, ("value", "gradient"), strict=True):
                assert_close(one, other, kind)


@pytest.mark.parametrize("divergence", ROW_LOSSES, ids=str)
def test_shifts_permutations_and_the_zero(divergence):
    student, teacher = logits(ROWS, VOCAB)
    labels = torch.randint(VOCAB, (ROWS,))
    settings = {"divergence": divergence, "reduction": "none"}
    loss, gradient = run(student, teacher, labels, **settings)
    assert gradient.sum(-1).abs().max() < 1e-12
    order = torch.randperm(VOCAB)
    moved = run(student[:, order] + 3, teacher[:, order] - 5, order.argsort()[labels], **settings)
    assert_close(moved[0], loss)
    assert_close(moved[1], gradient[:, order], "gradient")
    if not isinstance(divergence, NKD):
        loss, gradient = run(teacher, teacher, labels, **settings)
        assert_zero(loss)
        assert gradient.abs().max() < 1e-12


# --- certain rows, masks ---------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", *FUSED])
@pytest.mark.parametrize("divergence", [DKD(1, 8), NKD(1.5)], ids=str)
@pytest.mark.parametrize("height", [30.0, 200.0, 1e4])
def test_certain_of_the_label(height, divergence, backend):
    """p_k = 1, q_k = 1, both, in all digits of fp32: finite, and right."""
    student, teacher = sides(3)
    labels = torch.tensor([1, 4, 6])  # the first is among those that are searched for the largest
    for rows in ((0,), (1,), (0, 1)):
        z, y = student.clone(), teacher.clone()
        for row in rows:
            for side in (z, y)[row : row + 1]:
                side[torch.arange(3), labels] += height
        settings = {"divergence": divergence, "reduction": "none"}
        loss, gradient = run(z, y, labels, backend=backend, **settings)
        true_loss, true_gradient = truth(z, y, labels, **settings)
        assert loss.isfinite().all()
        assert_close(loss, true_loss)
        assert_close(gradient, true_gradient, "gradient")


@pytest.mark.parametrize("backend", FUSED)
def test_the_label_alone_of_rows_near_each_other(backend):
    """DKD without the rest: a KL of two coins that hardly differ, and fall on one face mostly."""
    (student, teacher), labels = sides(16, noise=1e-2), torch.randint(VOCAB, (16,))
    for side in (student, teacher):
        side[torch.arange(16), labels] += 13
    settings = {"divergence": DKD(1, 0), "reduction": "none"}
    loss, gradient = run(student, teacher, labels, backend=backend, **settings)
    true_loss, true_gradient = truth(student, teacher, labels, **settings)
    assert_close(loss, true_loss)
    assert_close(gradient, true_gradient, "gradient")


@pytest.mark.parametrize("backend", FUSED)
def test_all_terms_where_the_label_is_highest(backend):
    student, teacher = sides(3)
    labels = torch.tensor([2, 4, 6])
    student[torch.arange(3), labels] += 9
    check(
        student, teacher, labels, backend=backend, divergence=DKD(1, 8), alpha=0.6,
        entropy_weight=0.1, label_smoothing=0.1, reduction="sum",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        *((name, dtype) for name in ("reference", "torch") for dtype in DTYPES),
        pytest.param("triton", torch.float32, marks=NO_TRITON),
    ],
)
def test_nothing_but_the_label(backend, dtype):
    """All other classes masked, on one side or both."""
    z = torch.tensor([[0.0, 1.0, 2.0]], dtype=dtype).repeat(2, 1)
    y = torch.tensor([[0.0, -math.inf, -math.inf]], dtype=dtype).repeat(2, 1)
    z[1, 1:] = -math.inf
    labels = torch.tensor([0, 0])
    loss, gradient = run(z, y, labels, divergence=DKD(1, 8), reduction="none", backend=backend)
    q = z[0].double().softmax(-1)
    assert_close(loss[:1], -q[:1].log())
    assert loss[1] == 0
    assert_close(gradient[0], q - F.one_hot(labels[0], 3), "gradient")
    assert_zero(gradient[1])


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("divergence", [DKD(1, 8), NKD(1.5)], ids=str)
def test_masks_of_the_label_and_of_all_others(divergence, backend):
    """On the student's side, the teacher's, or both."""
    student, teacher = sides(6)
    labels = torch.full((6,), VOCAB - 1)
    rest = torch.arange(VOCAB) != labels[0]
    student[0, ~rest] = teacher[1, ~rest] = -math.inf
    student[2, ~rest] = teacher[2, ~rest] = -math.inf
    student[3, rest] = teacher[4, rest] = -math.inf
    student[5, rest] = teacher[5, rest] = -math.inf
    settings = {"divergence": divergence, "reduction": "none", "temperature": 2.0}
    loss, gradient = run(student, teacher, labels, backend=backend, **settings)
    exact_sides = student.double(), teacher.double()
    exact, slope = run(*exact_sides, labels, backend="reference", **settings)
    infinite = [True, False, False, True, False, False]
    assert loss.isinf().tolist() == exact.isinf().tolist() == infinite
    finite = exact.isfinite()
    assert_close(loss[finite], exact[finite])
    assert gradient.isfinite().all()
    assert_close(gradient[finite], slope[finite], "gradient")


@WITH_BACKEND
def test_masks(divergence, backend):
    """On both sides alike, where all are finite; on one, where some are infinite; dead rows."""
    student, teacher = sides()
    labels = torch.full((ROWS,), 4)
    student[:, 7:9] = teacher[:, 7:9] = -math.inf
    student[5] = -math.inf
    settings = {"divergence": divergence, "reduction": "none", "backend": backend}
    loss, gradient = run(student, teacher, labels, **settings)
    inner = [torch.cat([x[:, :7], x[:, 9:]], -1) for x in (student, teacher)]
    if not isinstance(divergence, DIST):  # to which two classes more are two zeros more
        true_loss, true_gradient = truth(*inner, labels, **settings)
        if isinstance(divergence, AlphaBeta) and divergence.alpha + divergence.beta == 0:
            return
        assert_close(loss, true_loss)
        kept = torch.cat([gradient[:, :7], gradient[:, 9:]], -1)
        assert_close(kept, true_gradient, "gradient")
    assert loss[5] == 0
    assert_zero(gradient[5])
    assert_zero(gradient[:, 7:9])
    for side in (0, 1):
        pair = [x.clone() for x in inner]
        pair[side][:, 2] = -math.inf
        loss, gradient = run(*pair, labels, **settings)
        assert not loss.isnan().any()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("orders", [(-0.5, -1.0), (-1.0, -0.5), (0.4, -0.4), (0.0, 0.0)], ids=str)
def test_orders_that_masks_make_infinite(orders, backend):
    student, teacher = sides(2)
    for side in (student, teacher):
        masked = side.clone()
        masked[:, 3] = -math.inf
        pair = (masked, teacher) if side is student else (student, masked)
        settings = {"reduction": "none", "backend": backend}
        loss, gradient = run(*pair, divergence=AlphaBeta(*orders), **settings)
        assert (loss == math.inf).all()
        assert gradient.isfinite().all()


@NO_TRITON
def test_disjoint_supports_of_taid():
    z, y = torch.tensor([[0.0, -math.inf]]), torch.tensor([[-math.inf, 0.0]])
    for backend in ("reference", "torch", "triton"):
        loss, gradient = run(z, y, divergence=TAID(0.5), backend=backend)
        assert loss == math.inf
        assert_zero(gradient)


def test_dist_of_a_uniform_side():
    student, teacher = sides(2)
    student[0] = 1.0
    loss, gradient = run(student, teacher, divergence=DIST(2.0), reduction="none")
    assert loss[0] == 2
    assert_zero(gradient[0])
    same, gradient = run(student[:1], student[:1] + 1, divergence=DIST(), reduction="none")
    assert_zero(same)
    assert_zero(gradient)


@pytest.mark.usefixtures("as_of_many")
@pytest.mark.parametrize("orders", [(-1.0, -0.5), (0.7, -1.0), (1.5, 3.0)])
def test_orders_far_from_a_sum_of_1(orders):
    """Sides that differ little are far apart, by q^-1.5; or a student is certain, by q^4.5."""
    teacher = 2 * torch.randn(64, 200)
    student = teacher + 1e-3 * torch.randn(64, 200) if sum(orders) < 1 else torch.randn(64, 200)
    if sum(orders) > 1:
        student[:, 7] = student[:, 8:].logsumexp(-1) + 6.1
    settings = {"divergence": AlphaBeta(*orders), "reduction": "none"}
    loss, gradient = run(student, teacher, backend="torch", **settings)
    for rows in zip(loss, gradient, *truth(student, teacher, **settings), strict=True):
        assert_close(rows[0], rows[2])
        assert_close(rows[1], rows[3], "gradient")


@pytest.mark.parametrize("divergence", [AKL(0.3), AKL(0.5), AKL(0.95)], ids=str)
def test_the_head_of_many_columns(divergence):
    """Against a sort, on rows of 4096."""
    student, teacher = (x.float() for x in logits(16, 4096))
    loss, gradient = run(student, teacher, divergence=divergence, reduction="none")
    true_loss, true_gradient = truth(student, teacher, divergence=divergence, reduction="none")
    assert_close(loss, true_loss)
    assert_close(gradient, true_gradient, "gradient")


# --- events, ranges --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "divergence", [d for d in ROW_LOSSES if d.over_events and not d.label_aware], ids=str
)
def test_a_teacher_s_best(divergence, on_device):
    """Over K + 1 events the same as over K + 1 classes."""
    student, teacher = sides()
    top = fastkd.TopK.from_logits(teacher, 5)
    _, gradient = run(student, top, divergence=divergence, reduction="sum")
    leaf = student.double().requires_grad_()
    index = top.indices
    rest = leaf.scatter(-1, index, -math.inf).logsumexp(-1, keepdim=True)
    q = torch.cat([leaf.gather(-1, index), rest], -1)
    p = torch.cat([top.log_probs, top.tail_log_prob[:, None]], -1)
    true, _ = defined(q, p, divergence=divergence, reduction="sum")
    true.backward()
    loss = fastkd.distillation_loss(student, top, divergence=divergence, reduction="sum")
    assert_close(loss, true)
    assert_close(gradient, leaf.grad, "gradient")


def test_refused_where_they_have_no_meaning():
    student, teacher = sides()
    top = fastkd.TopK.from_logits(teacher, 5)
    for divergence in (DIST(), DKD()):
        with pytest.raises(ValueError, match=type(divergence).__name__):
            fastkd.distillation_loss(student, top, labels_of(), divergence=divergence)
    for divergence in (DKD(), NKD()):
        with pytest.raises(ValueError, match="pass labels"):
            fastkd.distillation_loss(student, teacher, divergence=divergence)
        soft = torch.rand(ROWS, VOCAB)
        with pytest.raises(ValueError, match="class indices"):
            fastkd.distillation_loss(student, teacher, soft, divergence=divergence)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (DKD, (-1.0, 1.0)), (DKD, (0.0, 0.0)), (DKD, (1.0, math.inf)), (NKD, (-0.1,)),
        (NKD, (math.nan,)), (TAID, (0.0,)), (TAID, (1.01,)), (AlphaBeta, (math.inf, 0.0)),
        (AlphaBeta, (0.0, math.nan)), (AKL, (0.0,)), (AKL, (1.0,)), (DIST, (0.0,)),
        (DIST, (math.inf,)),
    ],
)  # fmt: skip
def test_ranges(kind, arguments):
    with pytest.raises(ValueError, match=f"{kind.__name__}: .* got|both 0"):
        kind(*arguments)


def test_alpha_beta_of_what_both_mask_at_two_temperatures():
    """In fp64, where a number stands for -inf: over two temperatures it is two numbers."""
    student, teacher = (x.index_fill(1, torch.tensor(1), -math.inf) for x in logits(3, 6))
    ours, true = (
        fastkd.distillation_loss(
            student, teacher, divergence=fastkd.AlphaBeta(0.4, -0.4), teacher_temperature=1.7,
            backend=backend,
        )
        for backend in ("torch", "reference")
    )  # fmt: skip
    assert_close(ours, true)
