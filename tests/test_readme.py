"""README.md: its Python runs as written, its commands are pinned, its table is complete."""

import re
from pathlib import Path

import pytest
import torch

import fastkd

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


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


def test_the_table_lists_every_divergence():
    public = (getattr(fastkd, name) for name in fastkd.__all__)
    for kind in public:
        if kind in fastkd.Divergence.__subclasses__():
            assert re.search(rf"^\| `{kind.name}` \| `{kind.__name__}\(", README, re.MULTILINE)
