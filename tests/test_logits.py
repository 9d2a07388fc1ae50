"""The loss on logits, on every backend: against the fp64 truth, its properties, its contracts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastkd
from tests.cases import DIVERGENCES, KINDS, logits
from tests.closeness import assert_close, assert_zero
from tests.conftest import DEVICE
from tests.running import (
    BACKENDS,
    EVERY,
    EVERY_AND_REFERENCE,
    FUSED,
    NO_TRITON,
    check,
    check_everything,
    run,
    truth,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MODES = ["forward", "backward"]


def _labels(rows: int, vocab: int) -> torch.Tensor:
    labels = torch.randint(vocab, (rows,))
    labels[1] = -100
    return labels


# --- against the truth -----------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("mode", MODES)
def test_every_divergence(divergence, mode, backend):
    student, teacher = (x.float() for x in logits(5, 37))
    for temperature in (1.0, 2.5):
        check(
            student, teacher,
            divergence=divergence, temperature=temperature, gradient=mode, backend=backend,
        )  # fmt: skip


def _options(columns: int) -> dict:
    return {
        "temperature": 1.7, "teacher_temperature": 0.8, "alpha": 0.3, "label_smoothing": 0.1,
        "entropy_weight": -0.2, "weight": torch.rand(6) + 0.1, "vocab_size": columns,
    }  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_every_option_together(divergence, mode):
    student, teacher = (x.float() for x in logits(6, 23))
    settings = {"divergence": divergence, "gradient": mode, "backend": "torch", **_options(20)}
    check(student, teacher, _labels(6, 20), **settings)


@NO_TRITON
@pytest.mark.parametrize(
    ("plan", "mode"), [("resident", "backward"), ("sweep", "forward"), ("split", "backward")]
)
@pytest.mark.parametrize("divergence", KINDS, ids=str)
def test_every_option_together_on_every_schedule(divergence, plan, mode, force):
    """Two full tiles, a tail, and padding."""
    force(plan)
    student, teacher = (x.float() for x in logits(6, 78))
    settings = {"divergence": divergence, "gradient": mode, "backend": "triton", **_options(75)}
    check(student, teacher, _labels(6, 75), **settings)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES[:1] + DIVERGENCES[5:6], ids=str)
def test_every_dtype(divergence, dtype, mode, backend):
    student, teacher = (x.to(dtype) for x in logits(6, 50))
    mode = "backward" if dtype == torch.float16 else mode  # which has no other
    check(
        student, teacher, _labels(6, 50),
        divergence=divergence, temperature=2.0, alpha=0.5, reduction="sum",
        gradient=mode, backend=backend,
    )  # fmt: skip


@pytest.mark.parametrize("backend", FUSED)
def test_student_and_teacher_of_different_dtype(backend):
    student, teacher = logits(4, 30)
    check(student.float(), teacher.bfloat16(), backend=backend)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("vocab", [1, 2, 3, 64, 129, 1000, 5003])
def test_every_size(vocab, backend):
    student, teacher = (x.float() for x in logits(3, vocab))
    if vocab == 1:  # 0, but for the rounding of a sweep
        loss, gradient = run(student, teacher, backend=backend)
        assert 0 <= loss < 1e-12
        assert gradient.abs().max() < 1e-6
        return None
    return check(student, teacher, backend=backend)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("noise", [1.0, 0.1, 1e-2, 1e-3])
def test_small_divergences_do_not_cancel(noise, divergence, backend):
    """KL down to 5e-7 over a large vocabulary: 1e-4 of the truth, and never negative."""
    vocab = 128256 if backend == "torch" or DEVICE == "cuda" else 8192
    student, teacher = (x.float() for x in logits(2, vocab, noise=noise, scale=3))
    settings = {"divergence": divergence, "reduction": "none"}
    loss, _ = run(student, teacher, backend=backend, **settings)
    true, _ = truth(student, teacher, **settings)
    assert (loss >= 0).all()
    assert loss.tolist() == pytest.approx(true.tolist(), rel=1e-4)


@pytest.mark.parametrize("backend", FUSED)
def test_high_temperature(backend):
    student, teacher = (x.float() for x in logits(2, 4096))
    loss, _ = run(student, teacher, temperature=1000.0, backend=backend)
    true, _ = truth(student, teacher, temperature=1000.0)
    assert loss.item() == pytest.approx(true.item(), rel=1e-4)


@EVERY
def test_common_offsets_and_far_apart_logits(divergence, backend):
    student, teacher = (x.float() for x in logits(4, 40, noise=6, scale=6))
    check(student + 100, teacher - 50, divergence=divergence, backend=backend)


# --- temperatures, teacher, weights ----------------------------------------------------------


@EVERY
@pytest.mark.parametrize(("vocab", "lift"), [(10, 86.0), (1000, 60.0)])
def test_first_columns_far_below_the_others(divergence, vocab, lift, backend):
    """Where the shift of a row is found, and by how much its terms may exceed 1."""
    rows = 8
    student, teacher = (x.float() for x in logits(rows, vocab))
    for side in (student, teacher):
        side[:, vocab // 2 :] += lift
    labels = torch.full((rows,), vocab - 1)
    upstream = torch.tensor(1e-6)
    settings = {"divergence": divergence, "alpha": 0.5, "gradient": "backward"}
    loss, gradient = run(student, teacher, labels, upstream=upstream, backend=backend, **settings)
    true, true_gradient = truth(student, teacher, labels, upstream=upstream, **settings)
    assert_close(loss, true)
    assert_close(gradient, true_gradient, "gradient")


@EVERY
@pytest.mark.parametrize(("per_row", "shared"), [(True, False), (False, True)])
def test_gradients_to_everything(divergence, per_row, shared, backend):
    student, teacher = logits(5, 12)
    settings = {"temperature": torch.rand(5 if per_row else ()) + 1.5}
    if not shared:
        settings["teacher_temperature"] = torch.rand(5 if per_row else ()) + 0.8
    check_everything(
        student.float(), teacher.float(), torch.arange(5), divergence=divergence, alpha=0.7,
        entropy_weight=0.1, weight=torch.rand(5) + 0.2, reduction="none", backend=backend,
        **settings,
    )  # fmt: skip


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_gradcheck_of_the_reference(divergence):
    student, teacher = logits(3, 5)
    leaves = [student, teacher, torch.tensor(1.5).double(), torch.tensor(0.7).double()]
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def loss(z, y, t_s, t_t):
        return fastkd.distillation_loss(
            z, y, torch.tensor([0, 4, -100]), divergence=divergence, temperature=t_s,
            teacher_temperature=t_t, alpha=0.4, label_smoothing=0.2, entropy_weight=0.3,
            teacher_grad=True, backend="reference", reduction="none",
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("backend", FUSED)
def test_per_row_temperatures_are_those_of_each_row(backend):
    student, teacher = (x.float() for x in logits(4, 9))
    temperature = torch.tensor([0.5, 1.0, 2.0, 8.0])
    loss, _ = run(student, teacher, temperature=temperature, reduction="none", backend=backend)
    for row in range(4):
        alone, _ = truth(
            student[row : row + 1], teacher[row : row + 1], temperature=float(temperature[row])
        )
        assert_close(loss[row], alone)


# --- properties ------------------------------------------------------------------------------


@EVERY_AND_REFERENCE
def test_zero_where_student_is_teacher(divergence, backend):
    student = logits(4, 33)[0].float()
    loss, gradient = run(student, student, divergence=divergence, temperature=1.3, backend=backend)
    if backend == "reference" or divergence.constant == "log_mixture":
        assert abs(loss) < 1e-6  # to the rounding of a log-sum-exp
        assert gradient.abs().max() < 1e-6
    else:
        assert_zero(loss)
        assert_zero(gradient)


@EVERY_AND_REFERENCE
def test_never_negative_and_rows_of_the_gradient_sum_to_zero(divergence, backend):
    student, teacher = (x.float() for x in logits(16, 21))
    loss, gradient = run(
        student, teacher, divergence=divergence, reduction="none", backend=backend,
        upstream=torch.ones(16),
    )  # fmt: skip
    assert (loss >= 0).all()
    assert gradient.sum(-1).abs().max() <= 1e-5 * gradient.abs().max()


@EVERY
def test_shift_permutation_and_scale(divergence, backend):
    student, teacher = (x.float() for x in logits(4, 19))
    loss, gradient = run(student, teacher, divergence=divergence, temperature=2.0, backend=backend)
    shifted = run(student + 3, teacher - 5, divergence=divergence, temperature=2.0, backend=backend)
    order = torch.randperm(19)
    permuted = run(
        student[:, order],
        teacher[:, order],
        divergence=divergence,
        temperature=2.0,
        backend=backend,
    )
    scaled = run(
        student / 2, teacher / 2, divergence=divergence, scale_by_temperature=False, backend=backend
    )
    power = 2.0 ** type(divergence).temperature_power
    for value, gradients in (
        shifted,
        (permuted[0], permuted[1][:, order.argsort()]),
        (scaled[0] * power, scaled[1] * power / 2),
    ):
        assert_close(value, loss)
        assert_close(gradients, gradient, "gradient")


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("mode", MODES)
def test_two_runs_are_equal_to_the_bit(mode, backend):
    student, teacher = (x.float() for x in logits(6, 300))
    first, second = (run(student, teacher, gradient=mode, backend=backend) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_upstream_gradient_scales(backend):
    student, teacher = (x.float() for x in logits(4, 9))
    _, gradient = run(student, teacher, backend=backend)
    _, scaled = run(student, teacher, backend=backend, upstream=torch.tensor(-2.5))
    assert_close(scaled, -2.5 * gradient, "gradient")


# --- masks -----------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("mode", MODES)
def test_masked_entries(divergence, mode, backend):
    """-inf on either side, on both, on whole columns: the truth's values, +inf included."""
    student, teacher = logits(6, 11)
    student[1, 2] = teacher[2, 3] = -math.inf
    student[3, 1] = teacher[3, 1] = -math.inf
    student[:, 8:] = teacher[:, 8:] = -math.inf
    student, teacher = student.float(), teacher.float()
    settings = {"divergence": divergence, "temperature": 1.5}
    true, true_gradient = truth(student, teacher, reduction="none", **settings)
    mode_of = {"gradient": mode, "backend": backend, "reduction": "sum"}
    for row in range(6):
        z, y = student[row : row + 1], teacher[row : row + 1]
        loss, gradient = run(z, y, **settings, **mode_of)
        assert_close(loss, true[row])
        if true_gradient[row].count_nonzero():
            assert_close(gradient[0], true_gradient[row], "gradient")
        else:
            assert_zero(gradient)


