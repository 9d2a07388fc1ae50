"""Several teachers in place of one: against the oracle on the mixture, made by plain PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import fastkd
from fastkd import Ensemble, LinearHead, Sampled, TopK, chunks
from tests.cases import DIVERGENCES
from tests.closeness import assert_close, assert_zero
from tests.conftest import DEVICE
from tests.running import FUSED, defined, run, truth

ROWS, VOCAB, WIDTH = 11, 37, 6
MODES = ["forward", "backward"]
SOFTEN = torch.rand(ROWS, generator=torch.Generator().manual_seed(1)) + 0.7


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """Three or four rows to a chunk: every seam is met."""
    for budget in ("CPU_BYTES", "GPU_BYTES"):
        monkeypatch.setattr(chunks, budget, 4 * 3 * VOCAB * 4 * 5 // 4 + 1)
    monkeypatch.setattr(chunks, "LEAST_ROWS", 3)


def members():
    """A student, and a teacher of each kind that has a meaning in a mixture."""
    student, dense, other = (2 * torch.randn(ROWS, VOCAB, device=DEVICE) for _ in range(3))
    head = LinearHead(
        torch.randn(ROWS, WIDTH, device=DEVICE), torch.randn(VOCAB, WIDTH, device=DEVICE)
    )
    top = TopK.from_logits(other, 5, tail="renormalize")
    return student, [dense, head, top]


def probabilities(teacher, temperature=1.0, standardize=False):
    """[N, V] in fp64 of one teacher; temperature a number or [N, 1]."""
    if isinstance(teacher, TopK):
        p = torch.zeros(ROWS, VOCAB, dtype=torch.float64, device=DEVICE)
        listed = (teacher.log_probs.double() / temperature).softmax(-1)
        return p.scatter_(-1, teacher.indices, listed)
    if isinstance(teacher, Sampled):
        p = torch.zeros(ROWS, VOCAB, dtype=torch.float64, device=DEVICE)
        share = teacher.counts.double() / teacher.counts.sum(-1, keepdim=True)
        return p.scatter_add_(-1, teacher.indices, share)
    return (scores(teacher, standardize) / temperature).softmax(-1)


def scores(teacher, standardize=False):
    z = teacher
    if isinstance(teacher, LinearHead):
        z = teacher.hidden.double() @ teacher.weight.double().mT
    z = z.double()
    return (z - z.mean(-1, True)) / (z.std(-1, keepdim=True) + 1e-7) if standardize else z


def mixed(teachers, weights, temperature=1.0, standardize=False):
    """T log sum w p, whose softmax at T is the mixture."""
    wide = [w[:, None].double() if isinstance(w, torch.Tensor) else w for w in weights]
    total = sum(wide)
    p = sum(
        w * probabilities(teacher, temperature, standardize)
        for w, teacher in zip(wide, teachers, strict=True)
    )
    return (p / total).log() * temperature


def check(student, ensemble, logits, *rest, **settings):
    """Value and gradient to the student, where the ensemble is as good as a teacher's logits."""
    loss, gradient = run(student, ensemble, *rest, **settings)
    true_loss, true_gradient = truth(student, logits, *rest, **settings)
    assert_close(loss, true_loss)
    assert_close(gradient, true_gradient, "gradient")


