"""The public function: conventions, reductions, errors."""

from __future__ import annotations

import inspect
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import fastkd
from fastkd import checks, tracing
from tests.cases import logits
from tests.closeness import assert_close, assert_zero
from tests.conftest import DEVICE
from tests.running import BACKENDS, FUSED, defined

N, V = 4, 10


@pytest.fixture
def pair():
    return tuple(x.float().to(DEVICE) for x in logits(N, V))


def _chain(student, teacher, temperature):
    return (
        F.kl_div(
            F.log_softmax(student / temperature, -1),
            F.softmax(teacher / temperature, -1),
            reduction="batchmean",
        )
        * temperature**2
    )


# --- conventions -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(N, V), (2, 3, V)])
def test_is_the_chain_that_people_write(shape, backend):
    student, teacher = (x.to(DEVICE) for x in logits(*shape))
    ours = fastkd.distillation_loss(
        student.float(), teacher.float(), temperature=2.0, reduction="batchmean", backend=backend
    )
    assert_close(ours, _chain(student, teacher, 2.0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_that_of_pytorch(pair, smoothing, backend):
    labels = torch.tensor([3, -100, 0, 9], device=DEVICE)
    ours = fastkd.distillation_loss(
        *pair, labels, alpha=0.0, label_smoothing=smoothing, temperature=3.0, backend=backend
    )
    assert_close(ours, F.cross_entropy(pair[0].double(), labels, label_smoothing=smoothing))


@pytest.mark.parametrize("backend", BACKENDS)
def test_entropy_is_added_unscaled(pair, backend):
    q = (pair[0].double() / 2).softmax(-1)
    entropy = -(q * q.log()).sum(-1).mean()
    plain, more = (
        fastkd.distillation_loss(*pair, temperature=2.0, entropy_weight=w, backend=backend)
        for w in (0.0, 1.0)
    )
    assert_close(more, plain.double() + entropy)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("divergence", "power"), [("forward_kl", 2), ("tvd", 1)])
def test_temperature_scaling(pair, divergence, power, backend):
    settings = {"divergence": divergence, "temperature": 3.0, "teacher_temperature": 2.0}
    scaled, plain = (
        fastkd.distillation_loss(*pair, scale_by_temperature=s, backend=backend, **settings)
        for s in (True, False)
    )
    assert_close(scaled, 6.0 ** (power / 2) * plain.double())


@pytest.mark.parametrize("backend", BACKENDS)
def test_reductions(pair, backend):
    student, teacher = (x.view(2, 2, V) for x in pair)
    labels = torch.tensor([[1, -100], [2, 3]], device=DEVICE)
    weight = torch.tensor([[2.0, 5.0], [0.5, 0.0]], device=DEVICE)

    def loss(**settings):
        return fastkd.distillation_loss(student, teacher, labels, backend=backend, **settings)

    rows = fastkd.distillation_loss(student, teacher, reduction="none", backend=backend).double()
    counted = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64, device=DEVICE)
    assert_close(loss(reduction="none"), rows * counted)
    assert_close(loss(reduction="sum"), (rows * counted).sum())
    assert_close(loss(), (rows * counted).sum() / 3)
    assert_close(loss(reduction="batchmean"), (rows * counted).sum() / 2)
    weighted = rows * counted * weight
    assert_close(loss(weight=weight, reduction="none"), weighted)
    assert_close(loss(weight=weight), weighted.sum() / 2.5)
    assert_close(loss(weight=weight, num_items=7), weighted.sum() / 7)
    items = torch.tensor(7, device=DEVICE)
    assert_close(loss(weight=weight, num_items=items), weighted.sum() / 7)
    mask = weight > 0
    assert_close(loss(weight=mask), (rows * counted * mask).sum() / 2)


def test_micro_batches_add_up_with_num_items(pair):
    student, teacher = pair
    labels = torch.tensor([1, -100, -100, 3], device=DEVICE)
    whole = fastkd.distillation_loss(student, teacher, labels)
    parts = [
        fastkd.distillation_loss(student[i], teacher[i], labels[i], num_items=2)
        for i in (slice(0, 1), slice(1, 4))
    ]
    assert_close(sum(parts), whole.double())


