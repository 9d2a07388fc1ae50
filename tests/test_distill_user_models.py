"""`fastkd distill --teacher --student`: tiny models on disk, one process and two."""

import csv
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from pydoc_data.topics import topics
from unittest.mock import patch

import pytest
import torch

from fastkd import __main__
from tests.distilling import distil

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
for module in ("accelerate", "matplotlib", "rich", "tokenizers"):
    pytest.importorskip(module)

ROOT = Path(__file__).parents[1]
TEXT = topics["compound"][:5000]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tokenizer(text, size=400):
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([text], size, special_tokens=["<end>"], show_progress=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<end>")


def model(folder, tokens, *, width, vocabulary, seed):
    torch.manual_seed(seed)
    shape = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(shape).save_pretrained(folder)
    tokens.save_pretrained(folder)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Heads of 448 and 416 columns over one tokenizer of 400 tokens, and another tokenizer."""
    home = tmp_path_factory.mktemp("models")
    model(home / "teacher", tokenizer(TEXT), width=32, vocabulary=448, seed=0)
    model(home / "student", tokenizer(TEXT), width=16, vocabulary=416, seed=1)
    model(home / "stranger", tokenizer(TEXT[::-1]), width=16, vocabulary=416, seed=1)
    model(home / "narrow", tokenizer(TEXT), width=16, vocabulary=300, seed=1)
    (home / "text.txt").write_text(TEXT)
    lines = TEXT.split("\n\n")
    (home / "text.jsonl").write_text("\n".join(json.dumps({"body": line}) for line in lines))
    datasets.Dataset.from_dict({"text": lines}).to_parquet(home / "text.parquet")
    return home


def options(home, **others):
    chosen = {
        "teacher": home / "teacher", "student": home / "student", "data": home / "text.txt",
        "sequence_length": 16, "steps": 6, "batch_size": 4, "learning_rate": 1e-2,
        "log_every": 2, "evaluate_every": 4, "device": "cpu", "temperature": "cosine:4,1", **others,
    }  # fmt: skip
    return [f"--{name.replace('_', '-')}={value}" for name, value in chosen.items()]


@contextmanager
def stopped_after(step):
    """A run ends after this step, as by Ctrl-C."""
    from fastkd.distill import watch

    def stop(self, args, state, control, **others):
        self.asked = lambda: state.global_step == step
        real(self, args, state, control, **others)

    real = watch.Watch.on_step_end
    with patch.object(watch.Watch, "on_step_end", stop):
        yield


def weights(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "student").state_dict()


@pytest.fixture(scope="module")
def finished(home, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert __main__.main(["distill", f"--out={folder}", *options(home)]) == 0
    return folder


def test_the_result_loads_and_has_learned(finished, home):
    names = {"config.toml", "curves.png", "metrics.csv", "metrics.json", "student"}
    assert {path.name for path in finished.iterdir()} == names
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    student = transformers.AutoModelForCausalLM.from_pretrained(finished / "student")
    tokens = transformers.AutoTokenizer.from_pretrained(finished / "student")
    ids = tokens("Find the cause", return_tensors="pt").input_ids
    assert student(ids).logits.shape[-1] == 416
    found = json.loads((finished / "metrics.json").read_text())
    assert found["vocab_size"] == 400
    before, after = found["before"], found["after"]
    assert after["validation_loss"] < before["validation_loss"] - 0.01
    assert after["kl_to_teacher"] < before["kl_to_teacher"]
    assert (finished / "metrics.csv").read_text().count("\n") == 6  # steps 0, 1, 2, 4, 6


def close(some, other):
    assert some.keys() == other.keys()
    for name, weight in some.items():
        torch.testing.assert_close(weight, other[name], rtol=0, atol=2e-4)


def test_accumulation_and_checkpointing_change_nothing(finished, home, tmp_path):
    halves = options(home, batch_size=2, accumulation=2)
    assert distil("--out", tmp_path / "out", "--checkpointing", *halves) == 0
    close(weights(tmp_path / "out"), weights(finished))


def test_two_processes_change_nothing(finished, home, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command = [*launch, "-m", "fastkd", "distill", f"--out={tmp_path}/out"]
    done = subprocess.run(
        [*command, *options(home, batch_size=2)],
        cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Saved: ") == 1
    close(weights(tmp_path / "out"), weights(finished))
    mine, theirs = (
        json.loads((f / "metrics.json").read_text()) for f in (tmp_path / "out", finished)
    )
    assert mine["before"] == pytest.approx(theirs["before"], rel=1e-4)
    mine, theirs = (losses(folder) for folder in (tmp_path / "out", finished))
    assert mine == pytest.approx(theirs, rel=1e-4)


def losses(folder):
    rows = csv.DictReader((folder / "metrics.csv").open())
    return [float(row["loss"]) for row in rows if row["loss"]]


def distiller(home, folder, heads=True, **options):
    from fastkd.integrations.transformers import DistillationTrainer

    teacher, student = (
        transformers.AutoModelForCausalLM.from_pretrained(home / name)
        for name in ("teacher", "student")
    )
    arguments = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, **options}
    return DistillationTrainer(
        teacher=teacher, heads=heads, loss=lambda step, steps: {"temperature": 2.0, "alpha": 0.7},
        vocab_size=400, model=student,
        args=transformers.TrainingArguments(str(folder), **arguments),
    )  # fmt: skip


def test_the_count_of_tokens_is_the_divisor_over_uneven_batches(home, tmp_path):
    """Two halves whose masked tokens differ in number add up to the whole."""
    trainer = distiller(home, tmp_path)
    student = trainer.model
    ids = torch.randint(400, (4, 16))
    labels = torch.where(torch.arange(16) < torch.tensor([[0], [0], [9], [13]]), -100, ids)
    batches = [{"input_ids": ids[part], "labels": labels[part]} for part in (slice(2), slice(2, 4))]
    items = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    assert items == (labels[:, 1:] != -100).sum()
    halves = [trainer.compute_loss(student, part, num_items_in_batch=items) for part in batches]
    whole = trainer.compute_loss(student, {"input_ids": ids, "labels": labels})
    torch.testing.assert_close(sum(halves), whole)


def test_the_loss_sees_bf16_logits(home, tmp_path, monkeypatch):
    """No copy of the student's logits, in training and in evaluation; its gradient takes none."""
    from fastkd.integrations import transformers as module

    seen, real = [], module.distillation_loss

    def loss(student, teacher, *arguments, **options):
        assert student.is_contiguous()
        seen.append((student.dtype, options.get("inplace", False)))
        return real(student, teacher, *arguments, **options)

    monkeypatch.setattr(module, "distillation_loss", loss)
    trainer = distiller(
        home, tmp_path, heads=False, bf16=True, max_steps=1, remove_unused_columns=False
    )
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(400, (8, 16))]
    trainer.train_dataset = trainer.eval_dataset = rows
    trainer.train()
    trainer.evaluate()
    assert set(seen) == {(torch.bfloat16, False), (torch.bfloat16, True)}
    assert all(weight.dtype == torch.float32 for weight in trainer.model.parameters())


