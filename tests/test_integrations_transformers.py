"""The losses inside transformers' Trainer: one gradient, whatever the batches and processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
transformers = pytest.importorskip("transformers")

import fastkd  # noqa: E402
import fastkd.integrations  # noqa: E402
from fastkd.integrations.models import is_causal, targets  # noqa: E402
from fastkd.integrations.transformers import (  # noqa: E402
    DistillationTrainer,
    distillation_loss_func,
)
from tests import environments  # noqa: E402
from tests.closeness import assert_close  # noqa: E402

ROOT = Path(__file__).parents[1]
VOCABULARY, LENGTH, TEMPERATURE, ALPHA = 48, 10, 2.0, 0.7
SETTINGS = {"temperature": TEMPERATURE, "alpha": ALPHA}
FIGURES = ("kd", "ce", "student_entropy", "teacher_entropy", "agreement")
VARIANTS = ["trainer", "function"]
if fastkd.integrations.numbers(transformers.__version__) < (5, 6):
    VARIANTS.remove("function")


def llama(seed, width=16):
    torch.manual_seed(seed)
    shape = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=1, num_attention_heads=2, initializer_range=0.3,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(shape)


STUDENT = llama(0)


def sequences():
    """Eight, of which 9, 8, 7, ... places count."""
    ids = torch.randint(VOCABULARY, (8, LENGTH), generator=torch.Generator().manual_seed(5))
    masked = torch.arange(LENGTH) < torch.tensor([0, 1, 2, 3, 4, 5, 6, 8])[:, None]
    labels = torch.where(masked, -100, ids)
    return [{"input_ids": i, "labels": label} for i, label in zip(ids, labels, strict=True)]


def stacked():
    """The tokens and the labels of all, [8, LENGTH]."""
    rows = sequences()
    return torch.stack([r["input_ids"] for r in rows]), torch.stack([r["labels"] for r in rows])


def arguments(folder, **others):
    """One step of gradient descent at rate 1: the weights change by the gradient."""
    chosen = {
        "max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0, "use_cpu": True, "report_to": "none", "disable_tqdm": True,
        "save_strategy": "no", "logging_steps": 1, "per_device_train_batch_size": 8, **others,
    }  # fmt: skip
    return transformers.TrainingArguments(str(folder), **chosen)


def trainer_of(variant, folder, student=None, teacher=None, rows=None, loss=SETTINGS, **options):
    student, teacher = student or llama(0), teacher or llama(1, width=32)
    common = {"args": arguments(folder, **options), "train_dataset": rows or sequences()}
    if variant == "trainer":
        return DistillationTrainer(model=student, teacher=teacher, loss=loss, **common)
    for row in common["train_dataset"]:
        row["labels"][0] = -100  # predicted by no place, but counted by older Trainers
    function = distillation_loss_func(student, teacher, **loss)
    return transformers.Trainer(student, compute_loss_func=function, **common)


def gradient(trainer):
    """By the names of the weights."""
    before = {name: w.detach().clone() for name, w in trainer.model.named_parameters()}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    return {name: before[name] - after[name].detach() for name in before}


def formula():
    """Figures and gradient by the formula of Hinton's loss, in fp64, over all places that count."""
    student, teacher = llama(0).double(), llama(1, width=32).double()
    ids, labels = stacked()
    kept, wanted = labels[:, 1:] != -100, labels[:, 1:]
    z = student(input_ids=ids).logits[:, :-1][kept]
    with torch.no_grad():
        y = teacher(input_ids=ids).logits[:, :-1][kept]
    lq, lp = (F.log_softmax(x / TEMPERATURE, -1) for x in (z, y))
    figures = {
        "kd": (lp.exp() * (lp - lq)).sum(-1),
        "ce": F.cross_entropy(z, wanted[kept], reduction="none"),
        "student_entropy": -(lq.exp() * lq).sum(-1),
        "teacher_entropy": -(lp.exp() * lp).sum(-1),
        "agreement": (z.argmax(-1) == y.argmax(-1)).double(),
    }
    means = {name: values.mean() for name, values in figures.items()}
    means["loss"] = ALPHA * TEMPERATURE**2 * means["kd"] + (1 - ALPHA) * means["ce"]
    means["loss"].backward()
    weights = {name: weight.grad for name, weight in student.named_parameters()}
    return {name: mean.item() for name, mean in means.items()}, weights


