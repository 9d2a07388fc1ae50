"""`fastkd distill` on its own text: what it saves, that it repeats and resumes, that it agrees."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastkd import __main__
from fastkd.distill import corpus, default_job, measure, methods, settings, storage
from fastkd.distill.train import STUDENT_BATCHES, Training, rate
from tests.closeness import assert_close
from tests.distilling import distil

for module in ("matplotlib", "rich", "safetensors", "tokenizers"):
    pytest.importorskip(module)

ROOT = Path(__file__).parents[1]
RESULTS = {"config.toml", "curves.png", "metrics.csv", "metrics.json", "student.safetensors"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = ["teacher", "student", "loss", "temperature", "hard", "soft", "the", "of", "is"]
    draw = torch.Generator().manual_seed(0)
    lines = (torch.randint(len(words), (200, 9), generator=draw)).tolist()
    path.write_text("\n\n".join(" ".join(words[i] for i in line) for line in lines))
    return path


def options(text, **others):
    chosen = {
        "data": text, "steps": 12, "teacher_steps": 6, "vocabulary": 280, "teacher_width": 16,
        "student_width": 8, "log_every": 2, "evaluate_every": 5, "sequence_length": 16,
        "device": "cpu", "temperature": "cosine:4,1", "students": 2, "save_every": 5,
        "student_share": 0.5, **others,
    }  # fmt: skip
    return [f"--{name.replace('_', '-')}={value}" for name, value in chosen.items()]


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert __main__.main(["distill", f"--out={folder}", *options(text)]) == 0
    return folder


# --- what it saves ---------------------------------------------------------------------------


def test_all_results_are_there_and_nothing_else(finished):
    assert {path.name for path in finished.iterdir()} == RESULTS | {"tokenizer.json"}
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")


def rows_of(folder, way="fastkd", seed="0"):
    return [
        row
        for row in csv.DictReader((folder / "metrics.csv").open())
        if (row["way"], row["seed"]) == (way, seed)
    ]


def test_a_row_for_each_logged_step_of_each_student(finished):
    steps, longer = [1, 2, 4, 5, 6, 8, 10, 12], [1, *range(2, 25, 2)]
    for way in ("F.kl_div", "fastkd"):
        rows = rows_of(finished, way)
        assert [int(row["step"]) for row in rows] == steps
        assert {int(row["step"]) for row in rows if row["validation_loss"]} == {5, 10, 12}
    assert [int(row["step"]) for row in rows_of(finished, seed="1")] == [1, 2, 4, 6, 8, 10, 12]
    low, middle, high = (4e-3 * factor for factor in (*default_job.RATES, 1))
    for way, wanted, rates in (
        ("hard labels", steps, (high, low, middle)),  # the first beside the distilled students
        ("hard labels x2", longer, (low, middle, high)),
    ):
        rows = rows_of(finished, way)
        assert [float(row["learning_rate"]) for row in rows] == pytest.approx(
            [rate for rate in rates for _ in wanted]
        )
        assert [int(row["step"]) for row in rows] == 3 * wanted


def test_the_figures_are_measured_and_agree(finished):
    found = json.loads((finished / "metrics.json").read_text())
    assert found["agrees"]
    assert found["difference"] <= 1e-5
    for figures in found["students"].values():
        assert 0 < figures["loss_ms"] < figures["step_ms"]
        assert figures["loss_peak_bytes"] > 0
        assert figures["kl_to_teacher"] > 0
    assert found["students"]["hard labels x2"]["steps"] == 24
    hard, fastkd = (found["students"][name]["step_ms"] for name in ("hard labels", "fastkd"))
    assert found["students"]["hard labels x2"]["step_ms"] == hard  # measured in the same steps
    assert found["equal_time"] == round(12 * fastkd / hard)


def test_hard_labels_have_their_best_rate_and_the_margin_is_over_the_better_of_them(finished):
    found = json.loads((finished / "metrics.json").read_text())
    last = {}
    for way in ("hard labels", "hard labels x2"):
        figures = found["students"][way]
        ends = {
            float(row["learning_rate"]): float(row["validation_loss"])
            for row in rows_of(finished, way)
            if int(row["step"]) == figures["steps"]
        }
        assert len(ends) == 3
        assert figures["learning_rate"] == min(ends, key=ends.get)
        (other,) = [
            float(row["validation_loss"]) for row in rows_of(finished, way, "1")
            if row["validation_loss"]
        ]  # fmt: skip
        assert figures["losses"] == pytest.approx([min(ends.values()), other])
        assert figures["validation_loss"] == pytest.approx(sum(figures["losses"]) / 2)
        last[way] = figures
    best = min(last.values(), key=lambda figures: figures["validation_loss"])
    margins = [
        hard - fastkd
        for hard, fastkd in zip(best["losses"], found["students"]["fastkd"]["losses"], strict=True)
    ]
    assert found["margin"] == pytest.approx(sum(margins) / 2)
    assert found["margin_error"] == pytest.approx(abs(margins[0] - margins[1]) / 2)


def test_students_see_their_share_of_the_text_only(text):
    data = corpus.prepare([str(text)], 280, 16)
    chosen = settings.build(
        settings.DefaultJob,
        {"sequence_length": 16, "heads": 2, "vocabulary": 280, "student_share": 0.25},
    )
    training = Training(chosen, data, torch.device("cpu"))
    size = len(data.training)
    assert torch.equal(training.lesson.training, data.training[: round(size / 4)])
    assert torch.equal(training.lesson.validation, data.validation)
    windows = {tuple(w.tolist()) for w in data.training[: round(size / 4)].unfold(0, 16, 1)}
    ids, _ = training._batch(STUDENT_BATCHES, 3)
    assert all(tuple(row.tolist()) in windows for row in ids)


def test_the_student_and_its_tokenizer_load(finished):
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(finished / "tokenizer.json"))
    weights = load_file(finished / "student.safetensors")
    assert weights["tokens.weight"].shape == (tokenizer.get_vocab_size(), 8)


def test_its_config_makes_the_same_run(finished, tmp_path):
    assert distil("--config", finished / "config.toml", "--out", tmp_path / "again") == 0
    same = ("config.toml", "metrics.csv", "student.safetensors", "tokenizer.json")
    for name in same:
        assert (finished / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_another_divergence_stands_against_its_reference(text, tmp_path, capsys):
    out = tmp_path / "out"
    more = ["--divergence=jsd:0.3", "--entropy-weight=0.1", "--standardize"]
    assert distil("--out", out, *more, *options(text, steps=2)) == 0
    assert "fastkd and the reference agree" in capsys.readouterr().out


def test_temperatures_change_as_they_are_spelt(text, tmp_path):
    """With the teacher's apart, in TOML, without their product; F.kl_div's curve is fastkd's."""
    (tmp_path / "mine.toml").write_text("teacher_temperature = 4\nscale_by_temperature = false\n")
    arguments = options(text, steps=8, log_every=1, temperature="linear:8,2")
    arguments += ["--config", tmp_path / "mine.toml"]
    assert distil("--out", tmp_path / "out", *arguments) == 0
    temperatures = [float(row["temperature"]) for row in rows_of(tmp_path / "out")]
    assert temperatures == pytest.approx([8 - 6 * step / 8 for step in range(8)])
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert found["other"] == "F.kl_div"
    assert found["difference"] <= 1e-5


