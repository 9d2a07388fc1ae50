"""A divergence is four edits, as CONTRIBUTING says: made in a copy of the tree and found there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.running import NO_TRITON

pytestmark = [pytest.mark.slow, NO_TRITON]

ROOT = Path(__file__).parents[1]
CLASS = '''

@dataclass(frozen=True)
class Hellinger(Divergence):
    r"""Squared Hellinger distance: 1/2 sum (sqrt p - sqrt q)^2, in [0, 1].

    Source: Hellinger 1909.

    Example:
        >>> import torch, fastkd
        >>> z, y = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.0, 2.0]])
        >>> round(fastkd.distillation_loss(z, y, divergence="hellinger").item(), 4)
        0.2658
    """

    name = "hellinger"
    by_name = True

    @staticmethod
    def value(lp, lq, a, b):
        return 0.5 * ((lp / 2).exp() - (lq / 2).exp()) ** 2

    def dual(self):
        return self.name, self.parameters, 1.0
'''
DEVICE = """
@triton.jit
def hellinger(lp, lq, p, q, d, d2, c, a, b):
    root = tl.sqrt(p) - tl.sqrt(q)
    return 0.5 * root * root, -0.5 * root * tl.sqrt(q) - q * c


TABLE = {
    "hellinger": Device(hellinger),
"""
TESTED = "    fastkd.ForwardKL(),"
EDITS = [
    # The class, and its name where a user imports it.
    ("fastkd/divergences/mixtures.py", "\n\n# --- helpers", CLASS + "\n\n# --- helpers"),
    ("fastkd/divergences/__init__.py", "JSD, TVD, SkewKL", "JSD, TVD, Hellinger, SkewKL"),
    ("fastkd/divergences/__init__.py", '    "ForwardKL",', '    "ForwardKL",\n    "Hellinger",'),
    ("fastkd/__init__.py", "    ForwardKL,", "    ForwardKL,\n    Hellinger,"),
    ("fastkd/__init__.py", '    "ForwardKL",', '    "ForwardKL",\n    "Hellinger",'),
    # The device function.
    ("kernels/divergences.py", "\nTABLE = {\n", DEVICE),
    # The parameters to test.
    ("tests/cases.py", TESTED, TESTED + "\n    fastkd.Hellinger(),"),
    # The table.
    ("README.md", "| `tvd` |", "| `hellinger` | `Hellinger()` | squared Hellinger |\n| `tvd` |"),
]  # fmt: skip
BENCHMARKED = """
from benchmarks.cases import OTHERS
from benchmarks.configurations import MAIN, measure, tasks
from benchmarks.operators.logits import KINDS
from tests.test_ahead_of_time import BUDGET, DEAREST
assert ("sm_90", "hellinger") in tasks()
assert "hellinger" in OTHERS and "hellinger" in KINDS
(found,) = measure("sm_90", "hellinger", MAIN[1:2])
assert found.binary.registers > 0 and "hellinger" not in BUDGET
"""
# Its id in the tests, on each path.
TESTS = ["tests/test_logits.py", "tests/test_divergences.py", "tests/test_kernels.py"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    tree = tmp_path_factory.mktemp("tree") / "fastkd"
    names = ("fastkd", "kernels", "tests", "benchmarks", "README.md", "pyproject.toml")
    for name in names:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "results")
            shutil.copytree(source, tree / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(source, tree / name)
    for name, old, new in EDITS:
        text = (tree / name).read_text()
        assert text.count(old) == 1, f"{name}: {text.count(old)} times {old!r}"
        (tree / name).write_text(text.replace(old, new))
    return tree


def run(tree: Path, *command: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=tree, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(tree)} | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_it_is_tested_and_documented(tree):
    """The tests take it up by name, pass, and its example runs."""
    ways = "test_every_divergence or test_values_and_gradients or mixtures"
    chosen = f"Hellinger and ({ways}) or table_lists or documented"
    files = (*TESTS, "tests/test_readme.py", "fastkd/divergences/mixtures.py")
    passed = run(tree, "-m", "pytest", "-v", "-k", chosen, *files)
    for name in (
        "test_every_divergence[forward-Hellinger()-", "test_values_and_gradients[Hellinger()",
        "fastkd.divergences.mixtures.Hellinger", "test_readme.py",
    ):  # fmt: skip
        assert name in passed


def test_it_is_compiled_budgeted_and_benchmarked(tree):
    run(tree, "-c", BENCHMARKED, TRITON_INTERPRET="0")