@pytest.mark.parametrize(("file", "more"), [("text.jsonl", ["--text=body"]), ("text.parquet", [])])
def test_data_in_columns(home, tmp_path, file, more):
    arguments = options(home, data=home / file, steps=1)
    assert distil("--out", tmp_path / "out", *more, *arguments) == 0


def test_a_temperature_schedule_ends_with_the_run(home, tmp_path):
    """Also where the number of steps follows from the passes over the data."""
    out = tmp_path / "out"
    arguments = options(home, steps=0, epochs=0.5, log_every=1, temperature="linear:8,2")
    assert distil("--out", out, *arguments) == 0
    rows = list(csv.DictReader((out / "metrics.csv").open()))
    steps = int(rows[-1]["step"])
    assert steps > 6
    found = [float(row["temperature"]) for row in rows if row["loss"]]
    assert found == pytest.approx([8 - 6 * step / steps for step in range(steps)])


def test_a_new_student_from_a_config_in_bf16_with_another_divergence(home, tmp_path):
    shape = home / "student" / "config.json"
    arguments = options(home, student=shape, steps=2, precision="bf16", divergence="jsd:0.2")
    assert distil("--out", tmp_path / "out", *arguments) == 0
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "student")
    assert 'divergence = "jsd:0.2"' in (tmp_path / "out" / "config.toml").read_text()


