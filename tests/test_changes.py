"""What `benchmarks.compiled` says of an earlier table: changed, worse, or not compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import changes
from benchmarks.report import table

OLD = ("configuration", "divergence", "registers", "spills", "programs per SM", "instructions")
NEW = (*OLD, "value known")
RESULTS = Path(changes.__file__).parent / "results"


def text(head, *rows):
    about = "# Compiled\n\n- 2026-11-30, triton 3.7.1, fastkd at commit abc\n- `command`\n\n"
    return f"{about}{table((head, *rows))}\n\n## More\n\n{table((('a', 'b'), ('1', '2')))}\n"


def row(name, divergence, *numbers):
    return (name, divergence, *map(str, numbers))


BEFORE = text(
    OLD, row("sweep", "jsd", 108, 0, 2, 71.9), row("split", "jsd", 80, 0, 3, 20.0),
    row("split", "jsd", 90, 1, 2, 22.5), row("relay", "jsd", 254, 0, 2, 60.0),
)  # fmt: skip


def test_the_kernels_of_a_call_are_added_up():
    found = changes.calls(BEFORE)
    assert set(found) == {("sweep", "jsd"), ("split", "jsd"), ("relay", "jsd")}
    assert found["split", "jsd"] == changes.Call(42.5, 42.5, 90, 2, 1)


def test_a_change_for_the_better_is_in_the_table_alone():
    after = text(NEW, row("sweep", "jsd", 64, 0, 4, 71.9, 60.0), row("alone", "jsd", 1, 0, 1, 1, 1))
    said = changes.report(BEFORE, after)
    cells = [[cell.strip() for cell in line.split("|")] for line in said.splitlines()]
    found = ["", "sweep", "jsd", "71.9", "71.9 to 60.0", "108 to 64", "2 to 4", "0", ""]
    assert [line for line in cells if line[1:2] == ["sweep"]] == [found]
    assert "2026-11-30, triton 3.7.1, fastkd at commit abc" in said
    assert "### Worse\n\nNothing.\n" in said
    assert "Not compared: relay, split.\n" in said
    assert "alone" not in said


@pytest.mark.parametrize(
    ("after", "said"),
    [
        ((108, 0, 2, 72.5, 72.5), "instructions 71.9 to 72.5"),
        ((108, 0, 2, 72.0, 72.5), "known 71.9 to 72.5"),
        ((120, 0, 1, 70.0, 70.0), "programs 2 to 1"),
        ((108, 3, 2, 70.0, 70.0), "spills 0 to 3"),
    ],
)
def test_what_is_worse_has_a_line(after, said):
    found = changes.report(BEFORE, text(NEW, row("sweep", "jsd", *after)))
    assert f"### Worse\n\n- jsd, sweep: {said}\n\nNot" in found


def test_every_committed_table_is_understood():
    for file in RESULTS.glob("*-compiled/**/*.md"):
        assert len(changes.calls(file.read_text())) > 10, file
