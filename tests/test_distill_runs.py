"""Runs of `fastkd distill --teacher` that go wrong, stop, and go on; and every option, trained."""

import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from fastkd.distill import storage
from tests.test_distill_user_models import (
    ROOT,
    TEXT,
    distil,
    losses,
    options,
    stopped_after,
    tokenizer,
    transformers,
    weights,
)
from tests.test_distill_user_models import _one_thread as _one_thread
from tests.test_distill_user_models import finished as finished
from tests.test_distill_user_models import home as home

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def last_line(capsys):
    return capsys.readouterr().err.splitlines()[-1]


def figures(folder):
    return json.loads(
        (folder / "metrics.json").read_text(), parse_constant=lambda name: pytest.fail(name)
    )


# --- models ----------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["teacher", "student"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "one layer more",
            "lack model.layers.1.input_layernorm.weight, .* and 6 more, which would",
        ),
        ("no head", r"lack lm_head.weight, which would be random"),
        ("a weight more", r"hold model.extra.weight, which its config has no use for"),
    ],
)
def test_a_model_with_missing_or_surplus_weights_is_refused(
    home, tmp_path, capsys, which, change, message
):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(home / which, tmp_path / "changed")
    held = load_file(folder / "model.safetensors")
    if change == "one layer more":
        shape = json.loads((folder / "config.json").read_text())
        shape["num_hidden_layers"] += 1
        (folder / "config.json").write_text(json.dumps(shape))
    elif change == "no head":
        del held["lm_head.weight"]
    else:
        held["model.extra.weight"] = torch.zeros(2)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    assert distil("--out", tmp_path / "out", *options(home, **{which: folder})) == 1
    said = last_line(capsys)
    assert f"the weights of {folder} " in said
    assert re.search(message, said), said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("which", ["teacher", "student", "config.json", "cache"])
def test_an_encoder_is_refused(home, tmp_path, capsys, which):
    """Those of BERT's kind load as causal language models, and would copy what they see."""
    from fastkd.__main__ import main

    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = transformers.BertConfig(vocab_size=448, max_position_embeddings=64, **shape)
    folder = tmp_path / "encoder"
    transformers.BertLMHeadModel(encoder).save_pretrained(folder)
    if which == "cache":
        shutil.copy(home / "teacher" / "tokenizer.json", folder)
        shutil.copy(home / "teacher" / "tokenizer_config.json", folder)
        chosen = {"teacher": folder, "data": home / "text.txt", "out": tmp_path / "out"}
        more = ("--sequence-length=16", "--device=cpu")
        assert main(["cache", *(f"--{name}={value}" for name, value in chosen.items()), *more]) == 1
    else:
        changed = {"student": folder / which} if which == "config.json" else {which: folder}
        assert distil("--out", tmp_path / "out", *options(home, **changed)) == 1
    assert f"{folder}" in (said := last_line(capsys))
    assert "looks at the tokens that it is to predict" in said
    assert not (tmp_path / "out").exists()


def test_a_mistyped_path_is_refused_at_once_with_what_may_be_meant(
    home, tmp_path, capsys, monkeypatch
):
    """Without waiting for the hub where no hub could know the name, and briefly where one could."""
    monkeypatch.chdir(home)
    began = time.monotonic()
    assert distil("--out", tmp_path / "out", *options(home, teacher="techer")) == 1
    assert "neither a folder here nor a tokenizer of the hub" in (said := last_line(capsys))
    assert "did you mean teacher?" in said
    assert distil("--out", tmp_path / "out", *options(home, student="a/b/studnt")) == 2
    assert "there is no such folder or file" in last_line(capsys)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(("wanted", "dtype"), [("auto", torch.bfloat16), ("fp32", torch.float32)])
