"""A temperature that a Trainer's loss learns: its gradient, its checkpoints, its processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
transformers = pytest.importorskip("transformers")

from fastkd.integrations.transformers import (  # noqa: E402
    DistillationTrainer,
    distillation_loss_func,
)
from fastkd.temperature import LearnableTemperature  # noqa: E402
from tests import test_integrations_transformers as plain  # noqa: E402

ALPHA, FIRST = 0.7, 2.0


def a_parameter():
    """A temperature that descends the loss, and the loss that learns it."""
    learnt = torch.nn.Parameter(torch.tensor(FIRST))
    return learnt, {"temperature": learnt, "alpha": ALPHA}


def a_module():
    """The logit of one that ascends it."""
    module = LearnableTemperature(initial=FIRST)
    return module.theta, lambda step, steps: {"temperature": module(step), "alpha": ALPHA}


def of_the_formula(kind):
    """The gradient of Hinton's loss to what is learnt, in fp64, over all places that count."""
    learnt = torch.tensor(FIRST, dtype=torch.float64, requires_grad=True)
    temperature = learnt
    if kind is a_module:
        learnt = torch.tensor((FIRST - 1) / (21 - FIRST)).double().log().requires_grad_()
        temperature = 1 + 20 * torch.sigmoid(learnt)
    ids, labels = plain.stacked()
    counts = labels[:, 1:] != -100
    with torch.no_grad():
        z, y = (
            model.double()(input_ids=ids).logits[:, :-1][counts] / 1.0
            for model in (plain.llama(0), plain.llama(1, width=32))
        )
    lq, lp = F.log_softmax(z / temperature, -1), F.log_softmax(y / temperature, -1)
    loss = ALPHA * temperature**2 * (lp.exp() * (lp - lq)).sum(-1).mean()
    (found,) = torch.autograd.grad(loss, learnt)
    return -found if kind is a_module else found


def trainer_of(folder, loss, heads=True, student=None, optimizers=(None, None), **options):
    return DistillationTrainer(
        model=student or plain.llama(0), teacher=plain.llama(1, width=32), loss=loss, heads=heads,
        args=plain.arguments(folder, **options), train_dataset=plain.sequences(),
        optimizers=optimizers,
    )  # fmt: skip


@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("batches", [1, 4])
@pytest.mark.parametrize("kind", [a_parameter, a_module])
def test_a_temperature_is_trained_by_its_gradient(kind, batches, heads, tmp_path):
    learnt, loss = kind()
    before = learnt.item()
    trainer_of(
        tmp_path, loss, heads, weight_decay=0.5,
        per_device_train_batch_size=8 // batches, gradient_accumulation_steps=batches,
    ).train()  # fmt: skip
    assert before - learnt.item() == pytest.approx(of_the_formula(kind).item(), rel=1e-4)


class Gradients(transformers.TrainerCallback):
    """Those that the optimizer sees."""

    def __init__(self, learnt):
        self.learnt, self.seen = learnt, []

    def on_pre_optimizer_step(self, *arguments, **others):
        self.seen.append(self.learnt.grad.item())


@pytest.mark.parametrize("whose", ["the Trainer's", "the user's"])
def test_each_step_has_a_gradient_of_its_own(whose, tmp_path):
    learnt, loss = a_parameter()
    student, optimizer = plain.llama(0), None
    if whose == "the user's":
        optimizer = torch.optim.SGD([*student.parameters(), learnt], lr=0.0)
    trainer = trainer_of(
        tmp_path, loss, student=student, optimizers=(optimizer, None), learning_rate=0.0,
        max_steps=3,
    )  # fmt: skip
    trainer.add_callback(gradients := Gradients(learnt))
    trainer.train()
    assert gradients.seen == pytest.approx([of_the_formula(a_parameter).item()] * 3, rel=1e-4)


