"""Output heads in place of logits: value and gradients, chunk by chunk, against the oracle."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastkd
from fastkd import chunks, linear
from fastkd.distill.measure import peak_memory
from fastkd.operands import LinearHead
from tests.cases import DIVERGENCES
from tests.closeness import assert_close, assert_zero
from tests.running import BACKENDS, FUSED, defined

ROWS, HIDDEN, TEACHER_HIDDEN, VOCAB = 11, 8, 5, 37
MODES = ["forward", "backward"]
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """Three rows to a chunk, and weights converted in two or three blocks: every seam is met."""
    monkeypatch.setattr(chunks, "CPU_BYTES", 2 * 3 * VOCAB * 4 * 5 // 4 + 1)
    monkeypatch.setattr(chunks, "LEAST_ROWS", 3)
    monkeypatch.setattr(linear, "CPU_CONVERTED", 16 * HIDDEN * 4)


class Case:
    """Leaves and operands of one call; `logits` makes them in fp64, by plain PyTorch."""

    def __init__(self, dtype=torch.float32, rows=(ROWS,), **head):
        self.leaves = [
            torch.randn(*rows, HIDDEN), torch.randn(VOCAB, HIDDEN), torch.randn(VOCAB),
            torch.randn(*rows, TEACHER_HIDDEN), torch.randn(VOCAB, TEACHER_HIDDEN),
        ]  # fmt: skip
        self.leaves = [x.to(dtype).requires_grad_(i < 3) for i, x in enumerate(self.leaves)]
        self.head = head

    def operands(self):
        return LinearHead(*self.leaves[:3], **self.head), LinearHead(*self.leaves[3:])

    def in_fp64(self):
        copy = Case.__new__(Case)
        copy.leaves = [x.detach().double().requires_grad_(x.requires_grad) for x in self.leaves]
        copy.head = self.head
        return copy

    def logits(self):
        hidden, weight, bias, teacher_hidden, teacher_weight = self.leaves
        student = (hidden @ weight.mT + bias) * self.head.get("logit_scale", 1.0)
        if cap := self.head.get("logit_softcap"):
            student = cap * torch.tanh(student / cap)
        return student, teacher_hidden @ teacher_weight.mT

    def gradients(self):
        return [x.grad for x in self.leaves if x.requires_grad]


def check(case, labels=None, form=(True, True), upstream=None, **settings):
    """The loss and all gradients of `case`, its sides as heads where `form` says so."""
    true = case.in_fp64()
    truth, _ = defined(*true.logits(), labels, **settings)
    upstream = torch.rand(truth.shape, dtype=torch.float64) + 0.5 if upstream is None else upstream
    (truth * upstream).sum().backward()
    operands = [
        head if wanted else rows
        for head, rows, wanted in zip(case.operands(), case.logits(), form, strict=True)
    ]
    loss = fastkd.distillation_loss(*operands, labels, **settings)
    (loss * upstream.to(loss.dtype)).sum().backward()
    assert_close(loss, truth)
    for ours, theirs in zip(case.gradients(), true.gradients(), strict=True):
        assert_close(ours, theirs, "gradient")


def labels_of(*rows: int) -> torch.Tensor:
    labels = torch.randint(VOCAB, rows)
    labels[1] = -100
    return labels


# --- against the oracle ----------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_every_divergence(divergence, mode):
    check(Case(), divergence=divergence, temperature=1.5, gradient=mode, backend="torch")


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", [(True, True), (True, False), (False, True)], ids=str)
def test_every_option_together(form, mode, backend, on_device):
    check(
        Case(logit_scale=0.7, logit_softcap=5.0), labels_of(ROWS), form,
        divergence=fastkd.JSD(0.3), temperature=torch.rand(ROWS) + 0.7, teacher_temperature=0.8,
        alpha=0.3, label_smoothing=0.1, entropy_weight=-0.2, weight=torch.rand(ROWS) + 0.1,
        vocab_size=33, num_items=7, gradient=mode, backend=backend,
    )  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", [(True, True), (True, False), (False, True)], ids=str)
def test_standardized(form, mode):
    check(Case(logit_scale=3.0), None, form, standardize=True, temperature=2.0, gradient=mode)


@pytest.mark.parametrize("form", [(True, True), (False, True)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
def test_reductions_of_more_dimensions(reduction, form):
    case = Case(rows=(2, 5))
    check(case, torch.randint(VOCAB, (2, 5)), form, alpha=0.5, reduction=reduction)


@pytest.mark.parametrize("mode", MODES)
def test_few_rows_that_count_are_gathered_before_the_products(mode, monkeypatch):
    labels, rows = torch.full((ROWS,), -100), []
    labels[[2, 9]] = 4
    made = linear.logits
    monkeypatch.setattr(
        linear, "logits", lambda head, out: rows.append(len(out)) or made(head, out)
    )
    check(Case(), labels, alpha=0.5, gradient=mode)
    assert rows[:2] == [2, 2]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("head", [{}, {"logit_softcap": 3.0, "logit_scale": 0.5}], ids=str)
def test_ignored_rows_may_hold_nan(head, mode, backend, on_device):
    case, labels = Case(**head), labels_of(ROWS)
    with torch.no_grad():
        case.leaves[0][1] = torch.nan
    loss = fastkd.distillation_loss(
        *case.operands(), labels, alpha=0.5, gradient=mode, backend=backend
    )
    loss.backward()
    assert all(gradient.isfinite().all() for gradient in case.gradients())
    assert_zero(case.leaves[0].grad[1])


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("metrics", [False, True])
@pytest.mark.parametrize(("rows", "mode"), [(ROWS, "forward"), (ROWS, "backward"), (0, "backward")])
def test_no_row_counts(rows, mode, metrics, backend, on_device):
    case = Case(rows=(rows,))
    found = fastkd.distillation_loss(
        *case.operands(), torch.full((rows,), -100), alpha=0.5, gradient=mode,
        return_metrics=metrics, backend=backend,
    )  # fmt: skip
    loss = found[0] if metrics else found
    loss.backward()
    assert loss == 0
    for gradient in case.gradients():
        assert not gradient.count_nonzero()


def test_multi_label():
    labels = torch.randint(2, (ROWS, VOCAB))
    check(Case(), labels, divergence=fastkd.Bernoulli(), alpha=0.5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_beside_a_side_in_fp64(dtype, mode):
    """All arithmetic is fp64 then, and with it the products of a head that is not."""
    case = Case(dtype, logit_softcap=4.0)
    true = case.in_fp64()
    student, teacher = true.logits()
    leaf = student.detach().requires_grad_()
    truth, _ = defined(student, teacher, divergence="reverse_kl", temperature=1.5)
    (expected,) = torch.autograd.grad(truth, student, retain_graph=True)
    truth.backward()
    settings = {"divergence": "reverse_kl", "temperature": 1.5, "gradient": mode}
    head, teachers_head = case.operands()
    for operands in ((head, teacher), (leaf, teachers_head)):
        loss = fastkd.distillation_loss(*operands, **settings)
        loss.backward()
        assert loss.dtype == torch.float64
        assert (loss - truth).abs() < 1e-10 * truth
    assert (leaf.grad - expected).abs().max() < 1e-10 * expected.abs().max()
    for ours, theirs in zip(case.gradients(), true.gradients(), strict=True):
        assert_close(ours, theirs, "gradient")


@pytest.mark.parametrize("head", [{}, {"logit_softcap": 3.0, "logit_scale": 0.5}], ids=str)
def test_the_reference_rounds_no_logits(head):
    case = Case(torch.bfloat16, **head)
    true = case.in_fp64()
    settings = {"alpha": 0.5, "vocab_size": 33, "divergence": "reverse_kl"}
    labels = labels_of(ROWS).clamp(max=32)
    truth, _ = defined(*true.logits(), labels, **settings)
    loss = fastkd.distillation_loss(*case.operands(), labels, backend="reference", **settings)
    loss.backward()
    truth.backward()
    assert_close(loss, truth)
    for ours, theirs in zip(case.gradients(), true.gradients(), strict=True):
        assert_close(ours, theirs, "gradient")


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("mode", MODES)
def test_hidden_states_and_weight_by_columns(mode, backend, on_device):
    case = Case()
    case.leaves = [
        x.detach().mT.contiguous().mT.requires_grad_(x.requires_grad) if x.dim() > 1 else x
        for x in case.leaves
    ]
    check(case, upstream=torch.tensor(2.5), gradient=mode, backend=backend)


def test_metrics_are_those_of_the_logits():
    case, labels = Case(), labels_of(ROWS)
    settings = {"alpha": 0.5, "return_metrics": True}
    _, ours = fastkd.distillation_loss(*case.operands(), labels, **settings)
    _, truth = fastkd.distillation_loss(*case.in_fp64().logits(), labels, **settings)
    for one, other in zip(ours[:4], truth[:4], strict=True):
        assert_close(one, other)
    assert torch.equal(ours.agreement, truth.agreement.float())


def test_teacher_and_temperature_train():
    case = Case()
    temperature = torch.tensor(1.3, requires_grad=True)
    case.leaves = [x.detach().requires_grad_() for x in case.leaves]
    true = case.in_fp64()
    warm = temperature.detach().double().requires_grad_()
    settings = {"divergence": fastkd.JSD(0.2), "teacher_grad": True}
    fastkd.distillation_loss(*case.operands(), temperature=temperature, **settings).backward()
    truth, _ = defined(*true.logits(), temperature=warm, **settings)
    truth.backward()
    for ours, theirs in zip(case.gradients(), true.gradients(), strict=True):
        assert_close(ours, theirs, "gradient")
    assert_close(temperature.grad, warm.grad, "gradient")


# --- what is not computed --------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_frozen_head_costs_no_product(mode, monkeypatch):
    case, products = Case(), []
    case.leaves[1].requires_grad_(False)
    add = linear._add_product
    monkeypatch.setattr(
        linear, "_add_product", lambda out, x, y: products.append(out.shape) or add(out, x, y)
    )
    check(case, gradient=mode)
    assert products
    assert all(shape[-1] == HIDDEN and shape[0] <= 3 for shape in products)


def test_one_product_where_hidden_states_and_head_are_the_same(monkeypatch):
    hidden, weight = torch.randn(ROWS, HIDDEN, requires_grad=True), torch.randn(VOCAB, HIDDEN)
    labels, count = labels_of(ROWS), []
    made = linear.logits
    monkeypatch.setattr(linear, "logits", lambda head, out: count.append(1) or made(head, out))
    frozen = hidden.detach()
    settings = {"temperature": 2.0, "teacher_temperature": 0.5, "alpha": 0.7}
    head = LinearHead(frozen, weight)
    fastkd.distillation_loss(head, head, labels, **settings)
    assert len(count) == -(-ROWS // 6)  # one buffer: chunks of twice the rows
    loss = fastkd.distillation_loss(LinearHead(hidden, weight), head, labels, **settings)
    (ours,) = torch.autograd.grad(loss, hidden)
    double = hidden.detach().double().requires_grad_()
    truth, _ = defined(
        double @ weight.double().T, frozen.double() @ weight.double().T, labels, **settings
    )
    assert_close(ours, torch.autograd.grad(truth, double)[0], "gradient")


# --- dtypes and other people's machinery -----------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_half_precision_costs_no_more_than_its_rounding(mode):
    """Logits of a chunk are fp32: the gradient is right to the rounding of its own dtype."""
    case = Case(torch.bfloat16)
    true = case.in_fp64()
    fastkd.distillation_loss(*case.operands(), gradient=mode).backward()
    truth, _ = defined(*true.logits())
    truth.backward()
    for ours, theirs in zip(case.gradients(), true.gradients(), strict=True):
        assert ours.dtype == torch.bfloat16
        assert_close(ours, theirs, "gradient")


def test_fp64():
    check(Case(torch.float64), divergence="reverse_kl")


@pytest.mark.parametrize("mode", MODES)
def test_autocast(mode):
    case = Case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fastkd.distillation_loss(*case.operands(), gradient=mode)
    loss.backward()
    truth, _ = defined(*case.in_fp64().logits())
    assert loss.item() == pytest.approx(truth.item(), rel=0.02)
    assert all(x.dtype == torch.float32 for x in case.gradients())


def test_checkpointing_and_accumulation():
    layer = nn.Linear(HIDDEN, VOCAB)
    x, teacher = torch.randn(ROWS, HIDDEN), torch.randn(ROWS, VOCAB)

    def loss(x):
        head = LinearHead(x.tanh(), layer.weight, layer.bias)
        return fastkd.distillation_loss(head, teacher, reduction="sum")

    checkpoint(loss, x, use_reentrant=False).backward()
    once = layer.weight.grad.clone()
    layer.weight.grad = None
    loss(x).backward()
    loss(x).backward()
    assert torch.equal(layer.weight.grad, 2 * once)


@pytest.mark.parametrize("mode", MODES)
def test_compile(mode):
    case = Case(logit_softcap=6.0)
    case.leaves[1].requires_grad_(False)
    function = torch.compile(
        lambda s, t, labels: fastkd.distillation_loss(s, t, labels, alpha=0.5, gradient=mode),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    labels = labels_of(ROWS)

    def compiled(*leaves):
        return function(LinearHead(*leaves[:3], logit_softcap=6.0), LinearHead(*leaves[3:]), labels)

    compiled(*case.leaves).backward()
    ours = case.gradients()
    other = case.in_fp64()
    truth, _ = defined(*other.logits(), labels, alpha=0.5)
    truth.backward()
    for one, theirs in zip(ours, other.gradients(), strict=True):
        assert_close(one, theirs, "gradient")


@pytest.mark.parametrize("gradient", MODES)
def test_the_bytes_of_a_chunk_are_an_argument_and_change_rounding_alone(gradient, monkeypatch):
    monkeypatch.setattr(chunks, "LEAST_ROWS", 1)
    sizes, made, find = [], {}, linear.logits
    monkeypatch.setattr(
        linear, "logits", lambda head, out: (sizes.append(len(out)), find(head, out))[1]
    )
    for rows in (1, 4, ROWS, None):
        budget = None if rows is None else int(2.1 * rows * VOCAB * 4 / (1 - chunks.CPU_SPARE))
        case = Case()
        torch.manual_seed(0)
        case.leaves = [x.detach().normal_().requires_grad_(x.requires_grad) for x in case.leaves]
        loss = fastkd.distillation_loss(*case.operands(), gradient=gradient, chunk_bytes=budget)
        loss.backward()
        made[rows] = [loss, *case.gradients()]
        assert max(sizes) == (3 if rows is None else rows)
        sizes.clear()
    for rows in (1, 4, None):
        for ours, whole in zip(made[rows], made[ROWS], strict=True):
            assert_close(ours, whole, "gradient" if ours.dim() else "value")


@pytest.mark.parametrize("budget", [0, -1, 1.5, True, "8 MiB", float("nan")])
def test_a_chunk_of_no_whole_number_of_bytes_is_refused(budget):
    with pytest.raises((TypeError, ValueError), match="chunk_bytes must be"):
        fastkd.distillation_loss(*Case().operands(), chunk_bytes=budget)


def test_refusals():
    student, teacher = Case().operands()
    with pytest.raises(ValueError, match="LinearHead has none"):
        fastkd.distillation_loss(student, teacher, inplace=True)
    with pytest.raises(ValueError, match="detach it, or say teacher_grad=True"):
        fastkd.distillation_loss(student, student)
    with pytest.raises(ValueError, match="equal leading shapes"):
        fastkd.distillation_loss(student, torch.randn(ROWS + 1, VOCAB))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [None, 32 << 20])
def test_memory_beside_inputs_and_gradients_is_that_of_a_chunk(dtype, budget, monkeypatch):
    """What the loss holds beside logits, and a weight that is converted, included."""
    monkeypatch.undo()
    rows, hidden, vocab = 400, 256, 32000
    leaf = torch.randn(rows, hidden).to(dtype).requires_grad_()
    other = torch.randn(rows, hidden).to(dtype)
    weight = (torch.randn(vocab, hidden) / hidden**0.5).to(dtype)

    def call():
        heads = LinearHead(leaf, weight), LinearHead(other, weight)
        fastkd.distillation_loss(*heads, chunk_bytes=budget).backward()

    call()
    peak = peak_memory(call, leaf.device)
    budget = budget or chunks.CPU_BYTES
    assert 0.8 * budget < peak < 1.1 * budget


SCRATCH = """
import torch
from benchmarks import machine
from fastkd import linear
torch.set_num_threads(2)
hidden, weight, out = torch.randn(71, 1024), torch.randn(32000, 1024), torch.zeros(71, 32000)
linear._product(hidden[:16], weight[:1000].t(), torch.empty(16, 1000))  # loads libraries
before, _ = machine.resident()
linear._product(hidden, weight.t(), out)
print((machine.resident()[1] - before) / out.nbytes)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_product_holds_no_copy_of_the_logits_that_it_makes():
    """As MKL does on two threads, for some sizes. What it holds, it keeps: a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", SCRATCH], check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert float(done.stdout) < 0.5


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_heads_without_numbers(mode):
    """On the meta device, which knows no autocast: shapes, and gradients of these."""
    with torch.device("meta"):
        hidden, weight = torch.randn(3, 4), torch.randn(9, 4, requires_grad=True)
        head = fastkd.LinearHead(hidden, weight, torch.randn(9))
        for teacher in (torch.randn(3, 9), fastkd.LinearHead(torch.randn(3, 2), torch.randn(9, 2))):
            loss = fastkd.distillation_loss(head, teacher, gradient=mode)
            (gradient,) = torch.autograd.grad(loss, weight)
            assert (loss.shape, loss.device.type) == ((), "meta")
            assert gradient.shape == weight.shape
