"""gradient="forward" and inplace=True: what they refuse, since the gradient would be wrong."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import fastkd
from tests.cases import logits
from tests.closeness import assert_close
from tests.conftest import DEVICE
from tests.running import FUSED

N, V = 4, 10


def _scaled_gradient(logit, teacher, scale, **settings):
    leaf = logit.clone().requires_grad_()
    (fastkd.distillation_loss(leaf, teacher, **settings) * scale).backward()
    return leaf.grad


@pytest.mark.parametrize("backend", FUSED)
def test_a_float16_gradient_is_rounded_after_the_loss_scale(backend):
    """Undivided it is some 1e-4, by the items 1e-9, below float16, and by the scale 1e-4 again."""
    student, teacher = (torch.randn(2, 1000, device=DEVICE) * 0.1 for _ in range(2))
    settings = {"num_items": 100_000, "backend": backend}
    ours = _scaled_gradient(student.half(), teacher.half(), 65536.0, **settings)
    exact = _scaled_gradient(
        student.half().double(), teacher.half().double(), 65536.0, num_items=100_000
    )
    assert_close(ours, exact, "gradient", exact.half())


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("held", [{"gradient": "forward"}, {"inplace": True}])
def test_a_held_float16_gradient_is_refused(held, backend):
    teacher = torch.randn(N, V, device=DEVICE)
    for leaf in (torch.randn(N, V, device=DEVICE).half().requires_grad_(), teacher.half()):
        with pytest.raises(ValueError, match=r"before the loss scale.*gradient='backward'"):
            fastkd.distillation_loss(leaf * 1.0, teacher, backend=backend, **held)


@pytest.mark.parametrize("half", ["hidden", "weight"])
def test_a_head_s_float16_gradient_is_rounded_after_the_loss_scale(half):
    """As under autocast: hidden states in float16, and a weight in float32 beside them."""
    operands = {"hidden": torch.randn(2, 8), "weight": torch.randn(1000, 8) * 0.1}
    operands[half] = operands[half].half()
    teacher = (torch.randn(2, 1000) * 0.1).to(DEVICE)
    leaves = {name: x.to(DEVICE).requires_grad_() for name, x in operands.items()}
    settings = {"num_items": 100_000, "temperature": 2.0}
    loss = fastkd.distillation_loss(fastkd.LinearHead(**leaves), teacher, **settings)
    (ours,) = torch.autograd.grad(loss * 2**20, leaves[half])
    exact = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
    loss = fastkd.distillation_loss(exact["hidden"] @ exact["weight"].T, teacher, **settings)
    (true,) = torch.autograd.grad(loss * 2**20, exact[half])
    assert_close(ours, true, "gradient", true.half())
    with pytest.raises(ValueError, match="before the loss scale"):
        fastkd.distillation_loss(fastkd.LinearHead(**leaves), teacher, gradient="forward")


def _teachers(student):
    """Tensors that share memory with the student's logits."""
    return {
        "itself": student.detach(),
        "another view": student.detach().flatten().view(N, V),
        "in another order": student.detach().as_strided((N, V), (1, N)),
        "one row for all": student.detach()[:1].expand(N, V),
    }


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("kind", ["itself", "another view", "in another order", "one row for all"])
def test_a_teacher_in_the_memory_of_the_student_is_refused(kind, backend):
    student = logits(N, V)[0].float().to(DEVICE).requires_grad_() * 1.0
    before, version = student.detach().clone(), student._version
    with pytest.raises(ValueError, match=r"overwrite teacher, .* or teacher\.clone\(\)"):
        fastkd.distillation_loss(student, _teachers(student)[kind], inplace=True, backend=backend)
    assert torch.equal(student, before)
    assert student._version == version


def test_weights_in_the_memory_of_the_student_are_refused():
    student = torch.rand(N, V, device=DEVICE, requires_grad=True) * 1.0
    teacher = torch.rand(N, V, device=DEVICE)
    for name in ("weight", "temperature", "teacher_temperature"):
        with pytest.raises(ValueError, match=f"would overwrite {name}"):
            fastkd.distillation_loss(
                student, teacher, inplace=True, **{name: student.detach()[:, 3]}
            )


@pytest.mark.parametrize("backend", FUSED)
def test_a_teacher_beside_the_student_in_one_storage_is_right(backend):
    storage = torch.randn(2, N, V, device=DEVICE)
    student = torch.empty(0, device=DEVICE).set_(storage.untyped_storage(), 0, (N, V), (V, 1))
    leaf = student.clone().requires_grad_()
    fastkd.distillation_loss(leaf, storage[1]).backward()

    class Write(torch.autograd.Function):
        """Logits in memory that was there before."""

        @staticmethod
        def forward(ctx, x):
            ctx.mark_dirty(student)
            return student.copy_(x)

        @staticmethod
        def backward(ctx, upstream):
            return upstream

    other = leaf.detach().clone().requires_grad_()
    loss = fastkd.distillation_loss(Write.apply(other), storage[1], inplace=True, backend=backend)
    loss.backward()
    assert_close(other.grad, leaf.grad.double(), "gradient")


def test_a_teacher_in_the_memory_of_the_student_under_compile():
    """There no tensor shares memory with another that is written to."""

    def step(leaf, inplace):
        student = leaf * 1.5
        teacher = student.detach().as_strided((N, V), (1, N))
        return fastkd.distillation_loss(student, teacher, inplace=inplace)

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    values, gradients = torch.randn(N, V, device=DEVICE), []
    for call, inplace in ((step, False), (compiled, True)):
        leaf = values.clone().requires_grad_()
        call(leaf, inplace).backward()
        gradients.append(leaf.grad)
    torch._dynamo.reset()
    assert_close(gradients[1], gradients[0].double(), "gradient")


@pytest.mark.parametrize("gradient", ["forward", "backward"])
def test_a_loss_whose_gradient_is_undefined_gives_none(gradient):
    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, upstream):
            return None

    student = torch.randn(3, 5, requires_grad=True)
    loss = fastkd.distillation_loss(student, torch.randn(3, 5), gradient=gradient)
    Cut.apply(loss).backward()
    assert student.grad is None


@pytest.mark.parametrize("backend", FUSED)
def test_the_logits_are_not_kept_beside_their_gradient(backend):
    leaf, teacher = torch.randn(2, N, V, device=DEVICE).unbind()
    settings = {"gradient": "forward", "backend": backend}
    logit = leaf.clone().requires_grad_() * 1.0
    memory = weakref.ref(logit.untyped_storage())
    loss = fastkd.distillation_loss(logit, teacher, **settings)
    del logit
    gc.collect()  # of Triton's interpreter, which has cycles
    assert memory() is None
    loss.backward()

    logit = leaf.clone().requires_grad_() * 1.0
    loss = fastkd.distillation_loss(logit, teacher, **settings)
    logit.mul_(2)  # which its gradient, already there, does not see
    loss.backward()


@pytest.mark.parametrize("backend", FUSED)
def test_views_that_autograd_keeps_are_not_overwritten(backend):
    """Before anything is: PyTorch would refuse them when they are."""
    layer = torch.nn.Linear(3, V, device=DEVICE)
    layer.register_full_backward_hook(lambda *_: None)
    rows = torch.randn(N, 3, device=DEVICE)
    for logit in (layer(rows), torch.nn.functional.linear(rows, layer.weight).chunk(1)[0]):
        before = logit.detach().clone()
        with pytest.raises(ValueError, match="view autograd keeps: pass inplace=False"):
            fastkd.distillation_loss(logit, before, inplace=True, backend=backend)
        assert torch.equal(logit, before)