@EVERY
@pytest.mark.parametrize("depth", [-1e4, torch.finfo(torch.float32).min])
def test_one_side_masked_by_a_number_the_other_by_infinity(depth, divergence, backend):
    """As where both sides say -inf: 0 times an infinite logarithm is 0.

    But a negative power of a probability of 0 may be infinite.
    """
    student, teacher = (x.float() for x in logits(4, 9))
    for rows, z, y in ((0, depth, -math.inf), (1, -math.inf, depth), (2, depth, depth)):
        student[rows, 3:5], teacher[rows, 3:5] = z, y
    both = student.clone(), teacher.clone()
    for side in both:
        side[:3, 3:5] = -math.inf
    settings = {"divergence": divergence, "backend": backend}
    true, true_gradient = truth(*both, divergence=divergence)
    for mode in MODES:
        loss, gradient = run(student, teacher, **settings, gradient=mode)
        if math.isinf(loss):
            assert not 0 <= divergence.alpha <= 1
            assert gradient.isfinite().all()
        else:
            assert_close(loss, true)
            assert_close(gradient, true_gradient, "gradient")


@pytest.mark.parametrize("backend", BACKENDS)
def test_student_mask_alone_gives_infinite_loss_and_finite_gradient(backend):
    z, y = torch.tensor([[0.0, 1.0, -math.inf]]), torch.tensor([[1.0, 0.0, 0.5]])
    loss, gradient = run(z, y, backend=backend)
    assert loss == math.inf
    assert_close(gradient, (z.softmax(-1) - y.softmax(-1)).double(), "gradient")


