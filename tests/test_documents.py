"""docs/: every block of Python runs as it is written, with what its reader has already."""

from __future__ import annotations

import os
import types

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import fastkd
from fastkd.cache import Best, write
from fastkd.distill.errors import Usage
from fastkd.distill.quantised import quantise
from tests.closeness import assert_close
from tests.test_readme import ROOT, blocks

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
VOCABULARY = 48


def executed(page, number, **reader):
    """The names that a block leaves behind, given those that its reader has."""
    names = {"fastkd": fastkd, **reader}
    block = blocks("python", (ROOT / "docs" / page).read_text())[number]
    exec(compile(block, page, "exec"), names)
    return names


def llama(transformers):
    shape = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(shape).eval()


def test_no_block_is_forgotten():
    found = {page.name: len(blocks("python", page.read_text())) for page in ROOT.glob("docs/*.md")}
    assert found == {"caching.md": 1, "distilling.md": 1, "integrations.md": 2, "sharded.md": 1}


def test_a_cache_is_read(tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    monkeypatch.chdir(tmp_path)
    tokens, logits = torch.randint(100, (18, 4)), torch.randn(18, 4, 100)
    write("kept", Best(64), tokens, lambda ids, rows: logits[list(rows)], vocab_size=100)
    found = executed("caching.md", 0)
    assert torch.equal(found["tokens"], tokens[[3, 17]])
    best = logits[[3, 17]].log_softmax(-1).gather(-1, found["teacher"].indices)
    assert found["teacher"].shape[:2] == (2, 4)
    assert_close(found["teacher"].log_probs.half(), best)


def test_a_student_is_quantised():
    pytest.importorskip("torchao")
    student = llama(pytest.importorskip("transformers"))
    ids = torch.randint(VOCABULARY, (4, 6))
    with torch.no_grad():
        before = student(ids).logits
        executed("distilling.md", 0, student=student)
        moved = (student(ids).logits - before).norm()
    assert 0 < moved < 0.2 * before.norm()


def test_a_student_is_quantised_to_bits_that_it_can_be_trained_for():
    with pytest.raises(Usage, match="'int3' is unknown: did you mean 'int8'"):
        quantise(None, "int3")


def test_trainers_train(tmp_path):
    transformers = pytest.importorskip("transformers")
    student, teacher = llama(transformers), llama(transformers)
    before = {name: weight.clone() for name, weight in student.state_dict().items()}
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=1, use_cpu=True, report_to="none", save_strategy="no",
        disable_tqdm=True, learning_rate=1e-2,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(VOCABULARY, (8, 6))]
    executed(
        "integrations.md", 0, Trainer=transformers.Trainer, student=student, teacher=teacher,
        args=args, rows=rows,
    )  # fmt: skip
    assert any(not torch.equal(student.state_dict()[name], old) for name, old in before.items())


def test_trl_is_patched():
    pytest.importorskip("trl", exc_type=ImportError)
    trainers = pytest.importorskip("trl.experimental.gkd", exc_type=ImportError)
    from fastkd.integrations import trl

    replaced = []

    def trainer(*arguments):
        loss = trainers.GKDTrainer.generalized_jsd_loss
        return types.SimpleNamespace(train=lambda: replaced.append(hasattr(loss, "__wrapped__")))

    try:
        executed("integrations.md", 1, GKDTrainer=trainer)
    finally:
        trl.unpatch()
    assert replaced == [True]
    assert not hasattr(trainers.GKDTrainer.generalized_jsd_loss, "__wrapped__")


def test_columns_of_a_group():
    student = torch.randn(2, 5, VOCABULARY, requires_grad=True)
    teacher, labels = torch.randn(2, 5, VOCABULARY), torch.randint(VOCABULARY, (2, 5))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        found = executed(
            "sharded.md", 0, student_columns=student, teacher_columns=teacher, labels=labels,
            tp_group=dist.group.WORLD,
        )["loss"]  # fmt: skip
    finally:
        dist.destroy_process_group()
    z = student.detach().double()
    lq, lp = (F.log_softmax(x.double() / 2.0, -1) for x in (z, teacher))
    ce = F.cross_entropy(z.flatten(0, 1), labels.flatten())
    assert_close(found, 0.9 * 4.0 * (lq.exp() * (lq - lp)).sum(-1).mean() + 0.1 * ce)
    assert student.grad is not None
    assert student.grad.any()