@pytest.mark.parametrize("backend", BACKENDS)
def test_metrics(pair, backend):
    student, teacher = pair
    teacher = teacher.clone()
    teacher[2] = student[2]
    labels = torch.tensor([3, -100, 0, 9], device=DEVICE)
    for settings in ({}, {"gradient": "backward"}, {"alpha": 0.5}):
        loss, metrics = fastkd.distillation_loss(
            student.clone().requires_grad_(), teacher, labels, temperature=2.0,
            return_metrics=True, backend=backend, **settings,
        )  # fmt: skip
        assert loss.requires_grad
        assert not any(metric.requires_grad for metric in metrics)
        q, p = (x.double().div(2).log_softmax(-1) for x in (student, teacher))
        counted = labels != -100
        expected = fastkd.Metrics(
            (p.exp() * (p - q)).sum(-1),
            F.cross_entropy(student.double(), labels.clamp_min(0), reduction="none"),
            -(q.exp() * q).sum(-1),
            -(p.exp() * p).sum(-1),
            (q.argmax(-1) == p.argmax(-1)).double(),
        )
        for ours, true in zip(metrics, expected, strict=True):
            assert_close(ours, true * counted)
    _, metrics = fastkd.distillation_loss(*pair, return_metrics=True, backend=backend)
    assert metrics.ce is None


def test_the_loss_is_fp32_and_fp64_for_fp64(pair):
    student, teacher = pair
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert fastkd.distillation_loss(student.to(dtype), teacher).dtype == torch.float32
    assert fastkd.distillation_loss(student.double(), teacher).dtype == torch.float64


def test_gradient_has_the_dtype_of_its_tensor(pair):
    student = pair[0].bfloat16().requires_grad_()
    teacher = pair[1].requires_grad_()
    fastkd.distillation_loss(student, teacher, teacher_grad=True).backward()
    assert student.grad.dtype == torch.bfloat16
    assert teacher.grad.dtype == torch.float32


def test_half_precision_goes_backward_by_itself(pair):
    """1/N in an fp16 gradient would underflow before a GradScaler can lift it."""
    student = (pair[0].half() / 100).requires_grad_()
    scale = 2.0**16
    loss = fastkd.distillation_loss(student, pair[1] / 100, num_items=10**6)
    (loss * scale).backward()
    true = (student.detach().double().softmax(-1) - (pair[1].double() / 100).softmax(-1)) / 1e6
    assert_close(student.grad, true * scale, "gradient")


def test_a_temperature_that_learns(pair):
    temperature = torch.tensor(2.0, requires_grad=True, device=DEVICE)
    fastkd.distillation_loss(*pair, temperature=temperature).backward()
    step = 1e-4
    high, low = (
        fastkd.distillation_loss(*(x.double() for x in pair), temperature=2.0 + s * step)
        for s in (1, -1)
    )
    assert temperature.grad.item() == pytest.approx((high - low).item() / (2 * step), rel=1e-4)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("divergence", ["reverse_kl", "jeffreys"])
def test_an_infinite_row_leaves_a_temperature_that_learns_finite(pair, divergence, backend):
    """Though the row is multiplied by its square."""
    student, teacher = pair
    teacher[0, 1] = -math.inf
    temperature = torch.tensor(2.0, requires_grad=True, device=DEVICE)
    loss = fastkd.distillation_loss(
        student, teacher, temperature=temperature, divergence=divergence, backend=backend
    )
    loss.backward()
    assert loss == math.inf
    assert temperature.grad.isfinite()


# --- autograd's contracts --------------------------------------------------------------------


@pytest.mark.parametrize("backend", FUSED)
def test_second_backward(pair, backend):
    student = pair[0].requires_grad_()
    loss = fastkd.distillation_loss(student, pair[1], gradient="backward", backend=backend)
    first, second = (
        torch.autograd.grad(loss, student, retain_graph=True)[0].clone() for _ in range(2)
    )
    assert torch.equal(first, second)
    loss = fastkd.distillation_loss(student, pair[1], gradient="forward", backend=backend)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="gradient='backward'"):
        loss.backward()


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_create_graph_changes_no_gradient(pair, mode, backend):
    student = pair[0].requires_grad_()

    def gradient(**settings):
        loss = fastkd.distillation_loss(student, pair[1], gradient=mode, backend=backend)
        return torch.autograd.grad(loss, student, torch.tensor(-1.7, device=DEVICE), **settings)[0]

    assert torch.equal(gradient(create_graph=True), gradient())
    assert gradient().count_nonzero()


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_second_derivative_is_refused(pair, mode, backend):
    student = pair[0].requires_grad_()
    loss = fastkd.distillation_loss(student, pair[1], gradient=mode, backend=backend)
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(NotImplementedError, match="reference"):
        (gradient**2).sum().backward()


