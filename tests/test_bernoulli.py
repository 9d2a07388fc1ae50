"""Multi-label heads: each class against a softmax of two, and torch's binary cross-entropy."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import fastkd
from tests import oracle
from tests.cases import logits
from tests.closeness import assert_close, assert_zero
from tests.conftest import DEVICE
from tests.running import BACKENDS, FUSED, NO_TRITON
from tests.schedules import SCHEDULES

MODES = ["forward", "backward"]
WEIGHTS = [(1.0, 0.0), (0.0, 1.0), (0.3, 1.2)]


def entropy_of(p):
    return -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)).sum(-1)


def rows_of(
    z, y, labels=None, *, weights=(1.0, 0.0), temperature=1.0, teacher_temperature=None,
    alpha=1.0, entropy_weight=0.0, scale_by_temperature=True,
):  # fmt: skip
    """The loss of each row, in fp64: every class is a row of two, [logit, 0], of a softmax."""
    z, y = z.double(), y.double()
    heats = [
        t[..., None].expand(z.shape) if isinstance(t, torch.Tensor) and t.dim() else t
        for t in (temperature, teacher_temperature)
    ]
    per_class, _ = oracle.distillation_loss(
        F.pad(z[..., None], (0, 1)), F.pad(y[..., None], (0, 1)),
        divergence=("jeffreys", dict(zip(("forward", "reverse"), weights, strict=True))),
        temperature=heats[0], teacher_temperature=heats[1],
        scale_by_temperature=scale_by_temperature, reduction="none",
    )  # fmt: skip
    loss = alpha * per_class.sum(-1)
    if alpha < 1:
        hard = F.binary_cross_entropy_with_logits(z, labels.double(), reduction="none")
        loss = loss + (1 - alpha) * hard.sum(-1)
    if entropy_weight:
        heat = heats[0].double() if isinstance(heats[0], torch.Tensor) else heats[0]
        loss = loss + entropy_weight * entropy_of((z / heat).sigmoid())
    return loss


def gradients(loss, leaves, upstream=None):
    """Of the loss to the leaves that require one, and the loss."""
    leaves = [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream)]


def inputs(*shape, dtype=torch.float32, scale=3.0):
    student, teacher = (x.to(DEVICE, dtype) for x in logits(*shape, scale=scale))
    return student, teacher, torch.randint(2, shape, device=DEVICE)


def loss_of(z, y, labels=None, *, weights=(1.0, 0.0), **settings):
    return fastkd.distillation_loss(
        z, y, labels, divergence=fastkd.Bernoulli(*weights), teacher_grad=True, **settings
    )


# --- against the truth -----------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_closed_form(backend):
    dtype = torch.float64 if backend == "reference" else torch.float32
    p, q = (torch.tensor([[x, 1 - x]], dtype=dtype, device=DEVICE) for x in (0.8, 0.4))
    z = q.logit().requires_grad_()
    loss = loss_of(z, p.logit(), backend=backend)
    loss.backward()
    assert_close(loss, torch.tensor(2 * (0.8 * math.log(2) + 0.2 * math.log(1 / 3))).double())
    assert_close(z.grad, torch.tensor([[-0.4, 0.4]]).double(), "gradient")


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_the_binary_cross_entropy_of_pytorch_less_the_teachers_entropy(backend):
    dtype = torch.float64 if backend == "reference" else torch.float32
    student, teacher, _ = inputs(7, 5, dtype=dtype)
    leaf = student.clone().requires_grad_()
    ours = gradients(
        loss_of(leaf, teacher, temperature=3.0, reduction="sum", backend=backend), [leaf]
    )
    leaf = student.double().requires_grad_()
    p, q = (teacher.double() / 3).sigmoid(), (leaf / 3).sigmoid()
    truth = F.binary_cross_entropy(q, p, reduction="sum")
    truth = 9 * (truth - F.binary_cross_entropy(p, p, reduction="sum"))
    assert_close(ours[0], truth)
    assert_close(ours[1], 3 * (q - p).detach(), "gradient")


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_option_together(weights, mode, backend):
    student, teacher, labels = inputs(6, 23)
    weight = torch.rand(6, device=DEVICE) + 0.1
    weight[2] = 0.0
    settings = {
        "weights": weights, "temperature": 1.7, "teacher_temperature": 0.8, "alpha": 0.3,
        "entropy_weight": -0.2,
    }  # fmt: skip
    leaf = student.clone().requires_grad_()
    ours = gradients(
        loss_of(
            leaf, teacher, labels[:, :20], weight=weight, vocab_size=20, gradient=mode,
            backend=backend, **settings,
        ), [leaf],
    )  # fmt: skip
    leaf = student.double().requires_grad_()
    rows = rows_of(leaf[:, :20], teacher[:, :20], labels[:, :20], **settings)
    true = gradients((rows * weight).sum() / weight.sum(), [leaf])
    assert_close(ours[0], true[0])
    assert_close(ours[1], true[1], "gradient")
    assert_zero(ours[1][:, 20:])
    assert_zero(ours[1][2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_gradients_of_teacher_temperatures_and_weight(weights, shared, backend):
    dtype = torch.float64 if backend == "reference" else torch.float32
    student, teacher, labels = inputs(5, 40, dtype=dtype)
    results = []
    for compute, kind in ((loss_of, dtype), (None, torch.float64)):
        leaves = [
            None if x is None else x.to(DEVICE, kind).requires_grad_()
            for x in (
                student, teacher, torch.tensor(1.7),
                None if shared else torch.tensor([0.5, 1.0, 2.0, 1.3, 0.9]),
                torch.tensor([0.5, 2.0, 1.0, 0.3, 0.1]),
            )
        ]  # fmt: skip
        settings = {
            "weights": weights, "temperature": leaves[2], "teacher_temperature": leaves[3],
            "alpha": 0.7, "entropy_weight": 0.1,
        }  # fmt: skip
        if compute:
            loss = compute(
                *leaves[:2], labels, weight=leaves[4], reduction="none", backend=backend, **settings
            )
        else:
            loss = leaves[4] * rows_of(*leaves[:2], labels, **settings)
        results.append(gradients(loss, leaves, torch.tensor([1.0, -0.5, 2.0, 0.3, 1.0])))
    for ours, true in zip(*results, strict=True):
        assert_close(ours, true, "gradient")


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_gradcheck(weights, backend):
    leaves = [*inputs(3, 5, dtype=torch.float64)[:2], torch.tensor(1.5).double(), torch.rand(3)]
    leaves = [leaf.to(DEVICE, torch.float64).requires_grad_() for leaf in leaves]
    labels = torch.rand(3, 5, device=DEVICE)

    def loss(z, y, temperature, teacher_temperature):
        return loss_of(
            z, y, labels, weights=weights, temperature=temperature,
            teacher_temperature=teacher_temperature + 0.5, alpha=0.4, entropy_weight=0.3,
            reduction="none", backend=backend,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, leaves)


@NO_TRITON
@pytest.mark.parametrize("plan", SCHEDULES)
@pytest.mark.parametrize("mode", MODES)
def test_every_schedule(mode, plan, force):
    """With rows that do not count, and padded columns."""
    force(plan)
    student, teacher, labels = inputs(6, 80)
    weight = torch.tensor([True, True, False, True, True, True], device=DEVICE)
    student[2] = teacher[2] = math.nan
    settings = {"temperature": 2.0, "alpha": 0.6, "entropy_weight": 0.5, "weights": (0.7, 0.4)}
    heat = {"temperature": torch.tensor(2.0, device=DEVICE, requires_grad=mode == "backward")}
    leaf = student.clone().requires_grad_()
    loss, metrics = loss_of(
        leaf, teacher, labels[:, :75], weight=weight, vocab_size=75, gradient=mode,
        return_metrics=True, backend="triton", **settings | heat,
    )  # fmt: skip
    ours = gradients(loss, [leaf, heat["temperature"]])
    true_leaf = student[:, :75].double().requires_grad_()
    heat = {"temperature": torch.tensor(2.0, device=DEVICE, requires_grad=mode == "backward")}
    rows = rows_of(
        true_leaf[weight], teacher[weight][:, :75], labels[weight][:, :75], **settings | heat
    )
    true = gradients(rows.mean(), [true_leaf, heat["temperature"]])
    assert_close(ours[0], true[0])
    assert_close(ours[1][:, :75], true[1], "gradient")
    assert_zero(ours[1][:, 75:])
    for one, other in zip(ours[2:], true[2:], strict=True):
        assert_close(one, other.double(), "gradient")
    z, y = student[weight][:, :75].double(), teacher[weight][:, :75].double()
    bare = {"weights": (0.7, 0.4), "temperature": 2.0, "scale_by_temperature": False}
    assert_close(metrics.kd[weight], rows_of(z, y, **bare))
    assert_close(metrics.ce[weight], rows_of(z, z, labels[weight][:, :75], alpha=0.0))
    assert_close(metrics.student_entropy[weight], entropy_of((z / 2).sigmoid()))
    assert_close(metrics.teacher_entropy[weight], entropy_of((y / 2).sigmoid()))
    assert_close(metrics.agreement[weight], ((z > 0) == (y > 0)).double().mean(-1))
    assert all(metric[2] == 0 for metric in metrics)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype(dtype, mode, backend):
    student, teacher, labels = inputs(4, 50, dtype=dtype)
    settings = {"temperature": 2.0, "alpha": 0.5}
    mode = "backward" if dtype == torch.float16 else mode  # which has no other
    leaf = student.clone().requires_grad_()
    ours = gradients(
        loss_of(leaf, teacher, labels, reduction="sum", gradient=mode, backend=backend, **settings),
        [leaf],
    )
    leaf = student.double().requires_grad_()
    true = gradients(rows_of(leaf, teacher, labels, **settings).sum(), [leaf])
    assert_close(ours[0], true[0])
    assert ours[1].dtype == dtype
    assert_close(ours[1], true[1], "gradient")


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.uint8, torch.float32])
def test_labels_of_any_dtype(kind, backend):
    student, teacher, labels = inputs(4, 9)
    strided = torch.stack([labels, 1 - labels], -1).to(kind)[..., 0]
    leaf = student.clone().requires_grad_()
    true = student.double().requires_grad_()
    loss = loss_of(leaf, teacher, strided, alpha=0.0, backend=backend)
    truth = rows_of(true, teacher, labels, alpha=0.0).mean()
    loss.backward()
    truth.backward()
    assert_close(loss, truth)
    assert_close(leaf.grad, true.grad, "gradient")


@pytest.mark.parametrize("backend", FUSED)
def test_soft_labels_and_leading_dimensions(backend):
    student, teacher, _ = inputs(2, 3, 9)
    labels = torch.rand(2, 3, 9, device=DEVICE)
    rows = loss_of(student, teacher, labels, alpha=0.5, reduction="none", backend=backend)
    assert_close(rows, rows_of(student, teacher, labels, alpha=0.5))
    loss = loss_of(student, teacher, labels, alpha=0.5, reduction="batchmean", backend=backend)
    assert_close(loss, rows_of(student, teacher, labels, alpha=0.5).sum() / 2)
    one = loss_of(student[0, 0], teacher[0, 0], labels[0, 0], alpha=0.5, backend=backend)
    assert_close(one, rows_of(student, teacher, labels, alpha=0.5)[0, 0])
    assert loss_of(student[:0], teacher[:0], labels[:0], alpha=0.5, backend=backend) == 0


# --- digits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("noise", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("shift", [0.0, 6.0, -6.0])
def test_small_divergences(shift, noise, weights, backend):
    """Near p = q, with classes likely or rare, where textbook sums in fp32 keep no digit."""
    teacher = torch.randn(1, 200, device=DEVICE) + shift
    student = teacher + noise * torch.randn(1, 200, device=DEVICE)
    leaf = student.clone().requires_grad_()
    ours = gradients(loss_of(leaf, teacher, weights=weights, backend=backend), [leaf])
    leaf = student.double().requires_grad_()
    true = gradients(rows_of(leaf, teacher, weights=weights).mean(), [leaf])
    assert 1e-15 < true[0] < 1
    assert_close(ours[0], true[0], "gradient" if noise < 1e-4 else "value")
    assert_close(ours[1], true[1], "gradient")


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_certain_heads(weights, backend):
    """Logits up to 90, where sigmoids round to 0 and 1: each class by itself."""
    grid = torch.tensor([-90.0, -40.0, -17.0, -8.0, -1.0, -0.4, 0.0, 0.5, 3.0, 12.0, 25.0, 90.0])
    student = grid.repeat_interleave(12)[:, None].to(DEVICE)
    teacher = grid.repeat(12)[:, None].to(DEVICE)
    loss = loss_of(student, teacher, weights=weights, reduction="none", backend=backend)
    true = rows_of(student, teacher, weights=weights)
    for ours, row in zip(loss, true, strict=True):
        if row > 1e-12:
            assert_close(ours, row)
        else:
            assert abs(ours) < 1e-12


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("mode", MODES)
def test_equal_heads_give_exactly_zero(mode, backend):
    student, _, _ = inputs(4, 300)
    student[1, ::3], student[2, ::5] = math.inf, -math.inf
    leaf = student.clone().requires_grad_()
    loss, gradient = gradients(
        loss_of(leaf, student, weights=(1, 1), gradient=mode, backend=backend), [leaf]
    )
    assert_zero(loss)
    assert_zero(gradient)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("mode", MODES)
def test_cross_entropy_and_entropy_of_trained_heads(mode, backend):
    """Heads that are nearly always right have small terms, which still need their digits."""
    labels = torch.randint(2, (3, 100), device=DEVICE)
    student = (2.0 * labels - 1) * (8 + 4 * torch.rand(3, 100, device=DEVICE))
    settings = {"alpha": 0.0, "entropy_weight": 0.7}
    leaf = student.clone().requires_grad_()
    loss = loss_of(leaf, student, labels, gradient=mode, backend=backend, **settings)
    ours = gradients(loss, [leaf])
    leaf = student.double().requires_grad_()
    true = gradients(rows_of(leaf, student, labels, **settings).mean(), [leaf])
    assert_close(ours[0], true[0])
    assert_close(ours[1], true[1], "gradient")


# --- infinite logits -------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_certain_answers_never_give_nan(backend):
    """Infinite logits on either side and on both, right labels and wrong, at a temperature."""
    inf = math.inf
    values = torch.tensor([-inf, -2.0, 0.5, inf])
    z = values.repeat_interleave(8)[:, None].to(DEVICE).requires_grad_()
    y = values.repeat_interleave(2).repeat(4)[:, None].to(DEVICE).requires_grad_()
    labels = torch.tensor([0, 1]).repeat(16)[:, None].to(DEVICE)
    temperature = torch.tensor(2.0, device=DEVICE, requires_grad=True)
    for weights in WEIGHTS:
        loss, metrics = loss_of(
            z, y, labels, weights=weights, temperature=temperature, alpha=0.5, entropy_weight=0.1,
            scale_by_temperature=False, reduction="none", backend=backend, return_metrics=True,
        )  # fmt: skip
        assert not loss.isnan().any()
        p, q = (y / 2).sigmoid()[:, 0], (z / 2).sigmoid()[:, 0]
        wrong = ((p > 0) & (q == 0)) | ((p < 1) & (q == 1))
        missed = ((q > 0) & (p == 0)) | ((q < 1) & (p == 1))
        infinite = (wrong & (weights[0] > 0)) | (missed & (weights[1] > 0))
        assert torch.equal(metrics.kd == inf, infinite)
        unit = z.sigmoid()[:, 0]
        assert torch.equal(metrics.ce == inf, unit == 1 - labels[:, 0])
        if backend != "reference":
            for gradient in torch.autograd.grad(loss.sum(), (z, y, temperature)):
                assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", FUSED)
def test_hard_labels_as_a_teacher(backend):
    """A teacher of infinite logits is a set of labels."""
    student, _, labels = inputs(4, 30)
    leaf = student.clone().requires_grad_()
    teacher = torch.where(labels == 1, math.inf, -math.inf)
    ours = gradients(loss_of(leaf, teacher, backend=backend), [leaf])
    leaf = student.clone().requires_grad_()
    hard = gradients(loss_of(leaf, student, labels, alpha=0.0, backend=backend), [leaf])
    assert_close(ours[0], hard[0].double())
    assert_close(ours[1], hard[1].double(), "gradient")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side", [0, 1])
def test_nan_in_a_counted_row_is_not_hidden(side, backend):
    pair = inputs(2, 5)[:2]
    pair[side][0, 0] = math.nan
    assert loss_of(*pair, backend=backend).isnan()


# --- contracts -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", FUSED)
def test_inplace_and_layouts(backend):
    student, teacher, labels = inputs(4, 33)
    settings = {"alpha": 0.5, "entropy_weight": 0.1, "backend": backend}
    leaf = student.clone().requires_grad_()
    expected = gradients(loss_of(leaf, teacher, labels, **settings), [leaf])
    leaf = (student / 2).requires_grad_()
    hidden = leaf * 2
    loss = loss_of(hidden, teacher, labels, inplace=True, **settings)
    loss.backward()
    assert torch.equal(loss, expected[0])
    assert torch.equal(hidden.detach(), expected[1])
    wide = torch.cat([student, student], -1)[:, :33].requires_grad_()
    far = torch.stack([teacher, teacher * 0], 1)[:, 0]
    assert torch.equal(gradients(loss_of(wide, far, labels, **settings), [wide])[1], expected[1])
    turned = student.t().contiguous().t().requires_grad_()
    ours = gradients(loss_of(turned, teacher[:1].expand(4, -1), labels, **settings), [turned])
    true = rows_of(student, teacher[:1].expand(4, -1), labels, alpha=0.5, entropy_weight=0.1)
    assert_close(ours[0], true.mean())


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("mode", MODES)
def test_under_compile(mode, backend):
    def step(leaf, teacher, labels, temperature):
        return loss_of(
            leaf * 1.5, teacher, labels, temperature=temperature, alpha=0.5, entropy_weight=0.1,
            gradient=mode, backend=backend,
        )  # fmt: skip

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, (rows, temperature) in enumerate([(8, 2.0), (9, 3.0), (31, 1.5)]):
        student, teacher, labels = inputs(rows, 20)
        with torch._dynamo.config.patch(error_on_recompile=n > 0):
            leaf = student.requires_grad_()
            ours, plain = (
                gradients(call(leaf, teacher, labels, temperature), [leaf])
                for call in (compiled, step)
            )
        for one, other in zip(ours, plain, strict=True):
            assert_close(one, other.double(), "gradient")
    torch._dynamo.reset()


ERRORS = [
    ({"labels": torch.zeros(4).long()}, r"multi-hot, \(4, 9\), got \(4,\) in torch.int64"),
    ({"labels": torch.full((4, 9), 2.0)}, r"lie in \[0, 1\], got 2.0"),
    ({"labels": torch.full((4, 9), -100)}, "leave out rows by `weight`"),
    ({"standardize": True}, "standardize=True is for softmax heads"),
    ({"label_smoothing": 0.1}, "label_smoothing=0.1 .*: smooth the labels"),
    ({"ignore_index": 0}, "ignore_index=0 .*: leave out rows by `weight`"),
]


@pytest.mark.parametrize(("change", "message"), ERRORS)
def test_what_heads_have_no_use_for_is_refused(change, message):
    student, teacher, labels = inputs(4, 9)
    change = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    with pytest.raises(ValueError, match=message):
        loss_of(student, teacher, **{"labels": labels} | change)


def test_labels_that_are_no_tensor_are_refused():
    student, teacher, _ = inputs(1, 2)
    with pytest.raises(TypeError, match="labels must be a tensor, got list"):
        loss_of(student, teacher, [[0, 1]])
    with pytest.raises(ValueError, match="Bernoulli: forward and reverse are both 0"):
        fastkd.Bernoulli(0, 0)
