"""What kind of tensor an operand may be: from inference mode, lazily negated, fake, meta, and where
the numbers of a call are made.
"""

from __future__ import annotations

import numpy
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastkd
from tests.cases import logits
from tests.closeness import assert_close
from tests.conftest import DEVICE
from tests.running import BACKENDS, FUSED, defined

N, V = 4, 10
SETTINGS = {"temperature": 2.0, "alpha": 0.7, "entropy_weight": 0.1}


def _operands(dtype=torch.float32):
    student, teacher = (x.to(DEVICE, dtype) for x in logits(N, V))
    labels = torch.tensor([3, -100, 0, 9], device=DEVICE)
    return student, teacher, labels


# --- inference mode --------------------------------------------------------------------------

WAYS = {
    "auto": {},
    "rows": {"reduction": "none"},
    "backward": {"gradient": "backward"},
    "learned": {"temperature": nn.Parameter(torch.tensor(2.0, device=DEVICE))},
    "standardized": {"standardize": True, "gradient": "backward"},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("way", WAYS)
def test_operands_from_inference_mode(way, dtype, backend):
    settings = SETTINGS | WAYS[way] | {"backend": backend}
    student, teacher, labels = _operands(dtype)
    weight, temperature = torch.rand(N, device=DEVICE), torch.rand(N, device=DEVICE) + 1
    with torch.inference_mode():
        inferred = [x.clone() for x in (teacher, labels, weight, temperature)]
    results = []
    for t, y, w, per_row in ([teacher, labels, weight, temperature], inferred):
        leaf = student.clone().requires_grad_()
        loss = fastkd.distillation_loss(
            leaf, t, y, weight=w, teacher_temperature=per_row, **settings
        )
        results.append((loss, *torch.autograd.grad(loss.sum(), leaf)))
    for plain, ours in zip(*results, strict=True):
        assert plain.abs().max() > 1e-3
        assert torch.equal(plain, ours)


@pytest.mark.parametrize("log_target", [False, True])
def test_kl_div_of_operands_from_inference_mode(log_target):
    input, target = (x.log_softmax(-1) for x in logits(N, V))
    target = target if log_target else target.exp()
    with torch.inference_mode():
        inferred = [input.clone(), target.clone()]
    for at in (0, 1):
        gradients = []
        for pair in ([input, target], inferred):
            operands = list(pair)
            operands[at] = (input, target)[at].clone().requires_grad_()
            loss = fastkd.kl_div(*operands, reduction="sum", log_target=log_target)
            gradients += torch.autograd.grad(loss, operands[at])
        assert torch.equal(*gradients)
        assert gradients[0].abs().max() > 1e-3


# --- lazy signs ------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_lazily_negated_operands(mode, backend):
    student, teacher, labels = _operands()
    weight, temperature = torch.rand(N, device=DEVICE), torch.rand(N, device=DEVICE) + 1
    upstream = torch.tensor(-1.5, device=DEVICE)
    results = []
    for lazy in (lambda x: x, lambda x: torch._neg_view(-x)):
        leaf = student.clone().requires_grad_()
        loss = fastkd.distillation_loss(
            lazy(leaf), lazy(teacher), labels, weight=lazy(weight), alpha=0.5,
            teacher_temperature=lazy(temperature), gradient=mode, backend=backend,
        )  # fmt: skip
        results.append((loss, *torch.autograd.grad(loss, leaf, lazy(upstream))))
    for plain, ours in zip(*results, strict=True):
        assert plain.abs().max() > 1e-3
        assert torch.allclose(plain, ours, rtol=1e-6)


def test_kl_div_of_lazily_negated_operands():
    input, target = (x.log_softmax(-1).requires_grad_() for x in logits(N, V))
    upstream = torch.rand(N, V, dtype=torch.float64)
    results = []
    for lazy in (lambda x: x, lambda x: torch._neg_view(-x)):
        loss = fastkd.kl_div(lazy(input), lazy(target), reduction="none", log_target=True)
        results.append((loss, *torch.autograd.grad(loss, (input, target), lazy(upstream))))
    for plain, ours in zip(*results, strict=True):
        assert torch.equal(plain, ours)


# --- no values -------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["fake", "meta"])
@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("standardize", [False, True])
def test_tensors_without_values(where, mode, standardize):
    """Shapes and dtypes come out, for what plans memory without running a model."""

    def run(device):
        student = torch.randn(2, 3, V, dtype=torch.bfloat16, device=device, requires_grad=True)
        teacher, labels = torch.randn(2, 3, V, device=device), torch.arange(6, device=device)
        loss, metrics = fastkd.distillation_loss(
            student, teacher, labels.view(2, 3), weight=torch.rand(2, 3, device=device),
            temperature=torch.rand(2, 3, device=device), num_items=labels.sum(),
            standardize=standardize, alpha=0.5, gradient=mode, return_metrics=True,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(loss, student)
        return loss, metrics.kd, gradient

    if where == "fake":
        with FakeTensorMode():
            loss, kd, gradient = run("cpu")
    else:
        loss, kd, gradient = run("meta")
    assert (loss.shape, loss.dtype) == ((), torch.float32)
    assert (kd.shape, kd.dtype) == ((2, 3), torch.float32)
    assert (gradient.shape, gradient.dtype) == ((2, 3, V), torch.bfloat16)


def test_kl_div_of_tensors_without_values():
    with FakeTensorMode():
        input = torch.randn(N, V, requires_grad=True)
        (gradient,) = torch.autograd.grad(
            fastkd.kl_div(input, torch.rand(N, V), reduction="sum"), input
        )
    assert gradient.shape == (N, V)


def _nested():
    return torch.nested.nested_tensor([torch.randn(2, V), torch.randn(3, V)], layout=torch.jagged)


@pytest.mark.parametrize(
    ("operand", "message"),
    [
        (lambda: AsyncCollectiveTensor(torch.randn(N, V)), r"under way.*\.wait\(\)"),
        (_nested, r"a nested tensor: pass .*\.values\(\)"),
        (lambda: torch.randn(N, V).to_sparse(), r"layout torch.sparse_coo: pass .*to_dense"),
        (lambda: torch.randn(N, V).to_mkldnn(), r"layout torch._mkldnn: pass .*to_dense"),
    ],
)
def test_tensors_without_rows_in_memory_are_refused(operand, message):
    plain = torch.randn(N, V)
    for name in ("student", "teacher"):
        operands = {"student": plain, "teacher": plain, name: operand()}
        with pytest.raises(NotImplementedError, match=f"{name} is .*{message}"):
            fastkd.distillation_loss(**operands)
    for name in ("input", "target"):
        operands = {"input": plain, "target": plain, name: operand()}
        with pytest.raises(NotImplementedError, match=f"{name} is .*{message}"):
            fastkd.kl_div(**operands)
    for name in ("weight", "labels", "temperature", "num_items"):
        with pytest.raises(NotImplementedError, match=f"{name} is .*{message}"):
            fastkd.distillation_loss(plain, plain, **{name: operand()})


# --- numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [numpy.float32, numpy.float64, numpy.float16, numpy.int64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_of_numpy(number, backend):
    student, teacher, labels = _operands()
    plain, ours = (
        fastkd.distillation_loss(
            student, teacher, labels, temperature=kind(2), teacher_temperature=kind(3),
            alpha=kind(0), label_smoothing=kind(1), entropy_weight=kind(2), num_items=kind(3),
            backend=backend, divergence=fastkd.Jeffreys(kind(1), kind(2)),
            ignore_index=whole(-100), vocab_size=whole(V),
        )
        for kind, whole in ((float, int), (number, numpy.int64))
    )  # fmt: skip
    assert plain.abs() > 1e-3
    assert torch.equal(plain, ours)


@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_of_32_bits(backend):
    student, teacher, labels = _operands()
    plain, ours = (
        fastkd.distillation_loss(student, teacher, y, alpha=0.5, backend=backend)
        for y in (labels, labels.int())
    )
    assert torch.equal(plain, ours)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (4,)])