def test_second_derivative_by_the_reference(pair):
    student = pair[0].double().requires_grad_()

    def loss(z):
        return fastkd.distillation_loss(z, pair[1].double(), backend="reference")

    assert torch.autograd.gradgradcheck(loss, student)


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_torch_func(pair, mode):
    def loss(z):
        return fastkd.distillation_loss(z, pair[1], gradient=mode, backend="torch")

    student = pair[0].requires_grad_()
    (expected,) = torch.autograd.grad(loss(student), student)
    assert torch.equal(torch.func.grad(loss)(student.detach()), expected)


@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("kind", ["topk", "sampled", "head", "ensemble", "head of the student"])
def test_torch_func_beside_other_operands(pair, kind, mode):
    student, other = (x.float() for x in pair)
    weight = torch.randn(student.size(-1), 3, device=DEVICE)
    teacher = {
        "topk": fastkd.TopK.from_logits(other, 3), "sampled": fastkd.Sampled.from_logits(other, 9),
        "head": fastkd.LinearHead(other[:, :3], weight),
        "ensemble": fastkd.Ensemble([other, 2 * other]),
    }.get(kind, other)  # fmt: skip

    def loss(x):
        rows = (
            x if kind in ("topk", "sampled", "head", "ensemble") else fastkd.LinearHead(x, weight)
        )
        return fastkd.distillation_loss(rows, teacher, gradient=mode, backend="torch")

    leaf = (student[:, :3] if kind == "head of the student" else student).clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    assert_close(torch.func.grad(loss)(leaf.detach()), expected.double(), "gradient")


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_transforms_without_a_rule_are_refused(pair, mode):
    student, teacher = pair

    def rows(z):
        return fastkd.distillation_loss(z, teacher, reduction="none", backend="torch")

    def loss(z):
        return fastkd.distillation_loss(z, teacher, gradient=mode, backend="torch")

    for call in (
        lambda: torch.func.vmap(loss)(student[None]), lambda: torch.func.jacrev(rows)(student),
        lambda: torch.func.jacrev(loss)(student),
        lambda: torch.func.vmap(fastkd.kl_div)(student, teacher),
    ):  # fmt: skip
        with pytest.raises(NotImplementedError, match=r"vmap.* takes all rows at once"):
            call()
    with pytest.raises(NotImplementedError, match=r"jvp.* has the reverse mode"):
        torch.func.jvp(loss, (student,), (teacher,))


@pytest.mark.parametrize("backend", FUSED)
def test_no_gradient_asked_for(pair, backend):
    expected, _ = defined(*pair)
    student = pair[0].requires_grad_()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            loss = fastkd.distillation_loss(student, pair[1], backend=backend, inplace=True)
        assert not loss.requires_grad
        assert_close(loss, expected.double())


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_checkpointing_and_autocast(pair, mode, backend):
    weight = torch.randn(V, V, device=DEVICE, requires_grad=True)

    def loss(hidden):
        logits = hidden @ weight
        return fastkd.distillation_loss(logits, pair[1], gradient=mode, backend=backend)

    def gradient(call):
        with torch.autocast(DEVICE, torch.bfloat16):
            value = call()
        assert value.dtype == torch.float32
        return torch.autograd.grad(value, weight)[0]

    plain = gradient(lambda: loss(pair[0]))
    again = gradient(lambda: torch.utils.checkpoint.checkpoint(loss, pair[0], use_reentrant=False))
    assert torch.equal(plain, again)


class _Squared(fastkd.Divergence):
    name = "squared of test_functional"

    @staticmethod
    def value(lp, lq, a, b):
        return (lp.exp() - lq.exp()) ** 2


@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("kind", ["topk", "label-aware", "of one's own"])
def test_a_checkpoint_runs_once_more_and_no_oftener(pair, kind, mode):
    """Where a slope is found by autograd too, whose tensors are no matter of the checkpoint's."""
    calls = []
    student, teacher = pair[0].detach().requires_grad_(), pair[1]
    labels = torch.zeros(len(teacher), dtype=torch.int64, device=DEVICE)
    if kind == "topk":
        teacher = fastkd.TopK.from_logits(teacher, 3)
    divergence = {"label-aware": fastkd.DKD(), "of one's own": _Squared()}.get(kind, "reverse_kl")

    def loss(logits):
        calls.append(len(calls))
        return fastkd.distillation_loss(
            logits * 1.5, teacher, labels, divergence=divergence, gradient=mode, backend="torch"
        )

    (plain,) = torch.autograd.grad(loss(student), student)
    value = torch.utils.checkpoint.checkpoint(loss, student, use_reentrant=False)
    assert len(calls) == 2
    (again,) = torch.autograd.grad(value, student)
    assert len(calls) == 3
    assert torch.equal(plain, again)


