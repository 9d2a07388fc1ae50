"""Teachers known by some entries, TopK and Sampled: against the oracle on K + 1 events."""

from __future__ import annotations

import math

import pytest
import torch

import fastkd
from fastkd import events as listed_teachers
from tests.cases import DIVERGENCES
from tests.closeness import assert_close, assert_zero
from tests.running import EVERY, FUSED, NO_TRITON, defined

pytestmark = pytest.mark.usefixtures("on_device")
ROWS, VOCAB, K = 9, 40, 6
MODES = ["forward", "backward"]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Four rows to a block, of which the last has fewer: every seam is met."""
    monkeypatch.setattr(listed_teachers, "largest", lambda part: 4)


def logits(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(*shape) * 2, torch.randn(*shape) * 2


def events(student, teacher, temperature=1.0):
    """Log-probabilities of the listed entries and of the rest, as logits of K + 1 columns, fp64."""
    index = teacher.indices.long()
    listed = index >= 0
    z = torch.nn.functional.pad(student.double() / temperature, (0, 1), value=-math.inf)
    where = torch.where(listed, index, z.size(-1) - 1)
    rest = z.scatter(-1, where, -math.inf).logsumexp(-1, keepdim=True)
    q = torch.cat([z.gather(-1, where), rest], -1)
    tail = teacher.tail_log_prob.double()[..., None]
    p = torch.cat([torch.where(listed, teacher.log_probs.double(), -math.inf), tail], -1)
    return q, p


def check(student, teacher, truth_of, temperature=1.0, backend="auto", mode="backward", **settings):
    """Value and gradient, at T_t = 1; truth_of(leaf in fp64) gives the rows that are right."""
    leaf = student.double().requires_grad_()
    truth = truth_of(leaf) * temperature
    ours = student.clone().requires_grad_()
    loss = fastkd.distillation_loss(
        ours, teacher, temperature=temperature, teacher_temperature=1.0, gradient=mode,
        reduction="sum" if mode == "forward" else "none", backend=backend, **settings,
    )  # fmt: skip
    truth = truth.sum() if mode == "forward" else truth
    upstream = torch.rand(truth.shape, dtype=torch.float64) + 0.5
    (truth * upstream).sum().backward()
    (loss * upstream.float()).sum().backward()
    assert_close(loss, truth)
    assert_close(ours.grad, leaf.grad, "gradient")


# --- the bucket ------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("mode", MODES)
def test_every_divergence(divergence, backend, mode):
    student, other = logits(ROWS, VOCAB)
    teacher = fastkd.TopK.from_logits(other, K)

    def truth(leaf):
        q, p = events(leaf, teacher, 1.4)
        rows, _ = defined(q, p, divergence=divergence, reduction="none")
        return rows if divergence.temperature_power == 2 else rows * 1.4**-0.5

    check(student, teacher, truth, 1.4, backend, mode, divergence=divergence)


@EVERY
def test_all_listed_is_the_dense_divergence(divergence, backend):
    student, other = logits(ROWS, 12)
    teacher = fastkd.TopK.from_logits(other, 12)
    settings = {"divergence": divergence}

    def truth(leaf):
        return defined(leaf, other, reduction="none", **settings)[0]

    check(student, teacher, truth, backend=backend, **settings)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_a_bucket_never_exceeds_the_full_divergence(divergence):
    student, other = logits(50, VOCAB)
    settings = {"divergence": divergence, "reduction": "none"}
    full = fastkd.distillation_loss(student, other, **settings)
    for k in (1, 5, 20):
        some = fastkd.distillation_loss(student, fastkd.TopK.from_logits(other, k), **settings)
        assert (some <= full * (1 + 1e-5) + 1e-7).all()


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize(("offset", "temperature"), [(3e3, 0.7), (-5e4, 2.0), (3e3, 2.0)])
def test_what_all_logits_have_in_common_is_not_seen(offset, temperature, backend):
    student, other = logits(ROWS, VOCAB)
    teacher = fastkd.TopK.from_logits(other, K)
    student = student + offset

    def truth(leaf):
        q, p = events(leaf, teacher, temperature)
        return defined(q, p, divergence="jeffreys", reduction="none")[0]

    check(student, teacher, truth, temperature, backend, divergence="jeffreys")


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("per_row", [False, True])
def test_the_temperature_trains(per_row, backend):
    student, other = logits(ROWS, VOCAB)
    teacher = fastkd.TopK.from_logits(other, K)
    warm = torch.rand(ROWS if per_row else ()) + 1
    exact, ours = (x.requires_grad_() for x in (warm.double(), warm.clone()))
    q, p = events(student, teacher, exact[:, None] if per_row else exact)
    rows, _ = defined(q, p, divergence="reverse_kl", reduction="none")
    (rows * exact).sum().backward()
    settings = {"divergence": "reverse_kl", "teacher_temperature": 1.0, "reduction": "sum"}
    settings |= {"backend": backend}
    fastkd.distillation_loss(student, teacher, temperature=ours, **settings).backward()
    assert_close(ours.grad, exact.grad, "gradient")


def rows_by_name(name):
    """A student and a TopK, of 64 columns."""
    student, other = logits(4, 64)
    index = other.topk(5).indices
    if name == "monotonic":
        student = torch.arange(64.0).expand(4, 64) / 4
    if name == "one high column, the last":
        student[:, -1] = 60.0
    if name == "one high column, listed":
        student[:, index[0, 0]] = 60.0
    if name == "-inf first":
        student[:, :8] = -math.inf
        other[:, :8] = -math.inf
        index = other.topk(5).indices
    if name == "nothing listed":
        index = torch.full_like(index, -1)
    if name == "one listed in some rows":
        index[::2, 1:] = -1
    if name == "the label, twice":
        index[:, 4] = index[:, 0]
    if name == "a teacher that is nearly sure":
        other[:, 0] += 25.0
        index = other.topk(5).indices
    if name == "masks by large numbers":
        student[:, 30:] = -1e9
    teacher = fastkd.TopK.at(other, index)
    if name == "the label, twice":  # what is listed twice counts once
        alone = index.clone()
        alone[:, 4] = -1
        return student, teacher, fastkd.TopK.at(other, alone)
    return student, teacher, teacher


NAMES = [
    "monotonic", "one high column, the last", "one high column, listed", "-inf first",
    "nothing listed", "one listed in some rows", "the label, twice",
    "a teacher that is nearly sure", "masks by large numbers",
]  # fmt: skip


ADVERSE = [(d, "torch") for d in (fastkd.ForwardKL(), fastkd.ReverseKL(), fastkd.JSD(0.3))]
ADVERSE += [
    pytest.param(d, "triton", marks=NO_TRITON) for d in (fastkd.ReverseKL(), fastkd.JSD(0.3))
]


@pytest.mark.parametrize(("divergence", "backend"), ADVERSE, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_adversarial_rows(name, divergence, backend):
    student, teacher, same = rows_by_name(name)

    def truth(leaf):
        q, p = events(leaf, same)
        return defined(q, p, divergence=divergence, reduction="none")[0]

    if name == "nothing listed":
        leaf = student.clone().requires_grad_()
        loss = fastkd.distillation_loss(leaf, teacher, divergence=divergence, backend=backend)
        loss.backward()
        assert loss == 0
        assert_zero(leaf.grad)
        return
    check(student, teacher, truth, divergence=divergence, backend=backend)


@pytest.mark.parametrize("backend", FUSED)
def test_a_tail_of_1e_7_keeps_its_digits(backend):
    """The student's mass outside the set is summed; as 1 - sum it would have none."""
    student, other = torch.full((1, 300), -20.0), torch.full((1, 300), -18.0)
    student[0, 3] = other[0, 3] = 1.0
    teacher = fastkd.TopK.from_logits(other, 1)
    q, _ = events(student, teacher)
    assert q.log_softmax(-1)[0, -1].exp() < 1e-6
    check(
        student,
        teacher,
        lambda x: defined(*events(x, teacher), divergence="reverse_kl", reduction="none")[0],
        divergence="reverse_kl",
        backend=backend,
    )