@EVERY_AND_REFERENCE
def test_rows_without_a_finite_logit_count_zero(divergence, backend):
    student, teacher = (x.float() for x in logits(4, 7))
    student[0] = teacher[1] = -math.inf
    student[2] = teacher[2] = -math.inf
    loss, gradient = run(
        student, teacher, divergence=divergence, backend=backend, reduction="none",
        upstream=torch.ones(4),
    )  # fmt: skip
    assert_zero(loss[:3])
    assert_zero(gradient[:3])
    assert loss[3] > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_ignored_rows_may_hold_nan(mode, backend):
    student, teacher = (x.float() for x in logits(6, 9))
    labels, weight = _labels(6, 9), torch.rand(6) + 0.1
    weight[4] = 0
    true, true_gradient = truth(student, teacher, labels, weight=weight, alpha=0.5)
    ignored = [1, 4]
    student[ignored] = teacher[ignored] = math.nan
    loss, gradient = run(
        student, teacher, labels, weight=weight, alpha=0.5, backend=backend,
        gradient="auto" if backend == "reference" else mode,
    )  # fmt: skip
    assert_close(loss, true)
    assert_close(gradient, true_gradient, "gradient")
    assert_zero(gradient[ignored])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean"])
def test_all_rows_ignored_is_zero_with_a_live_graph(reduction, backend):
    student, teacher = (x.float() for x in logits(3, 5))
    labels = torch.full((3,), -100)
    loss, gradient = run(student, teacher, labels, alpha=0.5, reduction=reduction, backend=backend)
    assert loss == 0
    assert_zero(gradient)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side", [0, 1])