# --- errors ----------------------------------------------------------------------------------


def _labels(*values):
    return torch.tensor(values, device=DEVICE)


class _Plain(fastkd.Divergence):
    name = "plain"


ERRORS = [
    (TypeError, "student must be a tensor", {"student": [1.0]}),
    (TypeError, "float64, got torch.int64; class indices", {"student": torch.ones(N, V).long()}),
    (TypeError, "teacher must hold logits", {"teacher": torch.ones(N, V).bool()}),
    (ValueError, r"\[..., V\], got a 0-d", {"student": torch.tensor(1.0)}),
    (TypeError, "got SimpleNamespace: pass its logits", {"student": SimpleNamespace(logits=1)}),
    (ValueError, "equal leading shapes.*both alike", {"teacher": torch.ones(N + 1, V)}),
    (ValueError, "10 and 12 columns: .* vocab_size", {"teacher": torch.ones(N, V + 2)}),
    (ValueError, "between 1 and the narrower width, got 11", {"vocab_size": V + 1}),
    (ValueError, "got 0", {"vocab_size": 0}),
    (TypeError, "vocab_size must be a whole number", {"vocab_size": 3.0}),
    (ValueError, "'forward_lk'; did you mean 'forward_kl'", {"divergence": "forward_lk"}),
    (ValueError, r"such as fastkd.JSD\(0.1\), got 'js'", {"divergence": "js"}),
    (ValueError, r"fastkd.JSD\(\)", {"divergence": "jsd"}),
    (ValueError, r"fastkd.AlphaBeta\(0.2, 0.7\)", {"divergence": "alpha_beta:0.2,0.7"}),
    (ValueError, r"fastkd.Jeffreys\(1, 0\)", {"divergence": "jeffreys:1,0"}),
    (TypeError, r"write JSD\(\)", {"divergence": fastkd.JSD}),
    (TypeError, "a name or a fastkd.Divergence", {"divergence": 3}),
    (ValueError, "did you mean 'batchmean'", {"reduction": "batch_mean"}),
    (ValueError, "gradient must be one of", {"gradient": "backwards"}),
    (ValueError, "backend must be one of", {"backend": "cuda"}),
    (ValueError, "temperature must be finite and > 0, got 0", {"temperature": 0}),
    (ValueError, "temperature must be finite and > 0, got nan", {"temperature": math.nan}),
    (ValueError, "teacher_temperature must be .* got -1.0", {"teacher_temperature": -1.0}),
    (ValueError, "temperature must be at most 1e.18, got 1e.20", {"temperature": 1e20}),
    (ValueError, "> 0 in every row, at most 1e.18", {"temperature": torch.tensor(1e20)}),
    (TypeError, "temperature must be a number", {"temperature": "2"}),
    (TypeError, "temperature must be floating-point", {"temperature": torch.tensor(2)}),
    (ValueError, r"shape of the rows, \(4,\)", {"temperature": torch.ones(3)}),
    (ValueError, r"alpha must lie in \[0, 1\], got 1.5", {"alpha": 1.5}),
    (TypeError, "alpha must be a number", {"alpha": True}),
    (ValueError, "needs labels", {"alpha": 0.5}),
    (ValueError, "label_smoothing must lie in", {"label_smoothing": -0.1}),
    (ValueError, "entropy_weight must be finite", {"entropy_weight": math.inf}),
    (TypeError, "labels must be class indices", {"labels": torch.ones(N)}),
    (TypeError, r"pass labels.long\(\)", {"labels": torch.ones(N).short()}),
    (TypeError, "a mask of rows as `weight`", {"labels": torch.ones(N).bool()}),
    (ValueError, r"labels must have the shape.*sliced", {"labels": torch.ones(2, 2).long()}),
    (ValueError, r"weight must have the shape", {"weight": torch.ones(N, V)}),
    (TypeError, r"weight must be floating.*pass mask.bool\(\)", {"weight": torch.ones(N).long()}),
    (ValueError, "replaces the divisor", {"num_items": 3, "reduction": "sum"}),
    (ValueError, "num_items must be finite and > 0", {"num_items": 0}),
    (ValueError, "0-d tensor", {"num_items": torch.ones(2)}),
    (ValueError, "need a scalar loss", {"gradient": "forward", "reduction": "none"}),
    (ValueError, "needs gradient='forward'", {"inplace": True, "gradient": "backward"}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "message", "change"), ERRORS, ids=lambda x: str(x)[:40])
