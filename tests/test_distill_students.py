"""`fastkd distill` of students with adapters, of several teachers, and on policy: each trained."""

import json

import pytest
import torch

from fastkd import __main__
from tests.test_distill_user_models import (
    TEXT,
    distil,
    losses,
    model,
    options,
    stopped_after,
    tokenizer,
    transformers,
    weights,
)
from tests.test_distill_user_models import _one_thread as _one_thread
from tests.test_distill_user_models import home as home

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def figures(folder):
    return json.loads((folder / "metrics.json").read_text())


def improved(folder):
    before, after = (figures(folder)[when]["validation_loss"] for when in ("before", "after"))
    return after < before - 0.01


def last_line(capsys):
    return capsys.readouterr().err.splitlines()[-1]


# --- adapters --------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", ["teacher", "student"])
def test_adapters_are_trained_saved_and_resumed(home, tmp_path, monkeypatch, capsys, teacher):
    """By another teacher, and by the model itself, of which there is one copy then."""
    pytest.importorskip("peft")
    from fastkd.distill import job

    loaded, real = [], job.models.load
    monkeypatch.setattr(
        job.models, "load", lambda name, dtype: loaded.append(name) or real(name, dtype)
    )
    chosen = options(
        home, teacher=home / teacher, lora="4,8", alpha=0.5, steps=8, learning_rate=0.1
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert distil("--out", whole, *chosen) == 0
    assert len(loaded) == (1 if teacher == "student" else 2) + (whole / "best").exists()
    said = capsys.readouterr().err
    assert "of them trained" in said
    assert ("the student as it was for a teacher" in said) == (teacher == "student")
    assert improved(whole)
    student = whole / "student"
    assert not list(student.glob("model*.safetensors"))
    shape = json.loads((student / "adapter_config.json").read_text())
    assert (shape["r"], shape["lora_alpha"]) == (4, 8)
    assert shape["base_model_name_or_path"] == str(home / "student")
    adapted = transformers.AutoModelForCausalLM.from_pretrained(student)
    base = transformers.AutoModelForCausalLM.from_pretrained(home / "student")
    ids = torch.tensor([[5, 6, 7]])
    assert not torch.equal(adapted(ids).logits, base(ids).logits)
    assert (student / "tokenizer.json").exists()
    assert "lora = " in (student / "README.md").read_text()

    with stopped_after(3):
        assert distil("--out", cut, *chosen) == 130
    assert distil("--resume", cut) == 0
    for name, weight in adapters(whole).items():
        assert torch.equal(weight, adapters(cut)[name]), name
    assert (cut / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()


def adapters(folder):
    from safetensors.torch import load_file

    return load_file(folder / "student" / "adapter_model.safetensors")


@pytest.mark.parametrize("teacher", ["teacher", "student"])
def test_a_run_killed_while_adapters_are_saved_is_finished(home, tmp_path, monkeypatch, teacher):
    """The best, at an earlier step, is saved as adapters too; the teacher is still the same."""
    pytest.importorskip("peft")
    from fastkd.distill import user_models

    chosen = options(
        home, teacher=home / teacher, alpha=0.9, lora="4", steps=12, learning_rate=3.0,
        evaluate_every=2, save_every=2,
    )  # fmt: skip
    chosen.append("--checkpointing")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert distil("--out", whole, *chosen) == 0
    if teacher == "teacher":
        assert (whole / "best" / "adapter_model.safetensors").exists()

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(user_models, "_save", killed)
        assert distil("--out", cut, *chosen) == 130
    assert distil("--resume", cut) == 0
    for name, weight in adapters(whole).items():
        assert torch.equal(weight, adapters(cut)[name]), name


def test_masked_chats_into_adapters_from_a_cache(home, tmp_path):
    """The commands of docs/distilling.md: cache, distill, and then its student answers."""
    pytest.importorskip("peft")
    model(tmp_path / "big", chatty(), width=32, vocabulary=448, seed=0)
    model(tmp_path / "small", chatty(), width=16, vocabulary=416, seed=1)
    with (tmp_path / "chats.jsonl").open("w") as file:
        for words in zip(*[iter(TEXT.split())] * 12, strict=False):
            said = (("user", words[:5]), ("assistant", words[5:]))
            turns = [{"role": role, "content": " ".join(part)} for role, part in said]
            file.write(json.dumps({"messages": turns}) + "\n")
    data = [f"--data={tmp_path / 'chats.jsonl'}", "--sequence-length=48", "--device=cpu"]
    kept = str(tmp_path / "kept")
    cache = ["cache", f"--teacher={tmp_path / 'big'}", *data, f"--out={kept}", "--top-k=16"]
    assert __main__.main(cache) == 0
    out = tmp_path / "out"
    chosen = [f"--teacher-cache={kept}", f"--student={tmp_path / 'small'}", "--lora=8", *data]
    chosen += ["--temperature=1", "--epochs=4", "--learning-rate=1e-2"]
    assert distil("--out", out, *chosen) == 0
    assert improved(out)
    tokens = transformers.AutoTokenizer.from_pretrained(out / "student")
    student = transformers.AutoModelForCausalLM.from_pretrained(out / "student")
    asked = tokens.apply_chat_template(
        [{"role": "user", "content": "Find the cause"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    assert student.generate(**asked, max_new_tokens=4, do_sample=False).size(1) > 5


def chatty():
    tokens = tokenizer(TEXT)
    tokens.chat_template = CHATML
    return tokens


# --- several teachers ------------------------------------------------------------------------


def test_a_mixture_of_teachers_teaches(home, tmp_path):
    """Weights 1,0 are the first teacher alone; equal ones are neither; the other way is another."""
    others = {"steps": 3, "temperature": 1, "alpha": 1.0}
    both = f"--teacher={home / 'student'}"
    for out, more in (
        ("first", ["--teacher-weights=1,0"]), ("equal", []), ("last", ["--teacher-weights=0,3"]),
    ):  # fmt: skip
        assert distil("--out", tmp_path / out, *options(home, **others), both, *more) == 0
    assert distil("--out", tmp_path / "alone", *options(home, **others)) == 0
    alone = losses(tmp_path / "alone")
    for out, more in (("whole", "--no-chunked-logits"), ("small", "--chunk-mib=1")):
        assert distil("--out", tmp_path / out, *options(home, **others), more) == 0
        assert losses(tmp_path / out) == pytest.approx(alone, rel=1e-4)
    assert losses(tmp_path / "first") == pytest.approx(alone, rel=1e-5)
    # The student as its own second teacher pulls nowhere at first.
    assert losses(tmp_path / "last")[0] == pytest.approx(0, abs=1e-6)
    assert losses(tmp_path / "equal")[0] < 0.7 * alone[0]
    card = (tmp_path / "equal" / "student" / "README.md").read_text()
    assert "distilled from teacher and student" in card


# --- on policy -------------------------------------------------------------------------------


def test_a_run_on_policy_goes_on_to_the_same_student(home, tmp_path, capsys):
    steps = {"steps": 8, "divergence": "reverse_kl", "seed": 3, "save_every": 2}
    chosen = options(
        home, on_policy=0.5, completion_length=8, prompt_length=4, top_p=0.95,
        sampling_temperature=0.9, **steps,
    )  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert distil("--out", whole, *chosen) == 0
    assert "in 50% of the steps the student writes what it learns from" in capsys.readouterr().err
    off = tmp_path / "off"
    assert distil("--out", off, *options(home, **steps)) == 0
    assert losses(off) != losses(whole)

    with stopped_after(5):
        assert distil("--out", cut, *chosen) == 130
    assert distil("--resume", cut) == 0
    mine, theirs = weights(cut), weights(whole)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--lora=0"], "the rank must lie in [1, 65536], got 0"),
        (["--lora=x"], "say a rank"),
        (["--lora=4,8,nothing"], "--lora: "),
        (["--lora=4", "--teacher=STUDENT", "--alpha=1"], "alpha=1: a student that is its own"),
        (["--lora=4", "--student=CONFIG"], "--lora adapts weights that are there"),
        (["--teacher-weights=1,2"], "teacher_weights must be one for each of 1 teachers, got 2"),
        (["--teacher-weights=a"], "teacher_weights 'a'"),
        (["--on-policy=1.5"], "on_policy must lie in [0, 1], got 1.5"),
        (["--on-policy=1", "--completion-length=16"], "leaves no room for a prompt"),
        (["--on-policy=1", "--top-p=0"], "top_p must lie in (0, 1]"),
        (
            ["--sampling-server=http://x"],
            "sampling_server: without on_policy the student writes nothing",
        ),
        (["--on-policy=1", "--sampling-server=x:80"], "must begin with http:// or https://"),
    ],
)
def test_what_cannot_be_is_one_line(home, tmp_path, capsys, more, said):
    pytest.importorskip("peft")
    chosen = options(home)
    for each in more:
        name, value = each.split("=")
        named = {"STUDENT": home / "student", "CONFIG": home / "student" / "config.json"}
        chosen = [one for one in chosen if not one.startswith(f"{name}=")]
        chosen.append(f"{name}={named.get(value, value)}")
    assert distil("--out", tmp_path / "out", *chosen) == 2
    assert said in last_line(capsys)
    assert not (tmp_path / "out").exists()
