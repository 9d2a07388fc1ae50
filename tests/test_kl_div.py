"""fastkd.kl_div against torch.nn.functional.kl_div in fp64, on both backends."""

import inspect
import itertools
import math
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from fastkd import elementwise
from fastkd.eager import elementwise as eager
from fastkd.elementwise import kl_div
from tests import oracle
from tests.closeness import assert_close, assert_zero
from tests.conftest import DEVICE

ROOT = Path(__file__).parents[1]
INF, NAN = math.inf, math.nan
BACKENDS = ["torch", "triton"]
REDUCTIONS = ["none", "sum", "mean", "batchmean"]
FLAGS = list(itertools.product((None, True, False), repeat=2))  # size_average, reduce

quiet = pytest.mark.filterwarnings(
    "ignore:reduction:UserWarning", "ignore:size_average:UserWarning"
)


@contextmanager
def use(backend):
    """Runs `backend` on this machine's device, with NaN in all memory that PyTorch leaves empty."""

    def poisoned(empty):
        return lambda *args, **kwargs: empty(*args, **kwargs).fill_(NAN)

    def on_triton(*matrices):
        return backend == "triton" and all(m.dtype != torch.float64 for m in matrices)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elementwise, "_on_triton", on_triton)
        patch.setattr(torch, "empty", poisoned(torch.empty))
        patch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
        yield


@pytest.fixture(params=BACKENDS)
def backend(request):
    with use(request.param):
        yield request.param


def pair(shape, target_shape=None, log_target=False, dtypes=(torch.float32, torch.float32)):
    """Input and target; log target - input stays in [1, 2], so that no sum cancels."""
    log_p = -torch.rand(shape if target_shape is None else target_shape, dtype=torch.float64)
    input = -2 - torch.rand(shape, dtype=torch.float64)
    target = log_p if log_target else log_p.exp()
    return input.to(DEVICE, dtypes[0]), target.to(DEVICE, dtypes[1])


def run(function, input, target, upstream=None, **options):
    """The value and the gradients to input and target, at `upstream` (default: ones)."""
    input, target = (x.detach().requires_grad_() for x in (input, target))
    value = function(input, target, **options)
    upstream = torch.ones_like(value) if upstream is None else upstream.to(value)
    return value, *torch.autograd.grad(value, (input, target), upstream)


def check(input, target, **options):
    """Values and gradients are those of PyTorch in fp64; dtypes and shapes are PyTorch's own."""
    upstream = torch.rand(F.kl_div(input, target, **options).shape, device=DEVICE) + 0.5
    ours = run(kl_div, input, target, upstream, **options)
    eager = run(F.kl_div, input, target, upstream, **options)
    # The upstream gradient that both are given has been rounded to the dtype of the value.
    exact = upstream.to(eager[0].dtype).double()
    truth = run(F.kl_div, input.double(), target.double(), exact, **options)
    for kind, a, e, t in zip(("value", "gradient", "gradient"), ours, eager, truth, strict=True):
        assert (a.dtype, a.shape, a.device) == (e.dtype, e.shape, e.device)
        assert_close(a, t, kind)  # 16-bit results are rounded once


# --- the contract ------------------------------------------------------------------------------


def test_signature():
    ours, theirs = (inspect.signature(f).parameters for f in (kl_div, F.kl_div))
    assert list(ours) == list(theirs)
    assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]


@quiet
@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("flags", FLAGS)
def test_reductions(backend, reduction, flags, log_target):
    # (True, None) with "batchmean" divides twice, (None, False) divides the unreduced tensor.
    options = {"size_average": flags[0], "reduce": flags[1], "reduction": reduction}
    check(*pair((4, 5), log_target=log_target), log_target=log_target, **options)


@quiet
@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "shapes", [((3, 5), (3, 5)), ((1, 5), (3, 5)), ((2, 3, 5), (5,)), ((), ())]
)
def test_definition(backend, shapes, reduction, log_target):
    """By the oracle, with targets of 0 too."""
    input, target = pair(*shapes, log_target=log_target)
    if target.dim():
        target[..., 1] = -INF if log_target else 0.0
    options = {"reduction": reduction, "log_target": log_target}
    upstream = torch.rand(oracle.kl_div(input, target, **options).shape, device=DEVICE) + 0.5
    ours = run(kl_div, input, target, upstream, **options)
    truth = run(oracle.kl_div, input.double(), target.double(), upstream, **options)
    for kind, a, t in zip(("value", "gradient", "gradient"), ours, truth, strict=True):
        assert_close(a, t, kind)