def test_bad_input_is_refused(pair, kind, message, change):
    student, teacher = pair
    change = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    arguments = {"student": student.clone().requires_grad_(), "teacher": teacher} | change
    before = [x.detach().clone() for x in (student, teacher)]
    with pytest.raises(kind, match=message):
        fastkd.distillation_loss(**arguments)
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


def test_labels_out_of_range_are_refused_where_looking_is_free(pair, monkeypatch):
    monkeypatch.setattr(tracing, "DEBUG", True)
    for labels in (_labels(0, 1, V, 2), _labels(0, 1, -1, 2)):
        with pytest.raises(ValueError, match=r"\[0, 10\) or be ignore_index=-100"):
            fastkd.distillation_loss(*pair, labels, alpha=0.5)


def test_teacher_that_trains_is_refused(pair):
    teacher = pair[1].requires_grad_()
    with pytest.raises(ValueError, match=r"second argument.*detach it, or say teacher_grad=True"):
        fastkd.distillation_loss(pair[0], teacher)
    with torch.no_grad():
        fastkd.distillation_loss(pair[0], teacher)


def test_forward_mode_gives_no_other_gradients(pair):
    temperature = torch.tensor(2.0, requires_grad=True, device=DEVICE)
    with pytest.raises(ValueError, match="temperature requires one too"):
        fastkd.distillation_loss(*pair, temperature=temperature, gradient="forward")


def test_inplace_is_refused_where_it_would_harm(pair):
    leaf = pair[0].requires_grad_()
    with pytest.raises(ValueError, match="leaf"):
        fastkd.distillation_loss(leaf, pair[1], inplace=True)
    part = (leaf * 2)[:, : V - 1]
    with pytest.raises(ValueError, match="part of a larger tensor"):
        fastkd.distillation_loss(part, pair[1][:, : V - 1], inplace=True)
    spread = (leaf * 2)[:1].expand(N, -1)
    with pytest.raises(ValueError, match=r"larger tensor|expanded"):
        fastkd.distillation_loss(spread, pair[1], inplace=True)


@pytest.mark.parametrize("backend", FUSED)
def test_inplace_on_what_autograd_needs_is_caught(pair, backend):
    """By the version of the logits, which a kernel that overwrites them does not count."""
    leaf = pair[0].requires_grad_()
    loss = fastkd.distillation_loss(leaf.exp(), pair[1], inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_triton_says_where_it_cannot_run(pair, monkeypatch):
    with pytest.raises(NotImplementedError, match="float64"):
        fastkd.distillation_loss(*(x.double() for x in pair), backend="triton")
    with pytest.raises(NotImplementedError, match="device"):
        fastkd.distillation_loss(*pair, divergence=_Plain(), backend="triton")
    if DEVICE == "cpu":
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
            fastkd.distillation_loss(*pair, backend="triton")
    monkeypatch.setattr(checks, "HAS_TRITON", False)
    with pytest.raises(NotImplementedError, match="pip install triton"):
        fastkd.distillation_loss(*pair, backend="triton")


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a second device")
def test_mixed_devices_are_refused(pair):
    with pytest.raises(ValueError, match="one device"):
        fastkd.distillation_loss(pair[0], pair[1].cpu())


def test_meta_tensors_stand_for_a_second_device(pair):
    with pytest.raises(ValueError, match="one device"):
        fastkd.distillation_loss(pair[0], pair[1].to("meta"))


def test_every_argument_is_documented():
    text = inspect.getdoc(fastkd.distillation_loss)
    for name in inspect.signature(fastkd.distillation_loss).parameters:
        assert f"\n    {name}: " in text, name


def test_a_zero_weight_row_gets_a_gradient_of_zero(pair):
    student = pair[0].requires_grad_()
    weight = torch.tensor([1.0, 0, 1, 1], device=DEVICE)
    fastkd.distillation_loss(student, pair[1], weight=weight).backward()
    assert_zero(student.grad[1])
    assert student.grad[0].abs().max() > 0


def test_factors_beyond_fp32_are_infinite(pair):
    labels = torch.zeros(N, dtype=torch.long, device=DEVICE)
    loss = fastkd.distillation_loss(*pair, labels, entropy_weight=1e300)
    assert loss.item() == math.inf
    leaf = pair[0].requires_grad_()
    assert fastkd.distillation_loss(leaf, pair[1], num_items=1e-300).item() == math.inf