@pytest.mark.parametrize(
    "settings_", [{"teacher_temperature": "5"}, {"scale_by_temperature": False}, {}]
)
def test_the_way_of_f_kl_div_is_its_formula(settings_):
    chosen = settings.build(settings.DefaultJob, {"temperature": "two-stage:3,2", **settings_})
    student, teacher = torch.randn(2, 7, 11, dtype=torch.float64)
    labels = torch.arange(7)
    for step, T_s in ((0, 3.0), (5, 2.0)):
        T_t = 5.0 if "teacher_temperature" in settings_ else T_s
        q, p = (student / T_s).softmax(-1), (teacher / T_t).softmax(-1)
        kd = (p * (p / q).log()).sum(-1).mean()
        factor = 1 if "scale_by_temperature" in settings_ else T_s * T_t
        truth = 0.9 * factor * kd - 0.1 * student.log_softmax(-1)[labels, labels].mean()
        for name in ("F.kl_div", "fastkd"):
            loss = methods.methods(chosen.loss(step, steps=10))[name]
            assert_close(loss(student, teacher, labels), truth)


def test_disagreement_fails_after_all_is_saved(text, tmp_path, monkeypatch, capsys):
    real = methods.distillation_loss
    monkeypatch.setattr(methods, "distillation_loss", lambda *a, **k: 1.001 * real(*a, **k))
    assert distil("--out", tmp_path / "out", *options(text, steps=2)) == 1
    printed = capsys.readouterr()
    assert "DO NOT AGREE" in printed.out
    assert printed.err.splitlines()[-1].startswith("fastkd distill: fastkd and F.kl_div do not")
    assert (tmp_path / "out" / "metrics.json").exists()


# --- stopping and going on -------------------------------------------------------------------


@pytest.mark.parametrize("steps", [3, 9, 30, 90])
def test_a_resumed_run_is_the_unbroken_one_to_the_bit(
    finished, text, tmp_path, monkeypatch, capsys, steps
):
    """Stopped in the middle of the teacher, of the students, and of the hard labels' parts."""
    folder, seen = tmp_path / "broken", []

    def keep(experiment, folder, stop, due):
        seen.append(1)
        stop.asked = len(seen) == steps
        real(experiment, folder, stop, due)

    real = default_job._keep
    monkeypatch.setattr(default_job, "_keep", keep)
    assert distil("--out", folder, *options(text)) == 130
    assert f"fastkd distill --resume {folder}" in capsys.readouterr().err
    names = {"config.toml", "checkpoint.pt", "metrics.csv"}
    assert {path.name for path in folder.iterdir()} == names
    monkeypatch.setattr(default_job, "_keep", real)
    assert distil("--resume", folder) == 0
    for name in ("metrics.csv", "student.safetensors"):
        assert (finished / name).read_bytes() == (folder / name).read_bytes(), name
    assert not (folder / "checkpoint.pt").exists()


