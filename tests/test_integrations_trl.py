"""fastkd under TRL's trainers: the same numbers as TRL's own losses, which are asked in fp64."""

import itertools
import math
import os
import subprocess
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
trl = pytest.importorskip("trl")

import fastkd.integrations  # noqa: E402
import fastkd.integrations.trl as integration  # noqa: E402
from fastkd import chunks  # noqa: E402
from fastkd.integrations import numbers  # noqa: E402
from tests import environments  # noqa: E402
from tests.closeness import assert_close, assert_zero  # noqa: E402

ROOT = Path(__file__).parents[1]
TRAINING = Path(__file__).with_name("test_integrations_trl_training.py")
BETAS = [0, 0.3, 1]
KINDS = ("value", "gradient", "gradient")
CLASSES = {"gkd": "GKDTrainer", "gold": "GOLDTrainer", "iw_opd": "IWOPDTrainer"}
KERNEL = numbers(trl.__version__) >= (1, 15)


@pytest.fixture(autouse=True)
def _taken_out():
    yield
    integration.unpatch()


def owner(trainer):
    module = integration._imported(f"trl.experimental.{trainer}.{trainer}_trainer")
    return getattr(module, CLASSES.get(trainer, ""), module)


def logits(*shape):
    student, teacher = 3 * torch.randn(2, *shape)
    labels = torch.randint(9, shape[:-1])
    labels[:, :2] = -100
    return student, teacher, labels


def of(function, student, teacher, *rest, upstream=None, **options):
    """Value and gradients; `upstream` for those of no scalar."""
    student, teacher = (x.detach().clone().requires_grad_() for x in (student, teacher))
    loss = function(student, teacher, *rest, **options)
    loss.backward(torch.ones_like(loss) if upstream is None else upstream.to(loss))
    return loss.detach(), student.grad, teacher.grad


def same(ours, own, student, teacher, *rest, **options):
    """Parity with TRL's own code in fp64."""
    found = of(ours, student, teacher, *rest, **options)
    truth = of(own, student.double(), teacher.double(), *rest, **options)
    for kind, got, wanted in zip(KINDS, found, truth, strict=True):
        assert_close(got, wanted, kind)


# --- each loss -------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("trainer", CLASSES)
def test_generalized_jsd(trainer, beta):
    own = owner(trainer).generalized_jsd_loss
    integration.patch(trainer)
    ours = owner(trainer).generalized_jsd_loss
    assert ours is not own
    student, teacher, labels = logits(3, 7, 11)
    for labels_, temperature in itertools.product((labels, None), (1.0, 2.5)):
        options = {"beta": beta, "temperature": temperature}
        for more in (
            {}, {"reduction": "sum"}, {"num_items_in_batch": 23},
            {"num_items_in_batch": torch.tensor(23), "reduction": "none"},
        ):  # fmt: skip
            same(ours, own, student, teacher, labels_, **options, **more)


@pytest.mark.parametrize("trainer", CLASSES)
def test_arguments_by_position_are_those_of_each_class(trainer):
    own = owner(trainer).generalized_jsd_loss
    integration.patch(trainer)
    middle = {"gkd": (), "gold": (False,), "iw_opd": (0, True)}[trainer]
    student, teacher, labels = logits(3, 7, 11)
    same(
        owner(trainer).generalized_jsd_loss, own, student, teacher,
        labels, 0.3, 2.0, "batchmean", *middle, 23,
    )  # fmt: skip


@pytest.mark.parametrize("trainer", CLASSES)
def test_no_place_that_counts_is_a_zero_with_a_gradient(trainer):
    integration.patch(trainer)
    student, teacher, labels = logits(3, 7, 11)
    ours = owner(trainer).generalized_jsd_loss
    for found in of(ours, student, teacher, torch.full_like(labels, -100)):
        assert_zero(found)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("trainer", CLASSES)
def test_numbers_per_entry_of_the_vocabulary_are_trls_own(trainer, reduction):
    own = owner(trainer).generalized_jsd_loss
    integration.patch(trainer)
    student, teacher, labels = logits(3, 7, 11)
    options = {"labels": labels, "reduction": reduction, "beta": 0.3}
    found = owner(trainer).generalized_jsd_loss(student, teacher, **options)
    assert torch.equal(found, own(student, teacher, **options))
    assert found.shape == (() if reduction == "mean" else ((labels != -100).sum(), 11))