# --- the other tails -------------------------------------------------------------------------


def dense(teacher):
    """Log-probabilities [N, V] with -inf where nothing is listed."""
    index = teacher.indices.long()
    rows = torch.full((len(index), VOCAB + 1), -math.inf, dtype=torch.float64)
    rows.scatter_(-1, torch.where(index < 0, VOCAB, index), teacher.log_probs.double())
    return rows[:, :VOCAB]


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("divergence", [fastkd.ForwardKL(), fastkd.JSD(0.3), fastkd.TVD()])
def test_renormalize_at_a_temperature(divergence, mode, backend):
    student, other = logits(ROWS, VOCAB)
    teacher = fastkd.TopK.from_logits(other, K, tail="renormalize")
    settings = {"divergence": divergence, "temperature": 2.5, "reduction": "sum"}
    leaf = student.double().requires_grad_()
    truth, _ = defined(leaf, dense(teacher), **settings)
    truth.backward()
    ours = student.clone().requires_grad_()
    loss = fastkd.distillation_loss(ours, teacher, gradient=mode, backend=backend, **settings)
    loss.backward()
    assert_close(loss, truth)
    assert_close(ours.grad, leaf.grad, "gradient")


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize(
    ("divergence", "term"),
    [
        ("forward_kl", lambda lp, lq: lp.exp() * (lp - lq)),
        ("reverse_kl", lambda lp, lq: lq.exp() * (lq - lp)),
        ("tvd", lambda lp, lq: (lp.exp() - lq.exp()).abs() / 2),
        (
            fastkd.AlphaDivergence(2.0),
            lambda lp, lq: (2 * lp - lq).exp() / 2 - lp.exp() + lq.exp() / 2,
        ),
    ],
)
def test_drop_is_the_truncated_sum_and_may_be_negative(divergence, term, backend):
    student, other = logits(ROWS, VOCAB)
    student[0] = other[0]
    student[0, other[0].topk(K).indices] += 3.0
    teacher = fastkd.TopK.from_logits(other, K, tail="drop")

    def truth(leaf):
        lq = leaf.log_softmax(-1).gather(-1, teacher.indices)
        lp = teacher.log_probs.double()
        return term(lp, lq).sum(-1)

    assert divergence != "forward_kl" or truth(student.double())[0] < 0
    check(student, teacher, truth, divergence=divergence, backend=backend)


