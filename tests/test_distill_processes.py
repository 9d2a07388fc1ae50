"""`fastkd distill` over gloo, weights or vocabulary divided: as one process, whatever ends it."""

import copy
import itertools
import json
import os
import signal
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from tests import ranks, sharded
from tests.closeness import assert_close
from tests.test_distill_user_models import close, distil, losses, options, transformers, weights
from tests.test_distill_user_models import home as home

if not (hasattr(os, "fork") and dist.is_gloo_available()):
    pytest.skip("needs fork and gloo", allow_module_level=True)

STEPS = 12
CHAIN = {"steps": STEPS, "save_every": 2, "log_every": 1, "evaluate_every": 6, "threads": 1}


@pytest.fixture(scope="module")
def nursery():
    nursery = ranks.Nursery()
    yield nursery
    nursery.close()


@pytest.fixture(scope="module")
def alone(home, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "out"
    assert distil("--out", folder, *options(home, **CHAIN)) == 0
    return folder


def said(path):
    return [each.read_text() for each in sorted(path.parent.glob(f"{path.name}.*"))]


def as_one_process(folder, alone):
    names = {"config.toml", "curves.png", "metrics.csv", "metrics.json", "student"}
    assert {path.name for path in folder.iterdir()} == names
    close(weights(folder), weights(alone))
    assert losses(folder) == pytest.approx(losses(alone), rel=1e-4)
    mine, theirs = (json.loads((f / "metrics.json").read_text()) for f in (folder, alone))
    for when in ("before", "after"):
        assert mine[when] == pytest.approx(theirs[when], rel=1e-4)


def test_a_kill_and_an_interrupt_change_nothing(home, alone, nursery, tmp_path):
    out, words = tmp_path / "out", tmp_path / "said"
    new = ["distill", "--out", out, "--fsdp", *options(home, batch_size=2, **CHAIN)]
    again = ["distill", "--resume", out]
    state = "trainer_state.json"
    codes = nursery.run(new, words, out / "checkpoint-2" / state, [1], signal.SIGKILL)
    assert codes == [1, -9], said(words)
    last = said(words)[0].splitlines()[-1]
    assert last == (
        "fastkd distill: another process of this run ended; go on with: "
        f"fastkd distill --resume {out}"
    )
    assert "Traceback" not in said(words)[0]
    codes = nursery.run(again, words, out / "checkpoint-6" / state, [0, 1], signal.SIGINT)
    assert codes == [130, 130], said(words)
    assert f"stopped; go on with: fastkd distill --resume {out}" in said(words)[0]
    assert nursery.run(again, words) == [0, 0], said(words)
    as_one_process(out, alone)


def test_a_divided_vocabulary_changes_nothing(home, alone, nursery, tmp_path):
    out, words = tmp_path / "out", tmp_path / "said"
    new = ["distill", "--out", out, "--tensor-parallel=2", *options(home, **CHAIN)]
    state = out / "checkpoint-6" / "trainer_state.json"
    assert nursery.run(new, words, state, [0, 1], signal.SIGINT) == [130, 130], said(words)
    assert nursery.run(["distill", "--resume", out], words) == [0, 0], said(words)
    as_one_process(out, alone)


def test_weights_are_divided_and_the_head_is_gathered_once(home, nursery, tmp_path):
    command, words = [f"{__name__}:divided_weights", home, tmp_path], tmp_path / "said"
    assert nursery.run(command, words) == [0, 0], said(words)


def divided_weights(home, folder):
    """On a rank: its share of both models, and the gathers of a step of many chunks of rows."""
    from torch.distributed.fsdp import FSDPModule

    trainer, job, gathers = one_step(home, folder, fsdp=True)
    # Of either model its blocks and what is outside of them, some for the backward again.
    assert len(gathers) == 2
    assert max(gathers) <= 7
    for model in (*job.teachers, trainer.model):
        assert isinstance(model, FSDPModule)
        model.reshard()
        mine = sum(weight.to_local().numel() for weight in model.parameters())
        assert mine < 0.6 * sum(weight.numel() for weight in model.parameters())
    save = torch.save

    def slow(*arguments):
        time.sleep(0.3 * dist.get_rank())
        save(*arguments)

    with patch.object(torch, "save", slow):
        trainer._save_rng_state(str(folder))
    assert (Path(folder) / "rng_state_1.pth").exists()  # on all, before the state of the run


def test_two_pairs_of_processes_divide_the_vocabulary(home, nursery, tmp_path):
    command, words = [f"{__name__}:divided_vocabulary", home, tmp_path], tmp_path / "said"
    assert nursery.run(command, words, world=4) == [0] * 4, said(words)


def divided_vocabulary(home, folder):
    for fsdp in (False, True):
        trainer, _, _ = one_step(home, folder, tensor_parallel=2, fsdp=fsdp)
        first = 200 * (dist.get_rank() % 2)
        assert trainer.columns.mine == slice(first, first + 200)


def one_step(home, folder, **options):
    """The gradient, over two batches on each rank, is that of all of them by PyTorch alone."""
    from fastkd import chunks

    trainer, job = trainer_of(home, Path(folder), **options)
    steps = Recorded()
    trainer.add_callback(steps)
    before = copy.deepcopy(trainer.model)
    step = trainer.training_step
    gathers = []

    def counted(model, inputs, *others):
        steps.batches.append(inputs)
        with sharded.Counted() as found, patch.multiple(chunks, CPU_BYTES=1, LEAST_ROWS=2):
            loss = step(model, inputs, *others)
        gathers.append(found.count)
        return loss

    trainer.training_step = counted
    trainer.train()
    assert_right(steps, before, f"{home}/teacher", options.get("tensor_parallel", 1))
    return trainer, job, gathers


def trainer_of(home, folder, **options):
    from fastkd.distill import settings
    from fastkd.distill.job import Job

    chosen = settings.build(settings.UserModels, {
        "teacher": [f"{home}/teacher"], "student": f"{home}/student", "data": [f"{home}/text.txt"],
        "sequence_length": 16, "device": "cpu", "batch_size": 2, "accumulation": 2, "steps": 1,
        "clip": 0, "alpha": 0.7, **options,
    })  # fmt: skip
    job = Job(chosen, folder / "tokens")
    return job.trainer(chosen, folder, save_strategy="no", eval_strategy="no"), job


class Recorded(transformers.TrainerCallback):
    """The batches of a step, and the gradient as its optimizer gets it."""

    def __init__(self):
        self.batches = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **others):
        self.gradients = {
            name: whole(weight.grad)
            for name, weight in model.named_parameters()
            if weight.grad is not None
        }


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def assert_right(steps, student, teacher, sharing):
    """The gradient of the mean over the tokens of all ranks' batches, in fp64, at T = 2."""
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, [dict(batch) for batch in steps.batches])
    torch.testing.assert_close(gathered[::sharing], gathered[sharing - 1 :: sharing])
    gathered = gathered[::sharing]
    student = student.double()
    teacher = transformers.AutoModelForCausalLM.from_pretrained(teacher).double()
    losses, tokens = [], 0
    for batch in itertools.chain(*gathered):
        inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
        z = student(**inputs, use_cache=False).logits[:, :-1, :400].flatten(0, 1)
        with torch.no_grad():
            y = teacher(**inputs, use_cache=False).logits[:, :-1, :400].flatten(0, 1)
        labels = batch["labels"][:, 1:].flatten()
        p, q = (y / 2).log_softmax(-1), (z / 2).log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1)[labels != -100].sum()
        ce = F.cross_entropy(z, labels, ignore_index=-100, reduction="sum")
        losses.append(0.7 * 4 * kl + 0.3 * ce)
        tokens += (labels != -100).sum()
    (sum(losses) / tokens).backward()
    assert tokens > 60
    assert len(steps.gradients) == len(list(student.parameters()))
    for name, weight in student.named_parameters():
        assert_close(steps.gradients[name], weight.grad, "gradient")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--fsdp"], "fsdp: there is one process: start several by torchrun"),
        (["--tensor-parallel=2"], "tensor_parallel=2 must divide the number of processes, which"),
        (["--tensor-parallel=2", "--cross-tokenizer=gold"], "uld sorts all probabilities"),
        (["--tensor-parallel=2", "--no-chunked-logits"], "without chunked_logits they are whole"),
    ],
)
def test_what_needs_other_processes_is_refused(more, message, home, tmp_path, capsys):
    assert distil("--out", tmp_path / "out", *options(home), *more) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tensor-parallel=2", "--student=STUDENT"], "are not those of a linear head"),
        (["--fsdp", "--optimizer=sgd"], "PyTorch cannot load what is empty"),
    ],
)
def test_what_several_processes_cannot_is_refused(more, message, home, tmp_path, nursery):
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    own_scale = transformers.LlamaConfig(vocab_size=416, logit_scale=2.0, **shape)
    transformers.LlamaForCausalLM(own_scale).save_pretrained(tmp_path / "STUDENT")  # not its head's
    more = [each.replace("STUDENT", str(tmp_path / "STUDENT")) for each in more]
    command = ["distill", "--out", tmp_path / "out", *options(home), *more]
    codes = nursery.run(command, tmp_path / "said", world=2)
    assert 2 in codes
    assert message in said(tmp_path / "said")[0]