# --- probabilities ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_every_divergence_to_a_mixture(divergence, mode):
    student, (dense, head, _) = members()
    weights, settings = [0.5, 1.5], {"divergence": divergence, "temperature": 1.5}
    logits = mixed([dense, head], weights, 1.5)
    check(
        student, Ensemble([dense, head], weights), logits, backend="torch", gradient=mode,
        **settings,
    )  # fmt: skip


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("mode", MODES)
def test_every_kind_with_every_option(mode, backend):
    """Weights by row and alone, temperatures of both sides, labels, metrics."""
    student, teachers = members()
    student += 2 * teachers[0]  # they agree in some rows
    weights = [torch.rand(ROWS, device=DEVICE) + 0.1, 0.3, torch.rand(ROWS, device=DEVICE)]
    labels = torch.randint(VOCAB, (ROWS,), device=DEVICE)
    labels[2] = -100
    soft = SOFTEN.to(DEVICE)
    settings = {
        "divergence": fastkd.JSD(0.3), "temperature": 1.4, "teacher_temperature": soft,
        "alpha": 0.4, "label_smoothing": 0.1, "entropy_weight": 0.2, "gradient": mode,
        "weight": torch.rand(ROWS, device=DEVICE) + 0.1, "backend": backend,
    }  # fmt: skip
    logits = mixed(teachers, weights, soft[:, None].double())
    check(student, Ensemble(teachers, weights), logits, labels, **settings)
    _, ours = fastkd.distillation_loss(
        student, Ensemble(teachers, weights), labels, return_metrics=True, **settings
    )
    _, true = defined(student, logits, labels, **settings)
    for one, other in zip(ours, true, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("backend", FUSED)
def test_beside_a_student_s_head(backend):
    _, teachers = members()
    hidden = torch.randn(ROWS, WIDTH, device=DEVICE)
    weight = torch.randn(VOCAB, WIDTH, device=DEVICE)
    ours = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    fastkd.distillation_loss(LinearHead(*ours), Ensemble(teachers), backend=backend).backward()
    exact = hidden.double().requires_grad_(), weight.double().requires_grad_()
    defined(exact[0] @ exact[1].mT, mixed(teachers, [1.0] * 3))[0].backward()
    for one, true in zip(ours, exact, strict=True):
        assert_close(one.grad, true.grad, "gradient")


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("mode", MODES)
def test_standardized(mode, backend):
    """Each teacher by its own z-scores: against the student's, made by hand."""
    student, (dense, head, _) = members()
    settings = {"temperature": 2.0, "gradient": mode, "backend": backend}
    ours = student.clone().requires_grad_()
    loss = fastkd.distillation_loss(ours, Ensemble([5 * dense, head]), standardize=True, **settings)
    loss.backward()
    exact = student.double().requires_grad_()
    true, _ = defined(
        scores(exact, True), mixed([5 * dense, head], [1, 1], 2.0, standardize=True), **settings
    )
    true.backward()
    assert_close(loss, true)
    assert_close(ours.grad, exact.grad, "gradient")


def test_sampled_and_label_tails():
    student, (dense, *_) = members()
    labels = torch.randint(VOCAB, (ROWS,), device=DEVICE)
    sampled = Sampled.from_logits(torch.randn(ROWS, VOCAB, device=DEVICE), 20)
    sampled = Sampled(sampled.indices.clamp(min=0), sampled.counts)
    top = TopK.from_logits(torch.randn(ROWS, VOCAB, device=DEVICE), 4, tail="label")
    p = torch.zeros(ROWS, VOCAB, dtype=torch.float64, device=DEVICE)
    p.scatter_(-1, top.indices, top.log_probs.double().exp())
    p.scatter_add_(-1, labels[:, None], 1 - p.sum(-1, keepdim=True))
    mix = (probabilities(dense) + probabilities(sampled) + p) / 3
    check(student, Ensemble([dense, sampled, top]), mix.log(), labels)


def test_multi_label_heads():
    student, (dense, head, _) = members()
    p = sum(w * (scores(x) / 2).sigmoid() for w, x in ((0.25, dense), (0.75, head)))
    check(
        student, Ensemble([dense, head], [1, 3]), p.logit() * 2, temperature=2.0,
        divergence=fastkd.Bernoulli(1, 0.5),
    )  # fmt: skip


def test_what_is_small_for_all_keeps_its_digits(on_device):
    """Probabilities of e^-200, which no fp32 holds; reverse KL asks for their logarithms."""
    student = torch.tensor([[0.0, 1.0, 2.0]])
    teachers = [torch.tensor([[0.0, -200.0, 1.0]]), torch.tensor([[0.0, -199.0, 3.0]])]
    p = torch.stack([t.double().log_softmax(-1) for t in teachers]).logsumexp(0)
    check(student, Ensemble(teachers), p, divergence="reverse_kl")


def test_masks_of_some_and_of_all():
    student, (dense, head, _) = members()
    dense[:, 0] = -math.inf
    dense[3] = -math.inf  # a teacher without a say there
    ours = run(student, Ensemble([dense, head]))
    one, other = probabilities(torch.where(dense == -math.inf, -1e30, dense)), probabilities(head)
    one[3] = other[3]
    for found, true in zip(ours, truth(student, (one + other).log()), strict=True):
        assert_close(found, true, "gradient")


# --- logits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("mode", MODES)
def test_mean_of_logits(mode, backend):
    student, (dense, head, _) = members()
    weights = [torch.rand(ROWS, device=DEVICE), 0.7]
    share = weights[0].double()[:, None]
    logits = (share * scores(dense) + 0.7 * scores(head)) / (share + 0.7)
    check(
        student, Ensemble([dense, head], weights, combine="logits"), logits, gradient=mode,
        backend=backend, divergence=fastkd.SkewKL(0.1), temperature=2.0, standardize=True,
    )  # fmt: skip


def test_temperatures_train_beside_a_mean_of_logits():
    student, (dense, head, _) = members()
    warm = torch.tensor(1.7, device=DEVICE)
    ours, exact = warm.clone().requires_grad_(), warm.double().requires_grad_()
    teacher = Ensemble([dense, head], combine="logits")
    fastkd.distillation_loss(student, teacher, temperature=ours, divergence="reverse_kl").backward()
    mean = (scores(dense) + scores(head)) / 2
    defined(student, mean, temperature=exact, divergence="reverse_kl")[0].backward()
    assert_close(ours.grad, exact.grad, "gradient")


# --- routing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", ["probs", "logits"])
@pytest.mark.parametrize("backend", FUSED)
def test_routed_rows_read_one_teacher_alone(backend, combine):
    student, (dense, head, _) = members()
    second = torch.arange(ROWS, device=DEVICE) % 3 == 0
    routed = torch.where(second[:, None], scores(head).float(), dense)
    dense, hidden = dense.clone(), head.hidden.clone()
    dense[second], hidden[~second] = math.nan, math.nan
    weights = [(~second).float(), second.float()]
    teacher = Ensemble([dense, LinearHead(hidden, head.weight)], weights, combine)
    check(student, teacher, routed, backend=backend)


def test_a_teacher_of_weight_0_is_not_read():
    student, (dense, *_) = members()
    other = torch.full_like(dense, math.nan)
    check(student, Ensemble([dense, other], [2, 0]), dense)


def test_rows_that_do_not_count_may_hold_nan():
    student, (dense, head, _) = members()
    labels = torch.zeros(ROWS, dtype=torch.long, device=DEVICE)
    labels[4] = -100
    dense[4] = student[4] = math.nan
    loss, gradient = run(student, Ensemble([dense, head]), labels)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert_zero(gradient[4])


def test_the_label_of_a_row_that_is_ignored_is_no_entry():
    student, teacher = torch.randn(5, 9), torch.randn(5, 9)
    labels, kept = torch.tensor([2, 999, 4, 0, 8]), torch.tensor([0, 2, 3, 4])

    def loss(student, teacher, labels):
        members = [teacher, fastkd.TopK.from_logits(teacher, 2, "label")]
        return fastkd.distillation_loss(
            student, fastkd.Ensemble(members), labels, ignore_index=999, reduction="sum"
        )

    assert_close(loss(student, teacher, labels), loss(student[kept], teacher[kept], labels[kept]))


def test_gradient_is_that_of_the_sum_of_divergences():
    """sum w KL(p_m || q) has the gradient of KL(sum w p_m || q)."""
    student, (dense, head, _) = members()
    logits = head.logits()
    parts = [run(student, teacher)[1].double() for teacher in (dense, logits)]
    _, ours = run(student, Ensemble([dense, logits], [1, 3]))
    assert_close(ours, 0.25 * parts[0] + 0.75 * parts[1], "gradient")


# --- the rest --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_compiled(mode):
    student, teachers = members()
    weights = [0.2, torch.rand(ROWS, device=DEVICE), 0.5]

    def call(z):
        teacher = Ensemble(teachers, weights)
        return fastkd.distillation_loss(z, teacher, gradient=mode, backend="torch")

    plain, compiled = (student.clone().requires_grad_() for _ in range(2))
    call(plain).backward()
    torch.compile(call, fullgraph=True, backend="aot_eager")(compiled).backward()
    assert torch.equal(plain.grad, compiled.grad)


def test_more_dimensions_padding_and_the_module():
    student = torch.randn(2, 5, VOCAB, requires_grad=True)
    teachers = [torch.randn(2, 5, VOCAB + 3), torch.randn(2, 5, VOCAB + 1, dtype=torch.bfloat16)]
    weights = [torch.rand(2, 5), torch.rand(2, 5)]
    module = fastkd.DistillationLoss(vocab_size=VOCAB, reduction="none")
    loss = module(student, Ensemble(teachers, weights))
    p = sum(
        w[..., None].double() * t[..., :VOCAB].double().softmax(-1)
        for w, t in zip(weights, teachers, strict=True)
    )
    assert_close(loss, defined(student, p.log(), reduction="none")[0])


def test_inplace():
    student, (dense, head, _) = members()
    leaf = student.clone().requires_grad_()
    fastkd.distillation_loss(leaf * 1, Ensemble([dense, head]), inplace=True).backward()
    assert_close(leaf.grad, truth(student, mixed([dense, head], [1, 1]))[1], "gradient")
    copy = leaf * 1
    with pytest.raises(ValueError, match="overwrite teacher 1 of the ensemble"):
        fastkd.distillation_loss(copy, Ensemble([dense, copy.detach()]), inplace=True)


@pytest.mark.parametrize(
    ("teacher", "settings", "error", "message"),
    [
        (lambda a, b: [a, TopK.from_logits(b, 3)], {}, ValueError, "tail='bucket'.*Ensemble"),
        (lambda a, b: [a, b], {"teacher_grad": True}, NotImplementedError, "teacher_grad"),
        (lambda a, b: [a, b], {"backend": "reference"}, NotImplementedError, "no Ensemble"),
        (lambda a, b: [a, b[:, :-1]], {}, ValueError, "columns.*vocab_size"),
        (
            lambda a, b: [a, b],
            {"temperature": torch.tensor(2.0, requires_grad=True)},
            NotImplementedError,
            "temperature trains",
        ),
        (
            lambda a, b: [a, TopK.from_logits(b, 3, "renormalize")],
            {"standardize": True},
            ValueError,
            "TopK has none",
        ),
        (
            lambda a, b: [a, Sampled.from_logits(b, 3)],
            {"temperature": 2.0},
            ValueError,
            "no known mass but at 1",
        ),
        (
            lambda a, b: [a, TopK.from_logits(b, 3, "label")],
            {},
            ValueError,
            "pass labels",
        ),
    ],
)
def test_refused(teacher, settings, error, message):
    student, a, b = torch.randn(3, 4, 9).unbind()
    with pytest.raises(error, match=message):
        fastkd.distillation_loss(student, Ensemble(teacher(a, b)), **settings)
    with pytest.raises(TypeError, match="student must be"):
        fastkd.distillation_loss(Ensemble([a, b]), student)


def test_memory_is_that_of_a_chunk(monkeypatch):
    """The mixture exists for a chunk of rows at a time."""
    sizes = []
    made = fastkd.ensembles.logits

    def logits(part, *rest):
        found = made(part, *rest)
        sizes.append(found.size(0))
        return found

    monkeypatch.setattr(fastkd.ensembles, "logits", logits)
    student, teachers = members()
    fastkd.distillation_loss(student, Ensemble(teachers))
    assert sum(sizes) == ROWS
    assert max(sizes) == 4


def test_cross_entropy_alone_reads_no_teacher():
    student, (dense, *_) = members()
    labels = torch.randint(VOCAB, (ROWS,), device=DEVICE)
    teacher = Ensemble([torch.full_like(dense, math.nan)])
    loss = fastkd.distillation_loss(student, teacher, labels, alpha=0.0)
    assert_close(loss, F.cross_entropy(student.double(), labels))