@pytest.mark.parametrize("reduction", [*REDUCTIONS, "elementwise_mean"])
@pytest.mark.parametrize("flags", FLAGS)
def test_warnings(reduction, flags):
    def warned(function):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function(*pair((4, 5)), *flags, reduction=reduction)
        return [(w.category, str(w.message).split(".")[0]) for w in caught]

    assert warned(kl_div) == warned(F.kl_div)


def test_mean_warns_at_the_caller():
    with pytest.warns(UserWarning, match="reduction: 'mean' divides .* 'batchmean'") as caught:
        kl_div(*pair((4, 5)))
    assert caught[0].filename == __file__


@quiet
@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "shapes",
    [
        ((), ()),  # 0-d: batchmean does not divide
        ((3,), (3,)),
        ((2, 5, 3), (2, 5, 3)),  # batchmean divides by 2
        ((1, 3), (2, 3)),  # batchmean divides by 1
        ((3,), (2, 3)),  # batchmean divides by 3
        ((2, 300), (300,)),
        ((2, 300), (2, 1)),
        ((2, 1), (1, 300)),
        ((2, 3), ()),
        ((2, 3, 4), (2, 1, 4)),  # strides of the leading dimensions do not collapse: copied
    ],
)
def test_shapes_and_broadcasting(backend, shapes, reduction, log_target):
    check(*pair(*shapes, log_target=log_target), reduction=reduction, log_target=log_target)


@quiet
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,)])
def test_empty(backend, shape, reduction):
    ours, theirs = (run(f, *pair(shape), reduction=reduction) for f in (kl_div, F.kl_div))
    torch.testing.assert_close(ours, theirs, equal_nan=True)


@quiet
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "dtypes",
    list(
        itertools.product((torch.float64, torch.float32, torch.bfloat16, torch.float16), repeat=2)
    ),
)
def test_dtypes(backend, dtypes, reduction):
    check(*pair((4, 500), dtypes=dtypes), reduction=reduction)
    check(*pair((4, 5), (5,), dtypes=dtypes), reduction=reduction)
    check(*pair((4, 5), (), dtypes=dtypes), reduction=reduction)  # 0-d does not promote


def test_half_is_summed_in_fp32(backend):
    input, target = pair((64, 500), dtypes=(torch.float16, torch.float16))
    total = F.kl_div(input.double(), target.double(), reduction="sum")
    torch.testing.assert_close(
        kl_div(input, target, reduction="batchmean").double(), total / 64, rtol=2**-10, atol=0
    )


def test_the_gradient_of_a_repeated_operand_is_summed_before_it_is_rounded(backend):
    input, target = pair((2, 300), (300,), dtypes=(torch.float32, torch.bfloat16))
    difference = torch.tensor([[1.0], [-1.0]], device=DEVICE).expand(2, 300)
    _, _, dt = run(kl_div, input, target, difference, reduction="none")
    assert dt.dtype == torch.bfloat16
    assert_close(dt, (input[1] - input[0]).double(), "gradient")


# Input, target in log space or not: what differs from PyTorch, and some of what does not.
REPAIRED = [(-1, 0, False), (-INF, 0, False), (-1, -INF, True), (-INF, -INF, True)]
SPECIAL = [
    (-INF, 0.5, False), (INF, 0.5, False), (NAN, 0.5, False), (-1, NAN, False), (-1, -0.5, False),
    (-INF, -1, True), (INF, -1, True), (NAN, -1, True), (-1, NAN, True),
    (-1, INF, True),
]  # fmt: skip


@pytest.mark.parametrize(("x", "t", "log_target"), REPAIRED)
def test_a_zero_target_contributes_nothing(backend, x, t, log_target):
    input, target = (torch.full((2,), float(v), device=DEVICE) for v in (x, t))
    for reduction in ("none", "sum"):
        for result in run(kl_div, input, target, reduction=reduction, log_target=log_target):
            assert_zero(result)