def test_nan_in_a_counted_row_is_not_hidden(side, backend):
    pair = [x.float() for x in logits(2, 5)]
    pair[side][0, 0] = math.nan
    loss, _ = run(*pair, backend=backend)
    assert loss.isnan()


@pytest.mark.parametrize("backend", FUSED)
def test_a_factor_of_zero_removes_an_infinite_term(backend):
    student, teacher = (x.float() for x in logits(2, 5))
    student[0, 0] = -math.inf
    labels = torch.tensor([1, 2])
    true = torch.nn.functional.cross_entropy(student.double(), labels)
    for mode in MODES:
        loss, gradient = run(
            student, teacher, labels, alpha=0.0, weight=torch.ones(2), gradient=mode,
            backend=backend,
        )  # fmt: skip
        assert_close(loss, true)
        assert gradient.isfinite().all()


# --- layouts ---------------------------------------------------------------------------------


LAYOUTS = {
    "three dimensions": lambda x: x.view(2, 3, -1),
    "shifted sequence": lambda x: torch.cat([x, x], -2).view(2, 6, -1)[:, :-3],
    "storage offset": lambda x: torch.cat([x[:1], x])[1:],
    "strided rows": lambda x: torch.stack([x, x * 0], 1)[:, 0],
    "transposed storage": lambda x: x.t().contiguous().t(),
    "wider rows": lambda x: torch.cat([x, x], -1)[:, : x.size(-1)],
    "four dimensions, two seams": lambda x: x.view(1, 2, 3, -1).expand(2, -1, -1, -1)[:, :, :2],
}


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, mode, backend):
    student, teacher = (LAYOUTS[layout](x.float()) for x in logits(6, 33))
    true, true_gradient = truth(student.contiguous(), teacher.contiguous())
    leaf = student.detach().to(DEVICE).requires_grad_()
    loss = fastkd.distillation_loss(leaf, teacher.to(DEVICE), gradient=mode, backend=backend)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert_close(loss, true)
    assert_close(gradient, true_gradient, "gradient")