def test_the_dtype_of_a_temperature_is_its_own(shape, dtype, backend):
    """The loss has that of the logits, its scale is exact, and the gradient is rounded once."""
    student, teacher = (x.float().to(DEVICE) for x in logits(4, 9))
    given = (torch.rand(shape) * 2 + 0.6).to(DEVICE, dtype).requires_grad_()
    exact = given.detach().double().requires_grad_()
    loss = fastkd.distillation_loss(student, teacher, temperature=given, backend=backend)
    truth, _ = defined(student, teacher, temperature=exact)
    loss.backward()
    truth.backward()
    assert loss.dtype == torch.float32
    assert_close(loss, truth)
    assert given.grad.dtype == dtype
    assert_close(given.grad, exact.grad, "gradient")


# --- the default device ----------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", ["forward_kl", fastkd.JSD(0.3), fastkd.Renyi(0.4)])
@pytest.mark.parametrize("standardize", [False, True])
def test_nothing_is_made_on_the_default_device(divergence, standardize, backend):
    student, teacher, labels = _operands()
    settings = {"divergence": divergence, "standardize": standardize, "backend": backend}
    results = []
    for device in (DEVICE, "meta"):
        leaf, other = student.clone().requires_grad_(), teacher.clone().requires_grad_()
        temperature = torch.tensor(2.0, device=DEVICE, requires_grad=True)
        with torch.device(device):
            alone = fastkd.distillation_loss(leaf, teacher, labels, alpha=0.5, **settings)
            both, metrics = fastkd.distillation_loss(
                leaf, other, labels, alpha=0.5, temperature=temperature, label_smoothing=0.1,
                teacher_grad=True, return_metrics=True, **settings,
            )  # fmt: skip
            gradients = torch.autograd.grad(alone + both, (leaf, other, temperature))
        results.append([alone, both, *metrics, *gradients])
    for plain, ours in zip(*results, strict=True):
        assert torch.equal(plain, ours)