@pytest.mark.parametrize(("x", "t", "log_target"), SPECIAL)
def test_other_infinities_and_nans_are_those_of_pytorch(backend, x, t, log_target):
    input, target = (torch.full((2,), float(v), device=DEVICE) for v in (x, t))
    for reduction in ("none", "sum"):
        ours, theirs = (
            run(f, input, target, reduction=reduction, log_target=log_target)
            for f in (kl_div, F.kl_div)
        )
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("masked", ["teacher", "both"])
def test_masked_logits(backend, masked, log_target):
    def loss(function, student, teacher):
        softmax = F.log_softmax if log_target else F.softmax
        q, p = student.log_softmax(-1), softmax(teacher, -1)
        return function(q, p, reduction="sum", log_target=log_target)

    student, teacher = torch.randn(2, 3, 6, device=DEVICE)
    keep = torch.arange(6, device=DEVICE) != 2
    teacher[:, 2] = -INF
    if masked == "both":
        student[:, 2] = -INF
    value, *grads = run(lambda s, t: loss(kl_div, s, t), student, teacher)

    # The same problem in fp64 without the masked token, whose logit matters to the student only.
    def truth(s, t):
        lq = (s if masked == "teacher" else s[:, keep]).log_softmax(-1)
        lq = lq[:, keep] if masked == "teacher" else lq
        return F.kl_div(lq, t[:, keep].softmax(-1), reduction="sum")

    expected, *slopes = run(truth, student.double(), teacher.double())
    assert_close(value, expected)
    for grad, slope in zip(grads, slopes, strict=True):
        assert_close(grad, slope, "gradient")


def test_a_masked_student_costs_infinity_with_pytorchs_gradient(backend):
    student = torch.tensor([[0.0, 1.0, -INF]], device=DEVICE, requires_grad=True)
    teacher = torch.tensor([[1.0, 0.0, 2.0]], device=DEVICE).softmax(-1)
    value = kl_div(student.log_softmax(-1), teacher, reduction="batchmean")
    value.backward()
    assert value == INF
    assert_close(student.grad, (student.softmax(-1) - teacher).double(), "gradient")


@quiet
@settings(max_examples=40, deadline=None)
@given(data=st.data(), log_target=st.booleans(), reduction=st.sampled_from(REDUCTIONS))
def test_any_shape_dtype_and_stride(data, log_target, reduction):
    draw = data.draw
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 7]), max_size=4))
    dtypes = [draw(st.sampled_from([torch.float32, torch.bfloat16])) for _ in range(2)]

    def operand(x):
        """A part of `x` that broadcasts to its shape, in some layout."""
        for dim in range(x.dim()):
            if draw(st.booleans()):
                x = x.narrow(dim, 0, 1)
        while x.dim() and x.size(0) == 1 and draw(st.booleans()):
            x = x[0]
        layout = draw(st.sampled_from(["contiguous", "transposed", "sliced", "expanded"]))
        if layout == "transposed":
            return x.mT.contiguous().mT if x.dim() > 1 else x
        if layout == "sliced":
            return F.pad(x, (1, 2))[..., 1:-2] if x.dim() else x
        if layout == "expanded" and x.dim():
            return x[..., :1].expand(x.shape)
        return x.contiguous()

    torch.manual_seed(0)
    input, target = map(operand, pair(shape, log_target=log_target, dtypes=dtypes))
    with use(draw(st.sampled_from(BACKENDS))):
        check(input, target, reduction=reduction, log_target=log_target)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["batchmean", "sum"])
def test_the_positional_trap(name):
    with pytest.raises(TypeError, match=f"size_average .*write reduction='{name}'"):
        kl_div(*pair((2, 3)), name)
    with pytest.raises(TypeError, match=f"reduce .*write reduction='{name}'"):
        kl_div(*pair((2, 3)), None, name)