def check_gradient(found, truth):
    assert found.keys() == truth.keys()
    for name, value in found.items():
        assert_close(value, truth[name], "gradient")


def logged(trainer):
    (row,) = (row for row in trainer.state.log_history if "loss" in row)
    return row


@pytest.fixture(scope="module")
def truth():
    return formula()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_accumulation_changes_nothing(variant, accumulation, truth, tmp_path):
    options = {
        "per_device_train_batch_size": 8 // accumulation,
        "gradient_accumulation_steps": accumulation,
    }
    trainer = trainer_of(variant, tmp_path, **options)
    check_gradient(gradient(trainer), truth[1])
    assert logged(trainer)["loss"] == pytest.approx(truth[0]["loss"], rel=1e-4)


@pytest.mark.slow
def test_two_processes_change_nothing(truth, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run(
        [*launch, "-m", "tests.test_integrations_transformers", str(tmp_path)],
        cwd=ROOT, env=dict(os.environ, OMP_NUM_THREADS="1"), capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "found.pt")
    assert found.keys() == {(v, a) for v in VARIANTS for a in (1, 2, 4)}
    for (variant, _), (gradients, row) in found.items():
        check_gradient(gradients, truth[1])
        names = ("loss", *FIGURES) if variant == "trainer" else ("loss",)
        for name in names:
            assert row[name] == pytest.approx(truth[0][name], rel=1e-4), name


def two_processes(folder):
    """What torchrun runs: the gradients of each variant and accumulation, by the first process."""
    found = {}
    for variant in VARIANTS:
        for accumulation in (1, 2, 4):
            trainer = trainer_of(
                variant, folder, per_device_train_batch_size=4 // accumulation,
                gradient_accumulation_steps=accumulation,
            )  # fmt: skip
            found[variant, accumulation] = (gradient(trainer), logged(trainer))
            assert trainer.accelerator.num_processes == 2
    if trainer.is_world_process_zero():
        torch.save(found, Path(folder) / "found.pt")


def test_the_log_holds_the_parts_of_its_step(truth, tmp_path):
    trainer = trainer_of(
        "trainer", tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    trainer.train()
    row = logged(trainer)
    for name in ("loss", *FIGURES):
        assert row[name] == pytest.approx(truth[0][name], rel=1e-4), name


class Predicting(transformers.TrainerCallback):
    """After each step, before it is logged."""

    def on_step_end(self, *arguments, **others):
        self.trainer.predict(sequences()[:3])


def test_predictions_between_steps_leave_the_log_alone(truth, tmp_path):
    trainer = trainer_of("trainer", tmp_path)
    trainer.add_callback(callback := Predicting())
    callback.trainer = trainer
    trainer.train()
    assert logged(trainer)["loss"] == pytest.approx(truth[0]["loss"], rel=1e-4)


def test_evaluation_is_exact_over_uneven_batches_and_several_sets(truth, tmp_path):
    rows = sequences()
    trainer = trainer_of("trainer", tmp_path, per_device_eval_batch_size=3)
    found = trainer.evaluate({"all": rows, "some": rows[:3]})
    assert found["eval_all_validation_loss"] == pytest.approx(truth[0]["ce"], rel=1e-5)
    assert found["eval_all_agreement"] == pytest.approx(truth[0]["agreement"], rel=1e-5)
    assert found["eval_some_kl_to_teacher"] != pytest.approx(found["eval_all_kl_to_teacher"])


def test_predictions_are_the_logits_of_the_student(tmp_path):
    trainer = trainer_of("trainer", tmp_path)
    found = trainer.predict(sequences()).predictions
    ids, _ = stacked()
    with torch.no_grad():
        wanted = trainer.model(input_ids=ids).logits
    assert_close(torch.tensor(found), wanted)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_schedule_and_checkpointing(variant, truth, tmp_path):
    """Checkpointing changes nothing; a schedule sees the step of the run."""
    seen = []

    def schedule(step, steps):
        seen.append((step, steps))
        return SETTINGS

    loss = schedule if variant == "trainer" else SETTINGS
    trainer = trainer_of(variant, tmp_path, loss=loss)
    old, new = "gradient_checkpointing_enable", "activation_checkpointing_enable"
    student = trainer.model
    getattr(student, new if hasattr(student, new) else old)()
    check_gradient(gradient(trainer), truth[1])
    assert set(seen) == ({(0, 1)} if variant == "trainer" else set())


@pytest.mark.parametrize("variant", VARIANTS)
def test_bf16_is_near(variant, truth, tmp_path):
    found = gradient(trainer_of(variant, tmp_path, bf16=True))
    for name, weights in truth[1].items():
        error = (found[name].double() - weights).norm() / weights.norm()
        assert error < 0.1, name  # zeros are off by 1, a factor of 2 by as much


@pytest.mark.parametrize("heads", [True, False])
def test_the_gradient_may_wait_for_the_backward(heads, truth, tmp_path):
    """Though a Trainer may write over the student's logits otherwise."""
    trainer = DistillationTrainer(
        model=llama(0), teacher=llama(1, width=32), loss={**SETTINGS, "gradient": "backward"},
        heads=heads, args=arguments(tmp_path), train_dataset=sequences(),
    )  # fmt: skip
    check_gradient(gradient(trainer), truth[1])


def test_a_student_in_float16_is_trained(truth, tmp_path):
    """Not in place, where its gradient would be rounded too early."""
    found = gradient(trainer_of("trainer", tmp_path, llama(0).half()))
    for name, weights in truth[1].items():
        assert (found[name].double() - weights).norm() < 0.1 * weights.norm(), name


@pytest.mark.full
def test_a_compiled_student_gets_the_same_gradient(truth, tmp_path):
    check_gradient(gradient(trainer_of("trainer", tmp_path, torch_compile=True)), truth[1])


def test_a_classifier_is_not_shifted(tmp_path):
    shape = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_labels=5, initializer_range=0.3,
    )  # fmt: skip
    student, teacher = (transformers.BertForSequenceClassification(shape) for _ in range(2))
    rows = [{"input_ids": r["input_ids"], "labels": i % 5} for i, r in enumerate(sequences())]
    student.eval(), teacher.eval()
    ids = torch.stack([row["input_ids"] for row in rows])
    with torch.no_grad():
        lq, lp = (F.log_softmax(m(input_ids=ids).logits.double(), -1) for m in (student, teacher))
    trainer = trainer_of("trainer", tmp_path, student, teacher, rows, {})
    inputs = {"input_ids": ids, "labels": torch.tensor([row["labels"] for row in rows])}
    items = trainer._get_num_items_in_batch([inputs], torch.device("cpu"))
    assert items == 8
    loss = trainer.compute_loss(student, inputs, num_items_in_batch=items)
    assert_close(loss, (lp.exp() * (lp - lq)).sum(-1).mean())


TINY = {
    "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "vocab_size": 40, "n_embd": 8, "n_layer": 1, "n_head": 2, "d_model": 8, "is_decoder": True,
    "word_embed_proj_dim": 8, "ffn_dim": 8, "num_key_value_heads": 1, "head_dim": 4,
    "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 8,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "GPT2", "OpenAIGPT", "Bert", "Llama", "OPT", "Gemma3Text", "Mamba", "GPTNeoX", "Bloom",
        "XLNet", "Bart",
    ],
)  # fmt: skip
def test_places_predict_what_they_do_in_the_models_own_loss(name):
    """Of every class for causal language models, whatever it is called."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")
    model = transformers.AutoModelForCausalLM.from_config(config(**TINY)).eval()
    ids = torch.randint(2, 40, (2, 9))
    labels = ids.clone()
    labels[1, :3] = -100
    outputs = model(input_ids=ids, labels=labels)
    ours = targets({"labels": labels}, is_causal(model))
    loss = F.cross_entropy(outputs.logits.flatten(0, 1), ours.flatten())
    torch.testing.assert_close(loss, outputs.loss, rtol=1e-5, atol=0)


def test_models_of_images_and_text_are_causal_and_encoders_are_not():
    small = {"hidden_size": 8, "num_hidden_layers": 0, "num_attention_heads": 1}
    vision = transformers.CLIPVisionConfig(**small)
    text = transformers.LlamaConfig(**small)
    with torch.device("meta"):
        shape = transformers.LlavaConfig(vision_config=vision, text_config=text)
        assert is_causal(transformers.LlavaForConditionalGeneration(shape))
        t5 = transformers.T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8)
        assert not is_causal(transformers.T5ForConditionalGeneration(t5))
        assert not is_causal(transformers.BertForMaskedLM(transformers.BertConfig(**small)))


def test_shift_labels_of_a_collator_are_taken_as_they_are(tmp_path):
    trainer = trainer_of("trainer", tmp_path)
    inputs = dict(zip(("input_ids", "labels"), stacked(), strict=True))
    shifted = F.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    wanted = trainer.compute_loss(trainer.model, inputs)
    assert_close(trainer.compute_loss(trainer.model, inputs | {"shift_labels": shifted}), wanted)


def test_a_student_of_peft_learns_from_itself_with_the_adapters_off(tmp_path):
    peft = pytest.importorskip("peft")
    student = peft.get_peft_model(
        llama(0), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2)
    )
    with torch.no_grad():
        for name, weight in student.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=2.0)
    base, (ids, labels) = llama(0), stacked()
    trainer = DistillationTrainer(
        model=student, teacher=None, args=arguments(tmp_path), train_dataset=sequences()
    )
    kept = labels[:, 1:] != -100
    with torch.no_grad():
        lq, lp = (
            F.log_softmax(m(input_ids=ids).logits[:, :-1][kept].double(), -1)
            for m in (student, base)
        )
    loss = trainer.compute_loss(student, {"input_ids": ids, "labels": labels})
    assert_close(loss, (lp.exp() * (lp - lq)).sum(-1).mean())
    found = gradient(trainer)
    assert any(change.any() for name, change in found.items() if "lora" in name)
    assert not any(change.any() for name, change in found.items() if "lora" not in name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compute_loss_func": len}, "drop compute_loss_func"),
        ({"compute_metrics": len}, "calls no compute_metrics"),
        ({"teacher": None}, "this student has none"),
        ({"teacher": "owner/name"}, "teacher must be a model or a TeacherCache, got str: load it"),
        ({"teacher": STUDENT}, "teacher and student are one model"),
        ({"teacher": torch.nn.Sequential(STUDENT.lm_head)}, "has weights that the student trains"),
        ({"teacher": []}, "teacher must be a model, or a list of some"),
        ({"teacher_weights": 2.0}, "teacher_weights must be a list, got float"),
        ({"teacher_weights": torch.ones(1)}, "teacher_weights must be a number, got Tensor"),
        ({"loss": {"temprature": 2.0}}, "distillation_loss takes no 'temprature'"),
        ({"loss": {"num_items": 7}}, "num_items is the Trainer's to give: leave it out"),
        ({"loss": {"reduction": "sum"}}, "reduction is the Trainer's to give"),
        ({"loss": {"return_metrics": False}}, "return_metrics is the Trainer's to give"),
        ({"loss": {"ignore_index": 0}}, "ignore_index is the Trainer's to give"),
        ({"loss": {"vocab_size": 40}}, "vocab_size is an argument of DistillationTrainer"),
        ({"loss": fastkd.DistillationLoss()}, "got DistillationLoss: pass its `settings`"),
        ({"loss": ["jsd"]}, "must be a dictionary of arguments.*got list"),
        ({"on_policy": 0.5}, r"on_policy must be an OnPolicy, got float: pass OnPolicy\(share"),
        ({"temperature": 2.0}, r"pass loss=\{'temperature': ...\}"),
    ],
)
def test_what_has_no_meaning_is_refused(change, message, tmp_path):
    options = {"model": STUDENT, "teacher": llama(1), "args": arguments(tmp_path)} | change
    with pytest.raises((TypeError, ValueError), match=message):
        DistillationTrainer(**options)


@pytest.mark.skipif("function" not in VARIANTS, reason="before transformers 5.6")
@pytest.mark.parametrize(
    ("teacher", "settings", "message"),
    [
        (STUDENT, {}, "teacher and student are one model"),
        (None, {}, "teacher must be a model, got NoneType"),
        (llama(1), {"T": 2.0}, "distillation_loss takes no 'T'"),
    ],
)
def test_a_function_without_meaning_is_refused_before_it_trains(teacher, settings, message):
    with pytest.raises((TypeError, ValueError), match=message):
        distillation_loss_func(STUDENT, teacher, **settings)


def test_what_a_function_of_the_step_returns_is_checked(tmp_path):
    trainer = trainer_of("trainer", tmp_path, loss=lambda step, steps: {"T": 2.0})
    with pytest.raises(ValueError, match="distillation_loss takes no 'T'"):
        trainer.train()


def test_the_trainers_own_name_finds_the_best_model(tmp_path):
    """By load_best_model_at_end alone, which looks for `eval_loss`; and with an early end."""
    chosen = arguments(
        tmp_path, max_steps=9, learning_rate=3.0, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True, save_total_limit=1,
    )  # fmt: skip
    trainer = DistillationTrainer(
        model=llama(0), teacher=llama(1), args=chosen, train_dataset=sequences(),
        eval_dataset=sequences(), callbacks=[transformers.EarlyStoppingCallback(2)],
    )  # fmt: skip
    trainer.train()
    losses = [
        row["eval_validation_loss"] for row in trainer.state.log_history if "eval_agreement" in row
    ]
    best = losses.index(min(losses))
    assert len(losses) == best + 3 < 9
    assert trainer.state.best_global_step == best + 1
    found = trainer.evaluate()
    assert found["eval_loss"] == found["eval_validation_loss"] == pytest.approx(losses[best])


@pytest.mark.parametrize("rows", [[], [{**sequences()[0], "labels": torch.full((10,), -100)}]])
def test_nothing_to_evaluate_on_is_refused(rows, tmp_path):
    with pytest.raises(ValueError, match="there is nothing to evaluate on"):
        trainer_of("trainer", tmp_path).evaluate(rows)


def test_a_batch_without_labels_is_refused(tmp_path):
    trainer = trainer_of("trainer", tmp_path)
    with pytest.raises(ValueError, match="the batch has no labels"):
        trainer.compute_loss(trainer.model, {"input_ids": sequences()[0]["input_ids"][None]})


@pytest.mark.skipif("function" not in VARIANTS, reason="before transformers 5.6")
def test_a_function_of_another_student_is_refused(tmp_path):
    loss = distillation_loss_func(llama(0), llama(1))
    with pytest.raises(ValueError, match="give it the model that the Trainer trains"):
        loss(None, torch.zeros(1, 2).long())


# --- versions --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ("5.1.9", r"takes transformers from 5\.2 up to, but not with, 6; this is 5\.1\.9: pip "),
        ("6.0.0.dev0", "this is 6.0.0.dev0"),
        (None, r'needs transformers, which is not installed: pip install "fastkd\[distill\]"'),
    ],
)
def test_absent_and_unsupported_packages_are_refused(found, message, monkeypatch):
    def version(package):
        if found is None:
            raise fastkd.integrations.PackageNotFoundError(package)
        return found

    monkeypatch.setattr(fastkd.integrations, "version", version)
    with pytest.raises(ImportError, match=message) as refused:
        fastkd.integrations.require("transformers", "5.2", "6", extra="distill")
    assert "\n" not in str(refused.value)


@pytest.mark.skipif("function" in VARIANTS, reason="since transformers 5.6")
def test_a_function_is_refused_where_the_trainer_would_divide_again():
    with pytest.raises(ImportError, match=r"transformers from 5\.6 up to"):
        distillation_loss_func(llama(0), llama(1))


@pytest.mark.full
@pytest.mark.parametrize("version", ["5.2.0", "5.24.0"])
def test_the_oldest_and_the_newest_transformers(version, tmp_path):
    python = environments.with_others(tmp_path, f"transformers=={version}")
    code = "import transformers; print(transformers.__version__)"
    used = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    assert used.stdout.split() == [version]
    here = Path(__file__)
    files = [here, *(here.with_name(f"test_integrations_{of}.py") for of in ("models", "learnt"))]
    done = subprocess.run(
        [python, "-m", "pytest", "-p", "no:cacheprovider", *files], cwd=ROOT,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


if __name__ == "__main__":
    two_processes(sys.argv[1])