class _Factories(TorchDispatchMode):
    """Refuses to copy between devices, which would wait, and to read a number."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default:
            assert out.device == args[0].device, "a copy between devices"
        return out


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_numbers_on_the_cpu_are_not_copied(mode):
    """With logits elsewhere, here where there are no values at all."""
    student = torch.randn(N, V, device="meta", requires_grad=True)
    with _Factories():
        loss = fastkd.distillation_loss(
            student, torch.randn(N, V, device="meta"), temperature=torch.tensor(2.0),
            teacher_temperature=torch.tensor(3.0), num_items=torch.tensor(5), gradient=mode,
        )  # fmt: skip
        loss.backward()
    assert loss.is_meta
    assert student.grad.is_meta


def test_numbers_of_another_device_are_refused():
    student, teacher, _ = _operands()
    elsewhere = torch.tensor(2.0, device="meta")
    for name in ("temperature", "teacher_temperature", "num_items"):
        with pytest.raises(ValueError, match=f"{name} is on meta, the logits on"):
            fastkd.distillation_loss(student, teacher, **{name: elsewhere})


# --- num_items -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_no_items_and_no_row_that_counts(mode, backend):
    """A micro-batch of padding alone, on one rank, say."""
    student, teacher, labels = _operands()
    nothing = torch.zeros((), dtype=torch.int64, device=DEVICE)
    leaf = student.clone().requires_grad_()
    loss = fastkd.distillation_loss(
        leaf, teacher, torch.full_like(labels, -100), alpha=0.5, num_items=nothing,
        gradient=mode, backend=backend,
    )  # fmt: skip
    loss.backward()
    assert loss.item() == 0
    assert not leaf.grad.any()
    loss = fastkd.distillation_loss(
        student[:0], teacher[:0], num_items=nothing, gradient=mode, backend=backend
    )
    assert loss.item() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_items_but_rows_that_count(backend):
    student, teacher, labels = _operands()
    leaf = student.requires_grad_()
    loss = fastkd.distillation_loss(
        leaf, teacher, labels, alpha=0.5, backend=backend,
        num_items=torch.zeros((), device=DEVICE),
    )  # fmt: skip
    loss.backward()
    assert loss.isnan()
    assert leaf.grad[0].isnan().all()


@pytest.mark.parametrize("backend", FUSED)
def test_negative_items(backend):
    student, teacher, _ = _operands()
    items = torch.tensor(-3, device=DEVICE)
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="num_items must be >= 0, got -3"):
            fastkd.distillation_loss(student, teacher, num_items=items, backend=backend)
    else:  # not read there
        assert fastkd.distillation_loss(student, teacher, num_items=items, backend=backend).isnan()


def test_items_count_in_the_dtype_of_the_loss():
    student, teacher, _ = _operands(torch.float64)
    one, other = (
        fastkd.distillation_loss(student, teacher, num_items=n) for n in (3, torch.tensor(3))
    )
    assert torch.allclose(one, other, rtol=1e-14)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (float("nan"), "finite and > 0"),
        (float("inf"), "finite and > 0"),
        (torch.tensor(True), "must hold a number"),
        (torch.tensor(2.0, requires_grad=True), "detach it"),
        (torch.ones(2), "0-d"),
    ],
)
def test_bad_items(items, message):
    student, teacher, _ = _operands()
    with pytest.raises((ValueError, TypeError), match=message):
        fastkd.distillation_loss(
            student, teacher, num_items=items.to(DEVICE) if torch.is_tensor(items) else items
        )


# --- operands that are not logits ------------------------------------------------------------


def _head(teacher):
    return fastkd.LinearHead(teacher, torch.eye(V, device=DEVICE) + 0.1)


def _top_k(teacher):
    log_probs, indices = teacher.log_softmax(-1).topk(4)
    return fastkd.TopK(indices, log_probs)


def _sampled(teacher):
    indices = teacher.topk(3).indices
    return fastkd.Sampled(indices, torch.ones_like(indices, dtype=torch.float32))


@pytest.mark.parametrize("gradient", ["forward", "backward"])
@pytest.mark.parametrize("kind", [_head, _top_k, _sampled])
def test_other_operands_from_inference_mode_and_beside_a_default_device(kind, gradient):
    student, teacher, labels = _operands()
    with torch.inference_mode():
        inferred = kind(teacher.clone())
    results = []
    for operand, device in ((kind(teacher), DEVICE), (inferred, "meta")):
        leaf = student.clone().requires_grad_()
        with torch.device(device):
            loss = fastkd.distillation_loss(leaf, operand, labels, alpha=0.5, gradient=gradient)
            results.append((loss, *torch.autograd.grad(loss, leaf)))
    for plain, ours in zip(*results, strict=True):
        assert plain.abs().max() > 1e-3
        assert torch.equal(plain, ours)


def test_a_head_of_the_student_beside_a_default_device():
    student, teacher, labels = _operands()
    results = []
    for device in (DEVICE, "meta"):
        hidden = student.clone().requires_grad_()
        weight = (torch.eye(V, device=DEVICE) + 0.1).requires_grad_()
        with torch.device(device):
            loss = fastkd.distillation_loss(
                fastkd.LinearHead(hidden, weight), teacher, labels, alpha=0.5, standardize=True
            )
            results.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    for plain, ours in zip(*results, strict=True):
        assert torch.equal(plain, ours)