def test_ctrl_c_leaves_a_checkpoint_that_goes_on(finished, text, tmp_path):
    folder = tmp_path / "out"
    # Enough steps that the signal comes before the last.
    command = [sys.executable, "-m", "fastkd", "distill", "--out", folder]
    running = subprocess.Popen(
        [*command, *options(text, steps=100_000)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 300
    while not (folder / "checkpoint.pt").exists() and time.monotonic() < until:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=300)
    assert running.returncode == 130
    assert err.endswith(
        f"\nfastkd distill: stopped; go on with: fastkd distill --resume {folder}\n"
    )
    state = storage.load_checkpoint(folder)
    assert state["done"] or state["training"]["teacher_step"] > 0


# --- the pieces ------------------------------------------------------------------------------


def test_no_held_out_paragraph_is_trained_on():
    parts = corpus.paragraphs(corpus.bundled())
    training, validation = corpus.split(parts)
    assert len(training) > 5 * len(validation) > 100_000
    sides = [set(side.rstrip("\n").split("\n\n")) for side in (training, validation)]
    assert not sides[0] & sides[1]


def test_batches_are_a_function_of_seed_and_step():
    text = corpus.Corpus(torch.arange(100), torch.arange(50), 100, "")
    ids, labels = text.batch(0, 3, size=4, length=8)
    assert torch.equal(ids + 1, labels)
    assert torch.equal(ids, text.batch(0, 3, size=4, length=8)[0])
    assert not torch.equal(ids, text.batch(0, 4, size=4, length=8)[0])
    assert not torch.equal(ids, text.batch(1, 3, size=4, length=8)[0])


def test_the_rate_rises_and_falls():
    rates = [rate(step, 100, 1.0) for step in range(100)]
    assert max(rates) == pytest.approx(1.0, rel=0.01)
    assert rates[0] < 0.3
    assert rates[-1] < 0.01


def test_peak_memory_counts_every_byte_held():
    student, teacher = torch.randn(64, 256), torch.randn(64, 256)

    def loss(student, teacher, labels):
        return (student * teacher).exp().sum()  # two tensors, then the gradients of two

    call = partial(measure.gradient, loss, student, teacher, torch.zeros(64).long())
    call()
    peak = measure.peak_memory(call, student.device)
    assert 2 * student.nbytes <= peak <= 5 * student.nbytes


def test_students_begin_alike_and_evaluation_is_that_of_pytorch(text):
    chosen = settings.build(
        settings.DefaultJob, {"sequence_length": 16, "heads": 2, "vocabulary": 280}
    )
    data = corpus.prepare([str(text)], 280, 16)
    training = Training(chosen, data, torch.device("cpu"))
    first, *others = (model.state_dict() for model in training.students.values())
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)
    ids, labels = data.held_out(16)
    with torch.no_grad():
        student, teacher = training.students["fastkd"](ids), training.teacher(ids)
    found = training.evaluate()["fastkd"]
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    truth = {
        "validation_loss": F.cross_entropy(student.flatten(0, 1), labels.flatten()),
        "kl_to_teacher": (log_p.exp() * (log_p - log_q)).sum(-1).mean(),
        "agreement": (student.argmax(-1) == teacher.argmax(-1)).float().mean(),
    }
    for name, value in truth.items():
        assert found[name] == pytest.approx(value.item(), rel=1e-4), name


def test_hard_labels_alone_ask_no_teacher(text):
    chosen = settings.build(
        settings.DefaultJob, {"sequence_length": 16, "heads": 2, "vocabulary": 280}
    )
    training = Training(
        chosen, corpus.prepare([str(text)], 280, 16), torch.device("cpu"), ["hard labels"]
    )
    training.teacher.forward = None
    assert training.train_students()["hard labels"] > 0


@pytest.mark.full
def test_the_default_job(tmp_path):
    """As a user runs it: no arguments, and hard labels only are beaten."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "fastkd", "distill"],
        cwd=tmp_path, env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert {path.name for path in folder.iterdir()} >= RESULTS
    found = json.loads((folder / "metrics.json").read_text())
    assert found["margin"] > 0.1
    assert found["margin"] > 3 * found["margin_error"]
    assert found["students"]["fastkd"]["kl_to_teacher"] < 0.3
    assert re.search(r"fastkd is 0\.\d+ ± 0\.\d+ nats per token below", done.stdout)
