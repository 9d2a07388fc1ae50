"""`fastkd distill --resume` after somebody edited config.toml: one line, and all is as it was."""

import re
import shutil

import pytest

from tests.test_distill_user_models import _one_thread as _one_thread
from tests.test_distill_user_models import distil, options, stopped_after
from tests.test_distill_user_models import home as home

from fastkd.distill import config, settings, storage  # isort: skip


@pytest.fixture(scope="module")
def stopped(home, tmp_path_factory):
    """A run that stopped at step 3; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "stopped"
    with stopped_after(3):
        assert distil("--out", folder, *options(home)) == 130
    return folder


@pytest.fixture
def copy(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "out")


def edit(folder, pattern, line):
    path = folder / "config.toml"
    text, count = re.subn(pattern, line, path.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert count == 1
    path.write_text(text)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("pattern", "line", "code", "message"),
    [
        ("^lora = [^\n]*", 'lora = "4"', 1, 'has lora = "4", and this run began with lora = ""'),
        ("^quantize = [^\n]*", 'quantize = "int8"', 1, 'this run began with quantize = ""'),
        ("^optimizer = [^\n]*", 'optimizer = "sgd"', 1, 'began with optimizer = "adamw_torch"'),
        ("^learning_rate = [^\n]*", "learning_rate = 1", 1, "began with learning_rate = 0.01"),
        ("^student = [^\n]*", 'student = "x"', 1, "has student = "),
        ("^seed = [^\n]*\n", "", 2, "config.toml says nothing of seed: put back what it said"),
        (".+", "", 2, "config.toml says nothing of data: put back what it said"),
        ("^teacher = .*", "", 2, "config.toml says nothing of vocabulary"),
    ],
)
def test_a_run_goes_on_with_the_settings_that_it_began_with(
    copy, capsys, pattern, line, code, message
):
    edit(copy, pattern, line)
    before = contents(copy)
    assert distil("--resume", copy) == code
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert contents(copy) == before


def test_what_the_student_does_not_depend_on_may_change(copy, home):
    edit(copy, "^keep = 1", "keep = 9")
    moved = shutil.copytree(home / "teacher", copy.with_name("teacher"))
    edit(copy, "^teacher = [^\n]*", f'teacher = "{moved}"')
    assert distil("--resume", copy) == 0
    assert (copy / "student").is_dir()


def test_a_run_of_an_earlier_version_goes_on(copy):
    """Its inputs.json has the teacher alone."""
    (copy / "inputs.json").write_text(
        re.sub(', "settings.*', "}", (copy / "inputs.json").read_text())
    )
    assert distil("--resume", copy) == 0


@pytest.mark.parametrize("kind", [settings.DefaultJob, settings.UserModels])
def test_the_settings_of_the_other_job_are_refused(copy, tmp_path, capsys, kind):
    folder = copy if kind is settings.DefaultJob else tmp_path / "default"
    if kind is settings.UserModels:
        folder.mkdir()
        (folder / "checkpoint.pt").write_bytes(b"")
        shutil.copy(copy / "config.toml", folder)
    else:
        (folder / "config.toml").write_text(config.text(kind()))
    before = contents(folder)
    assert distil("--resume", folder) == 2
    assert "config.toml is of the other job" in capsys.readouterr().err.splitlines()[-1]
    assert contents(folder) == before


def test_so_does_the_default_job(tmp_path, capsys):
    """Its students are compared with one another: as many steps for some alone would be unfair."""
    began = settings.build(settings.DefaultJob, {"steps": 100})
    storage.save_checkpoint(tmp_path, {"settings": config.values(began)})
    now = settings.build(settings.DefaultJob, {"steps": 200, "threads": 2})
    (tmp_path / "config.toml").write_text(config.text(now))
    assert distil("--resume", tmp_path) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "config.toml has steps = 200, and this run began with steps = 100: put that back" in said
    (tmp_path / "config.toml").write_text(config.text(now).replace("steps = 200", "steps = 100"))
    assert distil("--resume", tmp_path) == 1
    assert "the checkpoint does not fit this run" in capsys.readouterr().err