@pytest.mark.parametrize("backend", FUSED)
def test_offsets_beyond_32_bits(backend):
    """Two rows 2^31 entries apart; the memory between them is never touched."""
    student, teacher = (x.bfloat16().to(DEVICE) for x in logits(2, 33))
    far = torch.empty(2**31 + 33, dtype=torch.bfloat16, device=DEVICE)
    far = far.as_strided((2, 33), (2**31, 1)).copy_(student)
    leaf = far.detach().requires_grad_()
    loss = fastkd.distillation_loss(leaf, teacher, backend=backend)
    (gradient,) = torch.autograd.grad(loss, leaf)
    true, true_gradient = truth(student, teacher)
    assert_close(loss, true)
    assert_close(gradient, true_gradient, "gradient")
    assert_close(run(teacher, far, backend=backend)[0], truth(teacher, student)[0])


@pytest.mark.skipif(DEVICE == "cpu", reason="needs the memory and the speed of a GPU")
def test_more_than_two_to_the_31_logits():
    rows, vocab = 8200, 262144
    student = torch.randn(rows, vocab, dtype=torch.bfloat16, device=DEVICE).requires_grad_()
    teacher = torch.randn(1, vocab, dtype=torch.bfloat16, device=DEVICE).expand(rows, -1)
    loss = fastkd.distillation_loss(student, teacher, reduction="sum")
    loss.backward()
    for row in (0, rows - 1):
        true, gradient = truth(student[row].detach(), teacher[row], reduction="sum")
        ours = fastkd.distillation_loss(student[row].detach(), teacher[row], reduction="sum")
        assert_close(ours, true)
        assert_close(student.grad[row], gradient, "gradient")


@pytest.mark.parametrize("backend", FUSED)
def test_expanded_teacher(backend):
    student, teacher = (x.float() for x in logits(4, 9))
    check(student, teacher[:1].expand(4, -1), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (1, 5), (5,)])
def test_few_rows(shape, backend):
    student, teacher = (x.float() for x in logits(*shape))
    loss, gradient = run(student, teacher, backend=backend)
    assert gradient.shape == shape
    if student.numel():
        check(student, teacher, backend=backend)
    else:
        assert loss == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("widths", [(14, 12), (12, 14), (14, 14)])
def test_padded_vocabularies(widths, backend):
    student, teacher = (x.float() for x in logits(4, 10))
    true, true_gradient = truth(student, teacher)
    padded = [
        torch.cat([x, torch.full((4, width - 10), 50.0)], -1)
        for x, width in zip((student, teacher), widths, strict=True)
    ]
    loss, gradient = run(*padded, vocab_size=10, backend=backend)
    assert_close(loss, true)
    assert_close(gradient[:, :10], true_gradient, "gradient")
    assert_zero(gradient[:, 10:])


# --- in place --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_inplace(dtype, backend):
    student, teacher = (x.to(DEVICE, dtype) for x in logits(4, 9))
    leaf = student.clone().requires_grad_()
    hidden = leaf * 2
    loss = fastkd.distillation_loss(hidden, teacher, inplace=True, backend=backend)
    loss.backward()
    expected, gradient = run(student * 2, teacher, gradient="forward", backend=backend)
    assert torch.equal(loss, expected)
    assert torch.equal(leaf.grad, 2 * gradient)
    assert hidden.data_ptr() == hidden.detach().data_ptr()
    assert torch.equal(hidden.detach(), gradient)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("shape", [(6, 12), (6, 300), (2, 3, 12)])