@pytest.mark.parametrize(
    ("input", "target", "reduction", "message"),
    [
        (torch.ones(3, dtype=torch.int64), torch.ones(3), "sum", "input must be .*int64"),
        (torch.ones(3), torch.ones(3, dtype=torch.bool), "sum", "target must be .*bool"),
        (torch.ones(3) * 1j, torch.ones(3), "sum", "input must be .*complex64"),
        (*[torch.ones(3).to(torch.float8_e5m2)] * 2, "sum", "input must be .*float8"),
        (torch.ones(3, 3), torch.eye(3).to_sparse(), "sum", "target is in the layout"),
        (torch.ones(3), torch.ones(4), "sum", r"broadcast, got \(3,\) and \(4,\)"),
        (torch.ones(3), torch.ones(3, device="meta"), "sum", "one device, got cpu and meta"),
        ([1.0], torch.ones(1), "sum", "input must be a tensor, got list"),
        (torch.ones(1), 1.0, "sum", "target must be a tensor, got float"),
        (torch.ones(1), torch.ones(1), "batch_mean", "reduction must be .*mean 'batchmean'"),
        (torch.ones(1), torch.ones(1), None, "reduction must be .*got None"),
    ],
)
def test_bad_input_raises_what_pytorch_raises(input, target, reduction, message):
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        F.kl_div(input, target, reduction=reduction)
    with pytest.raises(theirs.type, match=message):
        kl_div(input, target, reduction=reduction)


# --- autograd, transforms, compilation -----------------------------------------------------------


@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_gradients_of_first_and_second_order(log_target, reduction):
    input, target = pair((3, 4), (4,), log_target, (torch.float64, torch.float64))
    operands = input.requires_grad_(), target.requires_grad_()

    def loss(input, target):
        return kl_div(input, target, reduction=reduction, log_target=log_target)

    assert gradcheck(loss, operands)
    assert gradgradcheck(loss, operands)


@pytest.mark.parametrize("t", [0.0, -INF])
def test_second_derivatives_at_a_zero_target_are_finite(t):
    input = torch.tensor([-1.0, -INF], device=DEVICE, requires_grad=True)
    target = torch.tensor([t, t], device=DEVICE, requires_grad=True)
    value = kl_div(input, target, reduction="sum", log_target=t != 0)
    first = torch.autograd.grad(value, (input, target), create_graph=True)
    second = torch.autograd.grad(first[0].sum() + first[1].sum(), (input, target))
    assert all(grad.isfinite().all() for grad in second)


@pytest.mark.parametrize("wanted", ["input", "target"])
@pytest.mark.parametrize("shape", [(), (5,), (2, 300)])
def test_only_what_is_wanted_is_saved_and_computed(backend, wanted, shape):
    input, target = pair(shape)
    operand = (input if wanted == "input" else target).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        value = kl_div(input, target, reduction="sum")
    assert {x.data_ptr() for x in saved} <= {target.data_ptr()} | (
        {input.data_ptr()} if wanted == "target" else set()
    )
    value.backward()
    _, dx, dt = run(F.kl_div, input.double(), target.double(), reduction="sum")
    assert_close(operand.grad, dx if wanted == "input" else dt, "gradient")


