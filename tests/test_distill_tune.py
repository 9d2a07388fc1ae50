"""`fastkd tune`: tiny searches for real, on the default job and on models from disk."""

from __future__ import annotations

import json
import re
import sqlite3
import sys

import pytest

from fastkd import __main__
from fastkd.distill.settings import Search
from fastkd.distill.tune import KL, LOSS, _result
from tests.test_distill_user_models import home as home
from tests.test_distill_user_models import options as of_models

optuna = pytest.importorskip("optuna")
for module in ("matplotlib", "rich", "tokenizers"):
    pytest.importorskip(module)

pytestmark = pytest.mark.usefixtures("two_threads")

TINY = [
    "--steps=6", "--teacher-steps=4", "--vocabulary=300", "--sequence-length=16",
    "--teacher-width=16", "--student-width=8", "--device=cpu",
]  # fmt: skip
SAVED = {"study.db", "results.json", "plot.png"}


@pytest.fixture
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(f"line {i} of {i % 7} words" for i in range(300)))
    return path


def tune(*arguments):
    return __main__.main(["tune", *map(str, arguments)])


def results(folder):
    assert {path.name for path in folder.iterdir()} == SAVED
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("sampler", ["grid", "random", "tpe"])
def test_a_search_is_kept_and_added_to_and_what_it_finds_has_its_error(
    sampler, text, tmp_path, capsys
):
    search = [f"--sampler={sampler}", "--seeds=2", "--out", tmp_path, "--data", text, *TINY]
    assert tune("--trials=2", *search) == 0
    first = results(tmp_path)
    assert tune("--trials=1", *search) == 0
    found = results(tmp_path)
    printed = capsys.readouterr().out
    assert "Tune: 2 trials" in printed
    assert "Tune: 3 trials" in printed
    assert re.search(r"Found: --temperature=\S+ --alpha=\S+ --divergence=\w+", printed)
    number = r"[+-]\d+\.\d{4}"
    for rival in ("as given", "hard labels"):
        verdict = rf"is (NOT lower|lower|HIGHER) than that of {rival}: {number} \(95 %: {number} to"
        assert re.search(verdict, printed)
    assert re.search(r"found +\d\.\d{4} ± \d\.\d{4} +[+-]\d\.\d{4} ± \d\.\d{4}\n", printed)
    rows = {row["setting"]: row for row in found["tables"][0]["rows"]}
    assert set(rows) == {"as given", "hard labels", "found"}
    assert all(len(row["seeds"]) == 2 and len(set(row["seeds"])) == 2 for row in rows.values())
    # The settings as given are trained anew each time, and repeat to the bit.
    again = {row["setting"]: row for row in first["tables"][0]["rows"]}
    assert rows["as given"] == again["as given"]
    with sqlite3.connect(tmp_path / "study.db") as study:
        ((trials,),) = study.execute("select count(*) from trials where state = 'COMPLETE'")
    assert trials == 3

    assert tune("--trials=1", "--learning-rate=0.1", *search) == 2
    assert "holds a search with other settings" in capsys.readouterr().err


def test_what_never_trained_does_not_keep_its_folder(tmp_path, capsys):
    """A slip is mended by the same command with other settings, not in another folder."""
    (tmp_path / "empty.txt").touch()
    for rate in (0.1, 0.2):
        search = ["--data", tmp_path / "empty.txt", "--out", tmp_path / "out", *TINY]
        assert tune(f"--learning-rate={rate}", *search) == 1
        assert "there is no text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ((0.2, 0.3, 0.25), "is lower"),
        ((0.9, -0.2, 0.1), "is NOT lower"),  # as much on average, by one lucky seed
        ((0.2, 0.3), "is NOT lower"),  # 5 standard errors, of which two seeds need 12.7
        ((-0.2, -0.3, -0.25), "is HIGHER"),
    ],
)
def test_a_gain_counts_only_beyond_its_error_over_the_seeds(gains, verdict):
    """Against the settings as given and against hard labels, each by itself."""
    study = optuna.create_study()
    levels = (5.0, 9.0, 7.0)[: len(gains)]  # the seeds differ by far more than the settings
    found = {
        "as given": [{LOSS: level, KL: 1.0} for level in levels],
        "hard labels": [{LOSS: level + 5.0 + i / 99, KL: 1.0} for i, level in enumerate(levels)],
        "found": [{LOSS: a - b, KL: 1.0} for a, b in zip(levels, gains, strict=True)],
    }
    said = str(_result(study, Search(seeds=len(gains)), "--alpha=1", found))
    assert f"{verdict} than that of as given: " in said
    assert "is lower than that of hard labels: " in said


def test_models_of_the_user(home, tmp_path, capsys):
    before = {path: path.read_bytes() for path in home.rglob("*.safetensors")}
    arguments = [*of_models(home, steps=2), "--trials=1", "--seeds=2"]
    assert tune("--out", tmp_path / "out", *arguments) == 0
    assert results(tmp_path / "out")["sampler"] == "tpe"
    assert "found" in capsys.readouterr().out
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--sampler=gird"], 2, "sampler 'gird' is unknown: did you mean 'grid'?"),
        (["--seeds=1"], 2, "seeds must lie in [2, 1000], got 1"),
        (["--trials=0"], 2, "trials must lie in [1, 100000], got 0"),
        (["--trails=3"], 2, "unknown option --trails=3; did you mean --trials?"),
        (["--temperature=cold"], 2, "temperature 'cold'"),
        (["--learning-rate=1e30"], 2, "learning_rate must lie in (0, 1000]"),
    ],
)
def test_bad_input_is_one_line(text, tmp_path, capsys, arguments, code, message):
    try:
        ended = tune("--out", tmp_path / "out", "--trials=1", "--data", text, *TINY, *arguments)
    except SystemExit as exit:  # argparse
        ended = exit.code
    assert ended == code
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("fastkd tune: ")
    assert message in last


def test_a_missing_extra_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert tune("--out", tmp_path / "out") == 2
    assert 'pip install "fastkd[recipes]"' in capsys.readouterr().err


def test_a_data_base_of_somebody_else_is_left_as_it_is(text, tmp_path, capsys):
    """Beside results.json of theirs, too: another program's, and another study of Optuna's."""
    for out, fill in ((tmp_path / "other", _a_table), (tmp_path / "optuna", _a_study)):
        out.mkdir()
        fill(out / "study.db")
        (out / "results.json").write_text("mine")
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        assert tune("--out", out, "--trials=1", "--seeds=2", "--data", text, *TINY) == 2
        assert "choose another --out" in capsys.readouterr().err.splitlines()[-1]
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def _a_table(path):
    with sqlite3.connect(path) as file:
        file.execute("create table t (x)")


def _a_study(path):
    optuna.create_study(storage=f"sqlite:///{path}", study_name="theirs")


def test_ctrl_c_keeps_the_trials(text, tmp_path, capsys, monkeypatch):
    from fastkd.distill import tune as module

    real, trained = module._default_job, []

    def stub(chosen):
        train = real(chosen)

        def stopped(changed):
            trained.append(changed)
            if len(trained) == 3:  # in the middle of the second trial
                raise KeyboardInterrupt
            return train(changed)

        return stopped

    search = ["--seeds=2", "--trials=2", "--out", tmp_path, "--data", text, *TINY]
    with monkeypatch.context() as patched:
        patched.setattr(module, "_default_job", stub)
        assert tune(*search) == 130
    assert f"the same command adds to the trials in {tmp_path}" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"study.db"}
    assert tune(*search) == 0
    assert "Tune: 3 trials" in capsys.readouterr().out