@pytest.mark.parametrize(
    ("trainer", "options"), [("gold", {"logits_are_probs": True}), ("iw_opd", {"top_k": 3})]
)
def test_what_has_no_equal_is_trls_own(trainer, options):
    own = owner(trainer).generalized_jsd_loss
    integration.patch(trainer)
    student, teacher, _ = (
        x.softmax(-1) if x.dtype.is_floating_point else x for x in logits(3, 7, 11)
    )
    found = owner(trainer).generalized_jsd_loss(student, teacher, **options)
    assert torch.equal(found, own(student, teacher, **options))
    if trainer == "iw_opd":  # all entries are no top-k
        same(
            owner(trainer).generalized_jsd_loss, own, *logits(3, 7, 11)[:2], top_k=11,
        )  # fmt: skip


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("trainer", ["sdft", "sdpo"])
def test_self_distillation(trainer, beta):
    losses = integration._imported(f"trl.experimental.{trainer}.loss_utils")
    names = ["compute_divergence", "compute_full_logit_self_distillation_loss"]
    own = {name: getattr(losses, name) for name in (*names, "compute_topk_self_distillation_loss")}
    student, teacher, _ = logits(3, 7, 11)
    upstream = torch.randn(3, 7)
    options = {"distillation_alpha": beta, "upstream": upstream}

    truth = {
        tail: of(
            own["compute_topk_self_distillation_loss"], student.double(), teacher.double(),
            distillation_topk=4, distillation_add_tail=tail, **options,
        )
        for tail in (True, False)
    }  # fmt: skip
    integration.patch(trainer)
    module = owner(trainer)
    for name in names:
        assert getattr(module, name) is not own[name]
    same(
        module.compute_full_logit_self_distillation_loss, own[names[1]], student, teacher, **options
    )
    # In fp64 too: in fp32 TRL's own tail, a difference of 1 and a sum, is 1e-4 off.
    for tail, wanted in truth.items():
        found = of(
            module.compute_topk_self_distillation_loss, student.double(), teacher.double(),
            distillation_topk=4, distillation_add_tail=tail, **options,
        )  # fmt: skip
        for kind, ours, theirs in zip(KINDS, found, wanted, strict=True):
            assert_close(ours, theirs, kind)


def dense(hidden, weight, bias, scale, softcap):
    raw = (hidden @ weight.t() + (0 if bias is None else bias)) * scale
    return raw if softcap is None else softcap * torch.tanh(raw / softcap)


@pytest.mark.skipif(not KERNEL, reason="before trl 1.15 there is no such function")
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("scale", "softcap", "biased"), [(1.0, None, False), (0.7, 4.0, True)])
def test_chunks_of_a_head(beta, scale, softcap, biased, monkeypatch):
    """Against dense logits in fp64 and autograd, and against TRL's own kernel in its fp32."""
    module = integration._imported("trl.trainer.distillation_trainer")
    kernels = integration._imported("trl.kernels.chunked_divergence")
    own = kernels.ChunkedDivergenceFunction
    rows, width, wider, vocabulary = 13, 6, 9, 17
    student = [torch.randn(rows, width), torch.randn(vocabulary, width)]
    teacher = [torch.randn(rows, wider), torch.randn(vocabulary, wider)]
    for side in (student, teacher):
        side.append(torch.randn(vocabulary) if biased else None)
    upstream = torch.randn(rows)
    monkeypatch.setattr(chunks, "LEAST_ROWS", 4)  # a last chunk of one row
    monkeypatch.setattr(chunks, "CPU_BYTES", 1)

    def run(apply, dtype):
        sides = [[x if x is None else x.to(dtype).clone() for x in s] for s in (student, teacher)]
        leaves = [x.requires_grad_() for x in sides[0] if x is not None]
        sides[1][1].requires_grad_()  # TRL's teachers are not frozen; they get no gradient
        value, entropy = apply(*sides[0], *sides[1], beta, 2.0, scale, softcap, 1.3, None)
        value.backward(upstream.to(value))
        if apply is not formula:
            assert sides[1][1].grad is None
        return [value.detach(), entropy, *(leaf.grad for leaf in leaves)]

    def formula(*arguments):
        hs, ws, bs, ht, wt, bt, _, temperature, s_scale, s_cap, t_scale, t_cap = arguments
        lq, lp = (
            (dense(*side) / temperature).log_softmax(-1)
            for side in ((hs, ws, bs, s_scale, s_cap), (ht, wt, bt, t_scale, t_cap))
        )
        entropy = -(lq.exp() * lq).sum(-1)
        if beta in (0, 1):
            first, second = (lq, lp) if beta else (lp, lq)
            return (first.exp() * (first - second)).sum(-1), entropy.detach()
        lm = torch.logaddexp(lp + math.log(beta), lq + math.log(1 - beta))
        parts = [(x.exp() * (x - lm)).sum(-1) for x in (lp, lq)]
        return beta * parts[0] + (1 - beta) * parts[1], entropy.detach()

    truth = run(formula, torch.float64)
    integration.patch("distillation")
    assert kernels.ChunkedDivergenceFunction is not own
    found = run(kernels.ChunkedDivergenceFunction.apply, torch.float32)
    theirs = run(own.apply, torch.float32)
    for i, (ours, trls, wanted) in enumerate(zip(found, theirs, truth, strict=True)):
        assert_close(ours, wanted, "value" if i < 2 else "gradient")
        assert_close(trls, wanted, "gradient")
    assert vars(module).get("ChunkedDivergenceFunction") is not own