def test_upstream_gradients(backend):
    input, target = pair((3, 300))
    value = kl_div(input.requires_grad_(), target, reduction="sum")
    twice = [torch.autograd.grad(value * 3, input, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*twice)  # two runs agree in every bit
    assert_close(twice[0], -3 * target.double(), "gradient")
    per_row = torch.tensor([1.0, 2.0, 3.0], device=DEVICE)
    (kl_div(input, target, reduction="none").sum(-1) @ per_row).backward()
    assert_close(input.grad, -per_row[:, None] * target.double(), "gradient")


def test_functorch():
    input, target = pair((3, 4))

    def loss(input, target):
        return kl_div(input, target, reduction="batchmean")

    grads = torch.func.grad(loss, argnums=(0, 1))(input, target)
    _, *truth = run(F.kl_div, input.double(), target.double(), reduction="batchmean")
    for grad, expected in zip(grads, truth, strict=True):
        assert_close(grad, expected, "gradient")


def test_inference_mode(backend):
    input, target = pair((3, 300))
    with torch.inference_mode():
        value = kl_div(input, target, reduction="sum")
    assert value.is_inference()
    assert_close(value, F.kl_div(input.double(), target.double(), reduction="sum"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_autocast_returns_fp32_as_pytorch_does(backend, dtype):
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        check(*pair((3, 300), dtypes=(dtype, dtype)), reduction="batchmean")


@pytest.mark.parametrize(("dtype", "log_target"), [(torch.float32, False), (torch.bfloat16, True)])
def test_operators(dtype, log_target):
    input, target = pair((4, 6), (6,), log_target=log_target, dtypes=(dtype, dtype))
    target = target.expand(4, 6)
    for reduce, out in ((True, torch.float32), (False, dtype)):
        opcheck(elementwise._forward.traced, (input, target, log_target, reduce, out))
    for upstream in (torch.ones((), device=DEVICE), torch.ones_like(input)):
        for x, x_dtype in ((input, dtype), (input, None), (None, dtype)):
            opcheck(elementwise._backward.traced, (upstream, x, target, log_target, x_dtype))


@quiet
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compile_without_breaks_or_recompilations(reduction):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def compiled(input, target):
        return kl_div(input, target, reduction=reduction)

    for rows, columns in ((4, 5), (7, 5), (7, 300)):
        input, target = pair((rows, columns), (columns,))
        truth = run(F.kl_div, input.double(), target.double(), reduction=reduction)
        ours = run(compiled, input, target)
        for kind, a, t in zip(("value", "gradient", "gradient"), ours, truth, strict=True):
            assert_close(a, t, kind)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_compile_with_inductor():
    compiled = torch.compile(kl_div, fullgraph=True)
    input, target = pair((4, 300))
    ours = run(compiled, input, target, reduction="batchmean")
    truth = run(F.kl_div, input.double(), target.double(), reduction="batchmean")
    for kind, a, t in zip(("value", "gradient", "gradient"), ours, truth, strict=True):
        assert_close(a, t, kind)


# --- layouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_target", [False, True])
# Around one and two tiles of the interpreter; a size that no vector divides; a single column.
@pytest.mark.parametrize("columns", [1, 2, 130, 255, 256, 257, 511, 513])
def test_sizes_around_a_tile(backend, columns, log_target):
    for reduction in ("none", "sum"):
        for dtype in (torch.float32, torch.bfloat16):
            operands = pair((3, columns), log_target=log_target, dtypes=(dtype, dtype))
            check(*operands, reduction=reduction, log_target=log_target)
            misaligned = (x.view(-1)[1:].view(1, -1) for x in operands)
            check(*misaligned, reduction=reduction, log_target=log_target)


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x[:, 1:300],  # sliced rows
        lambda x: x[::2],
        lambda x: x[:, ::2],  # columns apart: copied
        lambda x: x.mT.contiguous().mT,
        lambda x: x[:, :1].expand(-1, 300),
        lambda x: x[:1].expand(4, -1),
        lambda x: x[:1, :1].expand(4, 300),
    ],
)
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_strides(backend, layout, reduction):
    input, target = map(layout, pair((4, 302)))
    check(input, target, reduction=reduction)
    check(input.contiguous(), target, reduction=reduction)
    check(input, target.contiguous(), reduction=reduction)


def test_pieces_of_large_tensors():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eager, "PIECE", 64)
        for target_shape in ((7, 50), (50,)):
            for reduction in ("none", "sum"):
                check(*pair((7, 50), target_shape), reduction=reduction)


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_offsets_beyond_32_bits(backend):
    try:
        storage = torch.empty(2**31 + 300, dtype=torch.bfloat16, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"no 4 GiB of address space: {error}")
    input, target = pair((3, 300), dtypes=(torch.bfloat16, torch.bfloat16))
    # Of all this memory only the pages of the rows are touched; the stride itself has 32 bits.
    far = storage.as_strided((3, 300), (2**30, 1)).copy_(input)
    with use(backend):
        for reduction in ("none", "sum"):
            check(far, target, reduction=reduction)


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cpu", reason="more than 2^31 elements take a GPU")
def test_more_than_2_to_31_elements():
    input = torch.full((2**31 + 5,), -1.0, dtype=torch.bfloat16, device=DEVICE)
    target = torch.zeros_like(input)
    target[-3:] = 1
    input.requires_grad_()
    value = kl_div(input, target, reduction="sum")
    value.backward()
    assert value == 3
    assert input.grad.count_nonzero() == 3
    assert (input.grad[-3:] == -1).all()