@pytest.mark.parametrize("backend", FUSED)
def test_label_gives_the_rest_to_the_true_token(backend):
    student, other = logits(ROWS, VOCAB)
    teacher = fastkd.TopK.from_logits(other, K, tail="label")
    labels = torch.randint(VOCAB, (ROWS,))
    labels[:3] = teacher.indices[:3, 2]  # listed
    full = dense(teacher).exp()
    full.scatter_add_(-1, labels[:, None], 1 - full.sum(-1, keepdim=True))
    leaf = student.double().requires_grad_()
    truth, _ = defined(leaf, full.log(), labels, alpha=0.6)
    truth.backward()
    ours = student.clone().requires_grad_()
    loss, metrics = fastkd.distillation_loss(
        ours, teacher, labels, alpha=0.6, backend=backend, return_metrics=True
    )
    loss.backward()
    assert_close(loss, truth)
    assert_close(ours.grad, leaf.grad, "gradient")
    assert_close(metrics.teacher_entropy, -torch.special.xlogy(full, full).sum(-1))


def test_a_tail_made_from_log_probs():
    student, other = logits(ROWS, VOCAB)
    stored = fastkd.TopK.from_logits(other, K)
    made = fastkd.TopK(stored.indices, stored.log_probs)
    assert_close(
        fastkd.distillation_loss(student, made), fastkd.distillation_loss(student, stored).double()
    )


# --- Sampled ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", FUSED)
def test_sampled_is_the_teacher_of_its_counts(backend):
    student, _ = logits(2, VOCAB)
    teacher = fastkd.Sampled(
        torch.tensor([[3, 7, 3, -1], [0, 1, 2, 39]]), torch.tensor([[1, 2, 4, 9], [1, 1, 1, 5]])
    )
    p = torch.zeros(2, VOCAB, dtype=torch.float64)
    p[0, 3], p[0, 7], p[1, :3], p[1, 39] = 5 / 7, 2 / 7, 1 / 8, 5 / 8

    def truth(leaf):
        return defined(leaf, p.log(), reduction="none")[0]

    check(student, teacher, truth, backend=backend)


def test_the_mean_over_draws_is_the_dense_gradient():
    student, other = logits(1, 12)
    teacher = fastkd.Sampled.from_logits(other.expand(20000, 12), 5)
    leaf = student.expand(20000, 12).clone().requires_grad_()
    fastkd.distillation_loss(leaf, teacher, reduction="sum").backward()
    truth = student.softmax(-1) - other.softmax(-1)
    assert (leaf.grad.mean(0) - truth[0]).abs().max() < 0.01 * truth.abs().max() + 4e-3