@pytest.mark.skipif(not KERNEL, reason="before trl 1.15 there is no such function")
def test_no_valid_row_and_a_frozen_head():
    integration.patch("distillation")
    apply = integration._imported("trl.kernels.chunked_divergence").ChunkedDivergenceFunction.apply
    hidden, weight = torch.randn(0, 6, requires_grad=True), torch.randn(17, 6)
    value, entropy = apply(hidden, weight, None, hidden.detach(), weight, None, 0.5)
    value.sum().backward()
    assert value.shape == entropy.shape == (0,)
    assert hidden.grad.shape == (0, 6)


# --- putting in and taking out ---------------------------------------------------------------


def held():
    """All that could be replaced, as it is now."""
    return [
        vars(owner)[name]
        for place in integration.PLACES
        if numbers(trl.__version__) >= numbers(place.since)
        for owner, name in place.owners()
    ]


def test_patch_twice_and_out_again():
    before = held()
    said = integration.patch()
    inside = held()
    assert all(new is not old for new, old in zip(inside, before, strict=True))
    assert len(said) == 8 - (not KERNEL)
    integration.patch()
    integration.unpatch()
    assert all(new is old for new, old in zip(held(), before, strict=True))


def test_a_context_leaves_what_was_patched_before():
    before = held()
    integration.patch("gkd")
    inside = held()
    with integration.patched("gkd", "gold"):
        assert sum(new is not old for new, old in zip(held(), before, strict=True)) == 2
    assert [new is old for new, old in zip(held(), before, strict=True)].count(False) == 1
    assert [new is old for new, old in zip(held(), inside, strict=True)].count(False) <= 1
    integration.unpatch()
    assert all(new is old for new, old in zip(held(), before, strict=True))


def test_a_trainer_that_does_not_import_here_is_left_out_unless_named(monkeypatch):
    real = integration._imported

    def imported(module):
        if "gold" in module:
            raise ModuleNotFoundError("No module named 'requests'")
        return real(module)

    monkeypatch.setattr(integration, "_imported", imported)
    said = integration.patch()
    assert [line for line in said if line.startswith("gkd")]
    assert not [line for line in said if line.startswith("gold")]
    with pytest.raises(ModuleNotFoundError, match="requests"):
        integration.patch("gold")


def test_an_unknown_signature_is_refused_before_anything_changes(monkeypatch):
    def loss(student_logits, teacher_logits, labels=None, beta=0.5, chunk=8):
        raise AssertionError

    monkeypatch.setattr(owner("iw_opd"), "generalized_jsd_loss", staticmethod(loss))
    before = held()
    with pytest.raises(ImportError, match=r"it takes student_logits, .*, chunk; known is"):
        integration.patch()
    assert all(new is old for new, old in zip(held(), before, strict=True))


@pytest.mark.parametrize("found", ["1.11.9", "2.0.0", None])
def test_absent_and_unsupported_versions_are_refused(found, monkeypatch):
    def version(package):
        if found is None:
            raise fastkd.integrations.PackageNotFoundError(package)
        return found

    monkeypatch.setattr(fastkd.integrations, "version", version)
    message = "needs trl, which is not installed" if found is None else f"this is {found}: pip"
    with pytest.raises(ImportError, match=message):
        integration.patch()


def test_an_unknown_trainer_is_refused():
    with pytest.raises(ValueError, match=r"patch takes gkd, gold, .*, got 'minillm'"):
        integration.patch("minillm")


@pytest.mark.full
@pytest.mark.parametrize("version", ["1.12.0", "1.16.0"])
def test_the_oldest_and_the_newest_trl(version, tmp_path):
    # Some of 1.12's trainers import requests undeclared.
    python = environments.with_others(tmp_path, f"trl=={version}", "requests")
    code = "import trl; print(trl.__version__)"
    used = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    assert used.stdout.split() == [version]
    done = subprocess.run(
        [python, "-m", "pytest", "-p", "no:cacheprovider", __file__, TRAINING], cwd=ROOT,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