def test_a_student_is_saved_in_the_precision_that_it_came_in(home, tmp_path, wanted, dtype):
    student = transformers.AutoModelForCausalLM.from_pretrained(home / "student")
    student.to(torch.bfloat16).save_pretrained(tmp_path / "student")
    chosen = options(home, student=tmp_path / "student", steps=2, save_precision=wanted)
    assert distil("--out", tmp_path / "out", *chosen) == 0
    assert {weight.dtype for weight in weights(tmp_path / "out").values()} == {dtype}


# --- divergence ------------------------------------------------------------------------------


def test_a_run_that_diverges_ends_with_its_last_good_student(home, tmp_path, capsys, monkeypatch):
    """At step 5, after a save at step 4: that one stays, and nothing else is left behind."""
    from fastkd.distill import watch

    def step(self, args, state, control, model=None, **others):
        if state.global_step == 5:
            self.trainer.step_figures[4][0] = float("nan")
        real(self, args, state, control, model=model, **others)

    real, out = watch.Watch.on_step_end, tmp_path / "out"
    monkeypatch.setattr(watch.Watch, "on_step_end", step)
    assert distil("--out", out, *options(home, save_every=2)) == 1
    said = last_line(capsys)
    assert "the loss is nan at step 5: lower --learning-rate" in said
    assert f"{out}/checkpoint-4 has the student before that" in said
    kept = transformers.AutoModelForCausalLM.from_pretrained(out / "checkpoint-4")
    assert all(weight.isfinite().all() for weight in kept.parameters())
    assert not (out / "student").exists()
    assert not (out / "metrics.json").exists()


def test_weights_that_are_not_finite_are_not_saved(home, tmp_path, capsys, monkeypatch):
    """The loss before the step was finite; the step took a weight to infinity."""
    from fastkd.distill import watch

    def step(self, args, state, control, model=None, **others):
        if state.global_step == 4:
            model.lm_head.weight.data[3, 3] = float("inf")
        real(self, args, state, control, model=model, **others)

    real, out = watch.Watch.on_step_end, tmp_path / "out"
    monkeypatch.setattr(watch.Watch, "on_step_end", step)
    assert distil("--out", out, *options(home, save_every=2)) == 1
    said = last_line(capsys)
    assert "the weights are not finite at step 4: lower --learning-rate" in said
    assert f"{out}/checkpoint-2 has the student before that" in said
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (out / "student").exists()


@pytest.mark.parametrize("optimizer", ["adamw_torch", "sgd"])
def test_a_rate_beyond_all_numbers_is_one_line(home, tmp_path, capsys, monkeypatch, optimizer):
    from fastkd.distill import settings

    monkeypatch.setattr(settings, "check_ranges", lambda settings: None)
    chosen = options(home, learning_rate=1e38, lr_schedule="constant", optimizer=optimizer)
    assert distil("--out", tmp_path / "out", *chosen) == 1
    assert "lower --learning-rate" in last_line(capsys)


def test_a_student_that_is_not_finite_is_found_before_the_first_step(home, tmp_path, capsys):
    student = transformers.AutoModelForCausalLM.from_pretrained(home / "student")
    student.lm_head.weight.data[3] = float("nan")
    student.save_pretrained(tmp_path / "student")
    assert distil("--out", tmp_path / "out", *options(home, student=tmp_path / "student")) == 1
    assert "before the first step the loss on held-out text is nan" in last_line(capsys)


# --- stopping and going on -------------------------------------------------------------------


def launched(out, *arguments, **environment):
    command = [sys.executable, "-m", "fastkd", "distill", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ | environment
    )


def wait_for(path, process, pattern="*"):
    until = time.monotonic() + 300
    while not list(path.glob(pattern)):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.fixture(scope="module")
def sixty(home, tmp_path_factory):
    """The options of a run that saves every 10 steps, and its results."""
    chosen = options(home, steps=60, log_every=1, evaluate_every=25, save_every=10, epochs=9)
    whole = tmp_path_factory.mktemp("whole") / "out"
    assert distil("--out", whole, *chosen) == 0
    return chosen, whole