def test_a_stopped_run_goes_on_to_the_same_student(finished, home, tmp_path, capsys):
    out = tmp_path / "out"
    with stopped_after(3):
        assert distil("--out", out, *options(home)) == 130
    assert f"fastkd distill --resume {out}" in capsys.readouterr().err
    assert not (out / "student").exists()
    copy = shutil.copytree(out, tmp_path / "copy")
    assert distil("--resume", out) == 0
    mine, theirs = weights(out), weights(finished)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert (out / "metrics.csv").read_bytes() == (finished / "metrics.csv").read_bytes()
    assert not list(out.glob("checkpoint-*"))

    (checkpoint,) = copy.glob("checkpoint-*")
    (checkpoint / "optimizer.pt").write_bytes(b"broken")
    capsys.readouterr()
    assert distil("--resume", copy) == 1
    assert "is broken and cannot be read" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("changed", "code", "message"),
    [
        ({"student": "stranger"}, 1, "teacher and student have different tokenizers: token"),
        ({"student": "narrow"}, 1, "the student has 300 outputs, and the vocabulary 400 tokens"),
        ({"student": "pictures/config.json"}, 1, "the student is no language model"),
        ({"student": "./nope"}, 2, "there is no such folder or file"),
        ({"student": "narrow/nope"}, 2, "narrow/nope: there is no such folder or file"),
        ({"student": "nope.json"}, 2, "nope.json: there is no such folder or file"),
        ({"teacher": "text.txt"}, 1, "text.txt holds no tokenizer that can be read"),
        ({"teacher": "no-one/nothing"}, 1, "neither a folder here nor a tokenizer of the hub"),
        ({"data": "text.jsonl"}, 1, "prompt' and 'completion', but body: say which with --text"),
        ({"data": "broken.jsonl"}, 1, "broken.jsonl, line 1: this is not JSON"),
        ({"data": "empty.txt"}, 1, "there is no text in"),
        ({"data": "asked.jsonl"}, 1, "to learn from; 2 rows without text left out"),
        ({"sequence_length": 65}, 2, "sequence_length=65 is beyond the 64 positions of the teach"),
        ({"data": "short.txt"}, 1, "1 sequences of 16 tokens, where at least 2"),
        ({"vocab_size": 300}, 2, "leaves out tokens: the tokenizer has 400"),
        ({"temperature": 0}, 2, "value must be a finite temperature > 0, got 0.0"),
        ({"held_out": 1}, 2, "held_out must lie in (0, 1)"),
    ],
)
def test_bad_input_is_one_line(home, tmp_path, monkeypatch, capsys, changed, code, message):
    monkeypatch.chdir(home)
    (home / "empty.txt").write_text("")
    transformers.ViTConfig().save_pretrained(home / "pictures")
    (home / "short.txt").write_text("a few words")
    (home / "asked.jsonl").write_text('{"prompt": "a few words", "completion": ""}\n' * 2)
    (home / "broken.jsonl").write_text('{"text": ')
    assert distil("--out", tmp_path / "out", *options(home, **changed)) == code
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_several_processes_need_one_folder(home, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert distil(*options(home)) == 2
    assert "one --out" in capsys.readouterr().err