@pytest.mark.parametrize("kind", [a_parameter, a_module])
def test_a_run_goes_on_to_the_bit(kind, tmp_path):
    options = {
        "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch",
        "learning_rate": 0.1, "per_device_train_batch_size": 4,
    }  # fmt: skip
    whole, loss = kind()
    trainer = trainer_of(tmp_path, loss, **options)
    trainer.train()
    again, loss = kind()
    resumed = trainer_of(tmp_path / "again", loss, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(whole, again)
    assert whole.item() != pytest.approx(kind()[0].item(), abs=0.01)
    for one, other in zip(trainer.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)

    with pytest.raises(ValueError, match=r"has 1 tensors that a loss learnt, and this .* learns 0"):
        trainer_of(tmp_path / "none", {}, **options).train(str(tmp_path / "checkpoint-2"))
    (tmp_path / "checkpoint-2" / "loss.pt").unlink()
    with pytest.raises(ValueError, match=r"has 0 tensors that a loss learnt, and this .* learns 1"):
        resumed.train(str(tmp_path / "checkpoint-2"))


def test_a_new_student_begins_with_the_first_temperature(tmp_path):
    learnt, loss = a_parameter()
    trainer = DistillationTrainer(
        model_init=lambda: plain.llama(0), teacher=plain.llama(1, width=32), loss=loss,
        args=plain.arguments(tmp_path, max_steps=2), train_dataset=plain.sequences(),
    )  # fmt: skip
    ends = []
    for _ in range(2):
        trainer.train()
        ends.append(learnt.item())
    assert ends[0] == ends[1] != FIRST


def test_a_parameter_of_the_student_is_trained_once(tmp_path):
    """By DistillationTrainer and by a function for any Trainer, which takes no other."""
    student = plain.llama(0)
    student.warmth = torch.nn.Parameter(torch.tensor(FIRST))
    trainer_of(tmp_path, {"temperature": student.warmth, "alpha": ALPHA}, student=student).train()
    wanted = pytest.approx(of_the_formula(a_parameter).item(), rel=1e-4)
    assert FIRST - student.warmth.item() == wanted
    if "function" in plain.VARIANTS:
        distillation_loss_func(student, plain.llama(1), temperature=student.warmth)
        with pytest.raises(ValueError, match="make it one of the student's"):
            distillation_loss_func(plain.llama(0), plain.llama(1), temperature=student.warmth)


def late(step, steps):
    return {"temperature": torch.tensor(FIRST, requires_grad=True) if step else FIRST}


def of_another(folder):
    _, loss = a_parameter()
    student = plain.llama(0)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    return trainer_of(folder, loss, student=student, optimizers=(optimizer, None))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: trainer_of(f, {"temperature": a_parameter()[0].exp()}), "temperature was comp"),
        (lambda f: trainer_of(f, {"temperature": -1.0}), "temperature must be finite and > 0"),
        (lambda f: trainer_of(f, late, max_steps=2), "the loss of step 1 learns a tensor"),
        (of_another, "in no group of the optimizer which you gave"),
    ],
)
def test_what_could_not_be_trained_is_refused(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(tmp_path).train()


def test_the_optimizer_of_fsdp_has_no_place_for_it(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, a_parameter()[1])
    monkeypatch.setattr(trainer, "_fsdp_version", lambda: 2)
    with pytest.raises(NotImplementedError, match="pass a number, or train by DDP"):
        trainer.train()


@pytest.mark.slow
def test_two_processes_learn_one_temperature(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run(
        [*launch, "-m", "tests.test_integrations_learnt", str(tmp_path)],
        cwd=plain.ROOT, env=dict(os.environ, OMP_NUM_THREADS="1"), capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert found[0] == found[1]
    assert FIRST - found[0][0] == pytest.approx(of_the_formula(a_parameter).item(), rel=1e-4)


def two_processes(folder):
    """What torchrun runs: the temperature after a step and after three, from unlike first ones."""
    rank, ends = int(os.environ["RANK"]), []
    for steps in (1, 3):
        learnt, loss = a_parameter()
        learnt.data += rank
        trainer_of(
            folder, loss, max_steps=steps, per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
        ).train()  # fmt: skip
        ends.append(learnt.item())
    torch.save(ends, Path(folder) / f"{rank}.pt")


if __name__ == "__main__":
    two_processes(sys.argv[1])