# Of SIGKILL see test_distill_kills.py too; that SIGHUP goes the way of SIGTERM,
# test_distill_trouble.py.
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(signal.SIGKILL, marks=pytest.mark.full),
        pytest.param(signal.SIGHUP, marks=pytest.mark.full),
        signal.SIGTERM,
    ],
)
def test_a_killed_run_goes_on_to_the_same_student(sixty, tmp_path, kind):
    """What was logged is there at once; what a save did not see is done again, to the bit."""
    (chosen, whole), out = sixty, tmp_path / "out"
    running = launched(out, "--out", out, *chosen)
    wait_for(out, running, "checkpoint-[12]0")
    time.sleep(random.Random(kind).random() / 10)
    running.send_signal(kind)
    running.communicate(timeout=300)
    assert running.returncode == (-9 if kind == signal.SIGKILL else 130)
    rows = (out / "metrics.csv").read_text().splitlines()
    assert len(rows) > 10  # of a run that had 10 steps at least
    assert rows[-1].split(",")[0].isdigit()
    assert distil("--resume", out) == 0
    assert (out / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    mine, theirs = weights(out), weights(whole)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_run_killed_in_its_last_save_is_saved_and_trained_no_further(
    finished, home, tmp_path, monkeypatch
):
    from fastkd.distill import user_models

    def killed(*_):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(user_models, "_replace", killed)
        assert distil("--out", out, *options(home)) == 130
    assert not (out / "student").exists()
    assert distil("--resume", out) == 0
    mine, theirs = weights(out), weights(finished)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert (out / "metrics.csv").read_bytes() == (finished / "metrics.csv").read_bytes()
    assert figures(out)["after"] == figures(finished)["after"]


def test_a_save_that_was_cut_off_in_its_last_file_is_none(tmp_path):
    for step, text in ((5, '{"global_step": 5}'), (10, '{"global_s'), (15, "")):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / storage.TRAINER_STATE).write_text(text)
    assert storage.last_checkpoint(tmp_path) == tmp_path / "checkpoint-5"
    assert storage.drop_halves(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


@pytest.fixture
def stopped(home, tmp_path):
    """The folder of a run that stopped at step 3, and its inputs, which may be changed."""
    inputs = shutil.copytree(home, tmp_path / "inputs")
    with stopped_after(3):
        assert distil("--out", tmp_path / "out", *options(inputs)) == 130
    return tmp_path / "out", inputs


def test_sequences_that_are_broken_are_made_again(stopped, capsys):
    out, _ = stopped
    tokens = out / "tokens"
    for name, content in (("data.json", "{"), ("training.arrow", "x"), ("training.arrow", None)):
        kept = (tokens / name).read_bytes()
        (tokens / name).unlink()
        if content is not None:
            (tokens / name).write_text(content)
        assert distil("--resume", out) == 1
        said = last_line(capsys)
        assert f"{tokens / name} is broken and cannot be read" in said
        assert f"delete {tokens}, which --resume makes again from the data" in said
        (tokens / name).write_bytes(kept)
    shutil.rmtree(tokens)
    assert distil("--resume", out) == 0


@pytest.mark.parametrize("changed", ["data", "teacher", "tokenizer", "student here"])
def test_a_run_goes_on_only_with_what_it_began_with(stopped, capsys, changed):
    out, inputs = stopped
    if changed == "data":
        (inputs / "text.txt").write_text(TEXT.replace("a", "o", 1))
        message = "the data or its tokenizer is another than when this run began"
    elif changed == "teacher":
        teacher = transformers.AutoModelForCausalLM.from_pretrained(inputs / "teacher")
        teacher.lm_head.weight.data[7, 3] += 0.5
        teacher.save_pretrained(inputs / "teacher")
        message = "the teacher is another than when this run began"
    elif changed == "tokenizer":
        for name in ("teacher", "student"):
            tokenizer(TEXT[::-1]).save_pretrained(inputs / name)
        message = "the data or its tokenizer is another than when this run began"
    else:
        (out / "student").mkdir()
        (out / "student" / "notes").write_text("the user's")
        message = "student is there, and not from this run: move it away"
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert distil("--resume", out) == 1
    assert message in last_line(capsys)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_full_disk_is_one_line_in_words(home, tmp_path):
    """The optimizer's state does not fit: PyTorch's words for it are none for a user."""
    import resource

    command = [sys.executable, "-m", "fastkd", "distill", f"--out={tmp_path}/out"]
    done = subprocess.run(
        [*command, *options(home, save_every=1)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )  # fmt: skip
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1]
    assert said.startswith(f"fastkd distill: cannot write a checkpoint to {tmp_path}/out: ")
    assert "enforce" not in said
    assert "Traceback" not in done.stderr


def test_torchrun_repeats_the_way_to_go_on(tmp_path, monkeypatch):
    from fastkd.distill import cli
    from fastkd.distill.errors import Interrupted

    def stopped(options):
        raise Interrupted("stopped; go on with: fastkd distill --resume out")

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setenv("RANK", "1")
    import argparse

    assert cli.run(stopped, argparse.Namespace(command="distill")) == 130
    assert "go on with: fastkd distill --resume out" in (tmp_path / "error.json").read_text()


# --- what is said ----------------------------------------------------------------------------


def test_a_run_says_what_it_does_before_it_takes_time(home, tmp_path, capsys):
    rows = [{"text": paragraph} for paragraph in TEXT.split("\n\n")] + [
        {"text": ""},
        {"text": None},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out"
    assert distil("--out", out, *options(home, data=tmp_path / "a.jsonl", threads=1)) == 0
    said = capsys.readouterr().err
    assert said.startswith(f"reading teacher {home}/teacher and student {home}/student\n")
    data = figures(out)["data"]
    assert data["documents"] == len(rows) - 2
    assert "2 rows without text left out" in said
    for part in ("held out", "documents, apart", "float32 on cpu", "6 steps", f"into {out}/"):
        assert part in said
    assert "step 0: held-out loss" in said
    assert "step 4: held-out loss" in said
    with open(out / "metrics.csv") as file:
        held = {int(row["step"]): row["validation_loss"] for row in csv.DictReader(file)}
    assert [step for step, value in held.items() if value] == [0, 4, 6]


# --- options ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat(home, tmp_path_factory):
    """Conversations over the tokenizer of the models, with a template."""
    folder = tmp_path_factory.mktemp("chat")
    words = 9 * TEXT.split()
    rows = [
        {
            "messages": [
                {"role": "user", "content": " ".join(words[7 * i : 7 * i + 2])},
                {"role": "assistant", "content": " ".join(words[7 * i + 2 : 7 * i + 7])},
            ]
        }
        for i in range(80)
    ]
    (folder / "train").mkdir()
    (folder / "train" / "a.jsonl").write_text("\n".join(map(json.dumps, rows[:40])))
    (folder / "train" / "b.jsonl").write_text("\n".join(map(json.dumps, rows[40:70])))
    (folder / "held-out.jsonl").write_text("\n".join(map(json.dumps, rows[70:])))
    (folder / "template.jinja").write_text(CHATML)
    return folder


@pytest.mark.parametrize("loss_on", ["completions", "all"])
def test_conversations_are_distilled_on_completions(home, chat, tmp_path, loss_on):
    """The figures on held-out text are those of the completions, counted by hand."""
    out = tmp_path / "out"
    chosen = options(
        home, data=chat / "train", eval_data=chat / "held-out.jsonl", loss_on=loss_on,
        chat_template=chat / "template.jinja", sequence_length=64, batch_size=2,
    )  # fmt: skip
    assert distil("--out", out, *chosen) == 0
    found = figures(out)
    assert found["data"]["documents"] == 80
    assert found["after"]["validation_loss"] < found["before"]["validation_loss"]
    student = transformers.AutoModelForCausalLM.from_pretrained(out / "student")
    tokens = transformers.AutoTokenizer.from_pretrained(out / "student")
    total, count = 0.0, 0
    for line in (chat / "held-out.jsonl").read_text().splitlines():
        messages = json.loads(line)["messages"]
        prompt = tokens.apply_chat_template(
            messages[:1], tokenize=False, add_generation_prompt=True
        )
        text = tokens.apply_chat_template(messages, tokenize=False)
        found_tokens = tokens(text, return_offsets_mapping=True)
        ids = torch.tensor(found_tokens["input_ids"])[:64]
        ends = torch.tensor([end for _, end in found_tokens["offset_mapping"]])[:64]
        with torch.no_grad():
            logits = student(input_ids=ids[None]).logits[0, :, :400]  # the rest is padding
        ce = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
        learnt = ends[1:] > (len(prompt) if loss_on == "completions" else 0)
        total, count = total + ce[learnt].sum().item(), count + int(learnt.sum())
    assert found["after"]["validation_loss"] == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize(
    "changed",
    [
        {"optimizer": "adafactor"},
        {"optimizer": "sgd"},
        {"weight_decay": 50.0},
        {"lr_schedule": "constant"},
        {"warmup": 4},
        {"lr_schedule": "reduce_lr_on_plateau"},
        {"clip": 1e-3, "optimizer": "sgd"},
    ],
    ids=str,
)
def test_options_of_the_optimizer_reach_it(finished, home, tmp_path, changed):
    """Each makes another student; the first loss is the same."""
    assert distil("--out", tmp_path / "out", *options(home, **changed)) == 0
    assert losses(tmp_path / "out")[0] == losses(finished)[0]
    mine, theirs = weights(tmp_path / "out"), weights(finished)
    assert not all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"optimizer": "adamm"}, "adamm"),
        ({"lr_schedule": "cosin"}, "cosin"),
        ({"loss_on": "completion"}, "did you mean 'completions'?"),
        ({"save_precision": "fp16"}, "save_precision 'fp16' is unknown"),
        ({"clip": -1}, "clip must lie in [0, 1000000], got -1.0"),
        ({"chat_template": "nope"}, "cannot read nope"),
    ],
)
def test_a_wrong_option_is_one_line(home, tmp_path, capsys, changed, message):
    assert distil("--out", tmp_path / "out", *options(home, **changed)) == 2
    assert message in last_line(capsys)
    assert not (tmp_path / "out").exists()