# --- with everything else --------------------------------------------------------------------


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("mode", MODES)
def test_cross_entropy_entropy_weights_and_metrics(mode, backend):
    student, other = logits(ROWS, VOCAB)
    teacher = fastkd.TopK.from_logits(other[:, :36], K)
    labels, weight = torch.randint(36, (ROWS,)), torch.rand(ROWS) + 0.2
    labels[2] = -100
    student[2, 3] = math.nan
    settings = {"alpha": 0.4, "label_smoothing": 0.1, "entropy_weight": 0.3, "weight": weight}
    leaf = student.double().requires_grad_()
    kd, _ = defined(
        *events(leaf[:, :36], teacher), labels.clamp(max=K), weight=weight, reduction="sum"
    )
    rest, _ = defined(
        leaf[:, :36], other[:, :36], labels, reduction="sum",
        **settings | {"alpha": 0.0},
    )  # fmt: skip
    ce, _ = defined(
        leaf[:, :36],
        other[:, :36],
        labels,
        reduction="sum",
        alpha=0.0,
        label_smoothing=0.1,
        weight=weight,
    )
    truth = (0.4 * kd + 0.6 * ce + rest - ce) / weight[labels != -100].sum()
    truth.backward()
    ours = student.clone().requires_grad_()
    loss, metrics = fastkd.distillation_loss(
        ours, teacher, labels, vocab_size=36, gradient=mode, backend=backend, return_metrics=True,
        **settings,
    )  # fmt: skip
    loss.backward()
    assert_close(loss, truth)
    assert_close(ours.grad[labels != -100], leaf.grad[labels != -100], "gradient")
    assert_zero(ours.grad[2])
    assert metrics.agreement[2] == 0
    assert ((metrics.agreement == 1) == (student.argmax(-1) == other.argmax(-1)))[
        labels != -100
    ].all()


@pytest.mark.parametrize("backend", FUSED)
def test_head_of_the_student_in_place(backend):
    hidden, weight = torch.randn(ROWS, 8, requires_grad=True), torch.randn(VOCAB, 8)
    _, other = logits(ROWS, VOCAB)
    teacher = fastkd.TopK.from_logits(other, K)
    head = fastkd.LinearHead(hidden, weight)
    loss = fastkd.distillation_loss(head, teacher, backend=backend)
    (ours,) = torch.autograd.grad(loss, hidden)
    plain = hidden.detach().requires_grad_()
    same = fastkd.distillation_loss(plain @ weight.T, teacher, backend=backend)
    (theirs,) = torch.autograd.grad(same, plain)
    assert_close(loss, same.double())
    assert_close(ours, theirs.double(), "gradient")
    written = (plain @ weight.T).detach().requires_grad_() * 1
    fastkd.distillation_loss(written, teacher, inplace=True, backend=backend)
    expected = (plain @ weight.T).detach().requires_grad_()
    fastkd.distillation_loss(expected, teacher, backend=backend).backward()
    assert torch.equal(written.detach(), expected.grad)


def test_refusals():
    student, other = logits(3, VOCAB)
    teacher = fastkd.TopK.from_logits(other, K)
    for settings, match in (
        ({"temperature": 2.0}, "pass teacher_temperature=1.0, or TopK"),
        ({"standardize": True}, "needs the teacher's logits"),
        ({"divergence": fastkd.Bernoulli()}, "needs the teacher's logits"),
        ({"teacher_grad": True}, "no logits to train"),
        ({"vocab_size": 2}, "map its ids"),
    ):
        with pytest.raises(ValueError, match=match):
            fastkd.distillation_loss(student, teacher, **settings)
    with pytest.raises(ValueError, match="pass labels"):
        fastkd.distillation_loss(student, fastkd.TopK.from_logits(other, K, tail="label"))
    hot = torch.tensor(2.0, requires_grad=True)
    with pytest.raises(NotImplementedError, match="a TopK gives the teacher's no gradient"):
        fastkd.distillation_loss(
            student, fastkd.TopK.from_logits(other, K, tail="renormalize"), temperature=hot
        )
    with pytest.raises(TypeError, match="student must be logits"):
        fastkd.distillation_loss(teacher, other)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("divergence", [fastkd.AlphaBeta(0.0, 0.6), fastkd.AlphaBeta(-0.4, 0.4)])
def test_an_infinite_row_has_a_gradient_of_0(divergence, backend):
    student, other = logits(2, VOCAB)
    other[0, 1] = -math.inf
    student.requires_grad_()
    teacher = fastkd.TopK.at(other, torch.tensor([[0, 1], [2, 3]]))
    loss = fastkd.distillation_loss(
        student, teacher, divergence=divergence, reduction="none", backend=backend
    )
    loss.sum().backward()
    assert loss[0] == math.inf
    assert_zero(student.grad[0])
    assert student.grad[1].count_nonzero()


