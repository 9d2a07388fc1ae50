"""torch.compile: one graph, no recompilation, the same numbers; and the operators' own checks."""

from __future__ import annotations

import pytest
import torch

import fastkd
from fastkd import moments, operators
from fastkd.problem import Coefficients, Problem
from tests.cases import logits
from tests.closeness import assert_close
from tests.conftest import DEVICE

BACKEND = "inductor" if DEVICE == "cuda" else "aot_eager"


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _step(student, teacher, labels, temperature, beta, alpha, mode):
    return fastkd.distillation_loss(
        student * 1.5, teacher, labels, divergence=fastkd.JSD(beta), temperature=temperature,
        alpha=alpha, entropy_weight=0.1, gradient=mode,
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_changes_of_numbers_and_rows_recompile_nothing(mode):
    compiled = torch.compile(_step, fullgraph=True, dynamic=True, backend=BACKEND)
    for n, (rows, temperature, beta, alpha) in enumerate(
        [(8, 2.0, 0.5, 0.5), (9, 3.0, 0.3, 0.9), (31, 1.5, 0.2, 0.7)]
    ):
        student, teacher = (x.float().to(DEVICE) for x in logits(rows, 50))
        labels = torch.randint(50, (rows,), device=DEVICE)
        with torch._dynamo.config.patch(error_on_recompile=n > 0):
            results = []
            for step in (compiled, _step):
                leaf = student.clone().requires_grad_()
                loss = step(leaf, teacher, labels, temperature, beta, alpha, mode)
                loss.backward()
                results.append((loss, leaf.grad))
        assert_close(results[0][0], results[1][0].double())
        assert_close(results[0][1], results[1][1].double(), "gradient")


def _standardized(student, teacher, temperature, alpha, labels, mode):
    return fastkd.distillation_loss(
        student * 1.5, teacher, labels, temperature=temperature, alpha=alpha, entropy_weight=0.1,
        standardize=True, gradient=mode,
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_standardised_logits_recompile_nothing(mode):
    compiled = torch.compile(_standardized, fullgraph=True, dynamic=True, backend=BACKEND)
    for n, (rows, number, alpha) in enumerate([(8, 2.0, 0.5), (9, 3.0, 0.9), (31, 1.5, 0.7)]):
        student, teacher = (x.float().to(DEVICE) for x in logits(rows, 50))
        labels = torch.randint(50, (rows,), device=DEVICE)
        temperature = number
        if mode == "backward":
            temperature = torch.tensor(number, device=DEVICE, requires_grad=True)
        with torch._dynamo.config.patch(error_on_recompile=n > 0):
            results = []
            for step in (compiled, _standardized):
                leaf = student.clone().requires_grad_()
                loss = step(leaf, teacher, temperature, alpha, labels, mode)
                leaves = [leaf, temperature] if mode == "backward" else [leaf]
                results.append([loss, *torch.autograd.grad(loss, leaves)])
        for ours, plain in zip(*results, strict=True):
            assert_close(ours, plain.double(), "gradient")


@pytest.mark.parametrize("reduction", ["mean", "batchmean"])
def test_a_mean_over_all_rows_recompiles_nothing(reduction):
    def step(student, teacher, temperature):
        return fastkd.distillation_loss(
            student * 1.5, teacher, temperature=temperature, reduction=reduction
        )

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=BACKEND)
    for n, (rows, temperature) in enumerate([(8, 2.0), (9, 3.0), (31, 1.5)]):
        student, teacher = (x.float().to(DEVICE) for x in logits(rows, 20))
        leaf = student.requires_grad_()
        with torch._dynamo.config.patch(error_on_recompile=n > 0):
            loss = compiled(leaf, teacher, temperature)
            loss.backward()
        assert_close(loss, step(leaf.double(), teacher.double(), temperature))


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_upstream_gradient_and_metrics_under_compile(mode):
    student, teacher = (x.float().to(DEVICE) for x in logits(6, 20))

    def step(leaf):
        loss, metrics = fastkd.distillation_loss(leaf, teacher, gradient=mode, return_metrics=True)
        return 3 * loss + metrics.kd.sum()

    results = []
    for call in (torch.compile(step, fullgraph=True, backend=BACKEND), step):
        leaf = student.clone().requires_grad_()
        value = call(leaf)
        value.backward()
        results.append((value, leaf.grad))
    assert_close(results[0][0], results[1][0].double())
    assert_close(results[0][1], results[1][1].double(), "gradient")


def test_learnable_temperature_and_teacher_under_compile():
    def step(student, teacher, temperature):
        return fastkd.distillation_loss(
            student, teacher, temperature=temperature, divergence=fastkd.Renyi(0.4),
            teacher_grad=True,
        )  # fmt: skip

    leaves = [x.float().to(DEVICE).requires_grad_() for x in logits(6, 20)]
    leaves.append(torch.tensor(2.0, device=DEVICE, requires_grad=True))
    compiled = torch.compile(step, fullgraph=True, backend=BACKEND)
    ours, plain = (torch.autograd.grad(call(*leaves), leaves) for call in (compiled, step))
    for one, other in zip(ours, plain, strict=True):
        assert_close(one, other.double(), "gradient")


def test_divergence_of_ones_own_under_compile():
    class Squared(fastkd.Divergence):
        name = "squared"

        @staticmethod
        def value(lp, lq, a, b):
            return (lp.exp() - lq.exp()) ** 2

    student, teacher = (x.float() for x in logits(6, 20))

    def step(leaf):
        return fastkd.distillation_loss(leaf, teacher, divergence=Squared(), backend="torch")

    leaf = student.requires_grad_()
    compiled = torch.compile(step, fullgraph=True, backend=BACKEND)
    ours, plain = (torch.autograd.grad(call(leaf), leaf)[0] for call in (compiled, step))
    assert_close(ours, plain.double(), "gradient")


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_cuda_graph_capture():
    student, teacher = (x.float().to(DEVICE) for x in logits(64, 1000))
    leaf = student.requires_grad_()

    def step():
        loss = fastkd.distillation_loss(leaf, teacher, temperature=2.0)
        return loss, torch.autograd.grad(loss, leaf)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for turn in range(100):  # numbers that were kept are given up
        fastkd.distillation_loss(leaf, teacher, temperature=3.0 + turn)
    for _ in range(2):
        graph.replay()
        for one, other in zip(captured, expected, strict=True):
            assert torch.equal(one, other)
            one.detach().zero_()


def _problem():
    student, teacher = (x.float().to(DEVICE)[None] for x in logits(4, 12))
    temperature = torch.rand(4, device=DEVICE) + 1
    labels = torch.arange(4, device=DEVICE)
    problem = Problem(
        student, teacher, temperature, None, labels, labels != 2, 0.1, "jsd", 0.3, 0.0, 10
    )
    return problem, Coefficients(*(torch.rand(4, device=DEVICE) for _ in range(3)))


# No autograd_registration check: the Functions differentiate, the operators have no formula.
UTILITIES = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def _check(operator, *arguments):
    torch.library.opcheck(operator, arguments, test_utils=UTILITIES)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_operators_pass_opcheck(backend):
    problem, coefficients = _problem()
    packed = problem.pack()
    for metrics in (False, True):
        _check(operators.forward.traced, *packed, True, metrics, backend)
        rest = (*coefficients, metrics, backend)
        _check(operators._fused.traced, *packed, *rest)
        inplace = problem._replace(student=None).pack()
        _check(operators._fused_.traced, *inplace, problem.student, *rest)
    arguments = (problem.student, problem.teacher, problem.counted, 10, backend, "")
    _check(moments._moments.traced, *arguments)
    standardized = problem._replace(moments=moments._moments(*arguments))
    _check(operators.forward.traced, *standardized.pack(), False, False, backend)
    _, state, _ = operators.forward(problem, True, False, backend)
    for gradient, temperature in ((True, True), (True, False), (False, True)):
        wanted = (gradient, temperature)
        _check(operators._backward.traced, *packed, state, *coefficients, *wanted, backend)
    _check(
        operators.scale_.traced,
        torch.rand(4, 12, device=DEVICE), torch.tensor(2.0, device=DEVICE), backend,
    )  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True])
def test_what_nothing_trains_is_one_graph_too(dynamic):
    """As in an evaluation; and where a weight trains alone."""
    student, teacher = (x.float().to(DEVICE) for x in logits(6, 20))
    weight = torch.rand(6, device=DEVICE).requires_grad_()
    leaf = student.clone().requires_grad_()

    def evaluated(student, teacher):
        with torch.no_grad():
            loss, metrics = fastkd.distillation_loss(student, teacher, return_metrics=True)
        return loss + metrics.kd.sum()

    for step, sides in (
        (evaluated, (leaf, teacher)),
        (lambda s, t: fastkd.distillation_loss(s, t, weight=weight), (student, teacher)),
        (
            lambda x, target: fastkd.kl_div(x, target, reduction="sum"),
            (student.log_softmax(-1), teacher.softmax(-1)),
        ),
    ):
        compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=BACKEND)
        assert_close(compiled(*sides), step(*sides).double())
