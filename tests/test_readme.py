"""README.md: its Python runs as written, its commands are pinned, its table is complete."""

import json
import re
from pathlib import Path

import pytest
import torch

import fastkd
from benchmarks import default_job

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language, text=README):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def variables():
    """What the Python blocks, run one after the other, leave behind."""
    namespace = {}
    torch.manual_seed(0)
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    return namespace


def test_snippets_run_and_before_equals_after(variables):
    torch.testing.assert_close(variables["after"], variables["before"])


def test_it_is_short():
    assert len(README.splitlines()) < 165


def test_every_pip_command_is_pinned():
    commands = [line for block in blocks("bash") for line in block.splitlines() if "pip " in line]
    assert len(commands) >= 2
    assert all("pip install -c constraints.txt " in line for line in commands)


PUBLIC = [getattr(fastkd, name) for name in fastkd.__all__]
KINDS = [kind for kind in PUBLIC if kind in fastkd.Divergence.__subclasses__()]


def test_the_table_lists_every_divergence():
    for kind in KINDS:
        assert re.search(rf"^\| `{kind.name}` \| `{kind.__name__}\(", README, re.MULTILINE)


def test_it_names_the_divergences_without_a_kernel():
    sentence = re.search(r"^(.*) have no kernel:", README, re.MULTILINE)
    without = {kind.name for kind in KINDS if not kind.has_device_function}
    assert set(re.findall(r"`(\w+)`", sentence[1])) == without


def test_a_run_of_the_default_job_is_written_into_the_documents(tmp_path, monkeypatch):
    for name in ("README", "PAGE", "PICTURE"):
        copy = tmp_path / getattr(default_job, name).name
        copy.write_bytes(getattr(default_job, name).read_bytes())
        monkeypatch.setattr(default_job, name, copy)
    student = {
        "validation_loss": 5.4321, "spread": 0.0123, "losses": [1, 2, 3], "kl_to_teacher": 0.2345,
        "agreement": 0.567, "steps": 123, "step_ms": 456.0, "loss_share": 0.29,
        "loss_peak_bytes": 12 * 2**20,
    }  # fmt: skip
    names = ("hard labels", "hard labels x2", "F.kl_div", "fastkd")
    found = {
        "teacher": {"validation_loss": 4.321, "steps": 600},
        "students": {name: student | {"losses": [1]} for name in names} | {"fastkd": student},
        "margin": 0.987, "margin_error": 0.065, "equal_time": 234,
    }  # fmt: skip
    (tmp_path / "metrics.json").write_text(json.dumps(found))
    (tmp_path / "curves.png").write_bytes(b"picture")
    before = default_job.README.read_text().splitlines()
    default_job.publish(tmp_path, 98.7)
    after = default_job.README.read_text()
    assert (
        " fastkd          5.432 ± 0.012    0.234   56.7%    123     56.1     29%    12.0\n" in after
    )
    assert " teacher         4.321                     600\n" in after
    assert "0.987 ± 0.065 nats" in after
    assert "after 99 seconds" in after
    same = [old == new for old, new in zip(before, after.splitlines(), strict=True)]
    assert same.count(False) == 7
    assert "(234 for 123 in" in default_job.PAGE.read_text()
    assert default_job.PICTURE.read_bytes() == b"picture"