def rows_without_mass():
    nothing = torch.full((3, 2), -math.inf)
    ids = torch.tensor([[0, 5], [3, -1], [-1, -1]])
    return {
        "bucket": fastkd.TopK(ids, nothing, "bucket", nothing[:, 0]),
        "renormalize": fastkd.TopK(ids, nothing, "renormalize"),
        "drop": fastkd.TopK(ids, nothing, "drop"),
        "sampled": fastkd.Sampled(ids, torch.zeros(3, 2)),
    }


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", rows_without_mass())
def test_a_row_without_mass_counts_0(name, mode, backend):
    """As a dense row that is masked throughout; by any divergence."""
    for divergence in ("reverse_kl", fastkd.Renyi(0.5)):
        student = torch.randn(3, VOCAB, requires_grad=True)
        loss, metrics = fastkd.distillation_loss(
            student, rows_without_mass()[name], gradient=mode, divergence=divergence,
            backend=backend, return_metrics=True,
        )  # fmt: skip
        loss.backward()
        for found in (loss, student.grad, metrics.kd, metrics.teacher_entropy):
            assert_zero(found)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("tail", ["bucket", "label"])
def test_what_rounding_leaves_of_a_row_that_is_listed_whole_is_nobodys(tail, backend):
    student, other = logits(ROWS, 6)
    lp = other.log_softmax(-1).half().float() - 1e-3
    teacher = fastkd.TopK(torch.arange(6).expand(ROWS, 6), lp, tail)
    labels = torch.randint(6, (ROWS,))
    truth, _ = defined(student.double(), lp.double(), divergence="forward_kl")
    assert_close(fastkd.distillation_loss(student, teacher, labels, backend=backend), truth)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("mode", MODES)
def test_a_label_s_stored_tail_adds_up_to_1(mode, backend):
    """As it was before both were stored in few bits."""
    student, other = logits(ROWS, VOCAB)
    exact = fastkd.TopK.from_logits(other, K, "label")
    teacher = fastkd.TopK(
        exact.indices, exact.log_probs + 0.05, "label", exact.tail_log_prob + 0.05
    )
    labels = torch.randint(VOCAB, (ROWS,))
    for divergence in ("forward_kl", fastkd.SkewReverseKL(0.1)):
        ours, expected = student.clone().requires_grad_(), student.clone().requires_grad_()
        settings = {"divergence": divergence, "gradient": mode, "backend": backend}
        loss = fastkd.distillation_loss(ours, teacher, labels, **settings)
        truth = fastkd.distillation_loss(expected, exact, labels, **settings)
        loss.backward()
        truth.backward()
        assert_close(loss, truth)
        assert_close(ours.grad, expected.grad, "gradient")


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "drop", "label", "sampled"])
def test_one_row_without_leading_dimensions(tail):
    student, other = logits(VOCAB)
    if tail == "sampled":
        teacher = fastkd.Sampled.from_logits(other, K)
        batch = fastkd.Sampled(teacher.indices[None], teacher.counts[None])
    else:
        teacher = fastkd.TopK.from_logits(other, K, tail)
        batch = fastkd.TopK.at(other[None], teacher.indices[None], tail)
    label = torch.tensor(7)
    one = fastkd.distillation_loss(student, teacher, label)
    assert torch.equal(one, fastkd.distillation_loss(student[None], batch, label[None]))


def test_figures_alone_add_nothing_to_the_gradient():
    student, labels = torch.randn(4, 12), torch.randint(12, (4,))
    teacher = fastkd.TopK(*torch.randn(4, 12).log_softmax(-1).topk(3)[::-1])
    gradients = []
    for metrics in (False, True):
        dirty = [
            torch.full((4, 12), math.nan) for _ in range(50)
        ]  # what is not written may be this
        del dirty
        leaf = student.clone().requires_grad_()
        found = fastkd.distillation_loss(leaf, teacher, labels, return_metrics=metrics)
        (found[0] if metrics else found).backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_the_students_entropy_is_at_its_temperature():
    student, teacher = torch.randn(4, 12), torch.randn(4, 12)
    listed = fastkd.TopK(*teacher.log_softmax(-1).topk(3)[::-1])
    (_, found), (_, true) = (
        fastkd.distillation_loss(
            student, side, temperature=2.5, teacher_temperature=1.0, return_metrics=True
        )
        for side in (listed, teacher)
    )
    assert_close(found.student_entropy, true.student_entropy.double())