def test_the_best_student_is_kept_beside_the_last(home, tmp_path):
    """Where the rate is far too high at the end, the best is earlier."""
    out = tmp_path / "out"
    chosen = options(
        home, evaluate_every=2, learning_rate=0.5, lr_schedule="constant", save_every=3
    )  # fmt: skip
    assert distil("--out", out, *chosen) == 0
    with open(out / "metrics.csv") as file:
        held = {int(r["step"]): r["validation_loss"] for r in csv.DictReader(file)}
    held = {step: float(value) for step, value in held.items() if value and step}
    best = min(held, key=held.get)
    assert best < 6
    student = transformers.AutoModelForCausalLM.from_pretrained(out / "best")
    last = transformers.AutoModelForCausalLM.from_pretrained(out / "student")
    ids = tokenizer(TEXT)(TEXT[:200], return_tensors="pt").input_ids[:, :64]
    with torch.no_grad():
        good, bad = (model(input_ids=ids, labels=ids).loss for model in (student, last))
    assert good < bad
    assert transformers.AutoTokenizer.from_pretrained(out / "best")


def test_the_model_card_has_the_settings_and_what_came_of_them(finished):
    from huggingface_hub import ModelCard

    card = ModelCard.load(finished / "student" / "README.md")
    assert card.data.library_name == "transformers"
    assert 'temperature = "cosine:4,1"' in card.text
    after = figures(finished)["after"]
    assert f"| after | {after['validation_loss']:.4f} | {after['kl_to_teacher']:.4f}" in card.text