def test_inplace_with_padding_and_rows_that_do_not_count(shape, standardize, backend):
    """What is left there is the gradient, 0, and not the logits: so a trainer uses it."""
    student, teacher = (x.float().to(DEVICE) for x in logits(*shape))
    labels = torch.tensor([3, -100, 0, 8, 5, -100], device=DEVICE).view(shape[:-1])
    weight = torch.tensor([1.0, 1, 0, 2, 0.5, 0], device=DEVICE).view(shape[:-1])
    settings = {"alpha": 0.5, "weight": weight, "vocab_size": shape[-1] - 3}
    settings |= {"standardize": standardize, "backend": backend}
    true, true_gradient = truth(student, teacher, labels, **settings)
    student.flatten(0, -2)[[1, 2, 5]] = math.nan
    hidden = student.clone().requires_grad_() * 1
    loss = fastkd.distillation_loss(hidden, teacher, labels, inplace=True, **settings)
    assert_close(loss, true)
    left = hidden.detach()
    assert_close(left, true_gradient, "gradient")
    assert_zero(left[..., -3:])
    assert_zero(left.flatten(0, -2)[[1, 2, 5]])


@pytest.mark.parametrize("columns", [7, 2048])
def test_near_rows_among_many_blocks(columns):
    """Few near or masked rows in some blocks come again; blocks of near rows do not wait."""
    shape = 2, 2**20 // columns, columns + 1
    teacher = 2 * torch.randn(shape)
    noise = torch.ones(shape[:2])
    noise[:, ::100] = 1e-2
    noise[1, : shape[1] // 2] = 1e-3
    student = teacher + noise[..., None] * torch.randn(shape)
    student[:, 50::100, 3] = teacher[:, 50::100, 3] = -torch.inf
    # Rows whose two leading dimensions do not merge.
    student, teacher = student[:, 1:, :columns], teacher[:, 1:, :columns]
    noise = noise[:, 1:]
    rows, _ = run(student, teacher, reduction="none", backend="torch")
    true_rows, true_gradient = truth(student, teacher, reduction="none")
    torch.testing.assert_close(rows.double(), true_rows.double(), rtol=1e-4, atol=1e-12)
    true, true_gradient = true_rows.mean(), true_gradient / true_rows.numel()
    near = noise < 1
    for inplace in (False, True):
        leaf = student.clone().requires_grad_()
        hidden = leaf.view_as(leaf)
        loss = fastkd.distillation_loss(hidden, teacher, inplace=inplace, backend="torch")
        loss.backward()
        assert_close(loss, true)
        assert_close(leaf.grad, true_gradient, "gradient")
        assert_close(leaf.grad[near], true_gradient[near], "gradient")


# --- by chance -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", FUSED)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_by_chance(backend, data):
    """Shapes, dtypes, strides, masks and options drawn at random, against the truth."""
    draw = data.draw
    rows, vocab = draw(st.integers(1, 4)), draw(st.integers(8, 70))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    student, teacher = (x.float() for x in logits(rows, vocab, noise=draw(st.sampled_from([1, 4]))))
    masked = torch.rand(vocab) < draw(st.sampled_from([0, 0.3]))
    masked[:2] = False
    student[:, masked] = teacher[:, masked] = -math.inf
    if draw(st.booleans()):
        student, teacher = student.repeat(1, 2)[:, :vocab], teacher.t().contiguous().t()
    check(
        student, teacher, torch.zeros(rows, dtype=torch.long),
        divergence=draw(st.sampled_from(DIVERGENCES)), temperature=draw(st.floats(1, 20)),
        alpha=draw(st.sampled_from([1.0, 0.5])), weight=torch.rand(rows) + 0.1,
        reduction=draw(st.sampled_from(["mean", "sum", "batchmean"])),
        gradient=draw(st.sampled_from(MODES)), backend=backend,
    )  # fmt: skip
