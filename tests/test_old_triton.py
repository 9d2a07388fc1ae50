"""The oldest Triton that pyproject.toml allows and the newest, in environments of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
OLDEST, NEWEST = ("triton==3.6.0",), ("triton==3.9.0",)
INTERPRETED = (*OLDEST, "numpy<2.4")  # the interpreter of Triton 3.6 does not know NumPy 2.4


@pytest.fixture
def run(tmp_path):
    """run(packages, *commands): each by `python -m`, with these before all that is here."""

    def run_(packages: tuple[str, ...], *commands: tuple[str, ...]) -> None:
        venv.create(tmp_path, symlinks=True)
        python = tmp_path / "bin" / "python"
        pip = (sys.executable, "-m", "pip", "--python", python, "--retries", "1", "install")
        done = subprocess.run([*pip, *packages], capture_output=True, text=True)
        if done.returncode and "CI" not in os.environ:
            pytest.skip(f"{' and '.join(packages)} cannot be installed here: {done.stderr[-300:]}")
        assert done.returncode == 0, done.stderr

        # torch and pytest come from this environment, behind the new one's own packages.
        (site,) = tmp_path.glob("lib/python*/site-packages")
        (site / "behind.pth").write_text(str(Path(torch.__file__).parents[1]))
        version = "import triton; print(triton.__version__)"
        used = subprocess.run([python, "-c", version], capture_output=True, text=True, check=True)
        assert f"triton=={used.stdout.strip()}" == packages[0]

        environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
        environment.pop("TRITON_INTERPRET", None)  # read when Triton is imported
        for command in commands:
            done = subprocess.run(
                [python, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]

    return run_


AMD = ("benchmarks.compiled", "--json", "--part", "quick", "--target", "gfx942")
# What Triton 3.6 did not compile once, and the scan has not.
PIECES = (
    *("benchmarks.compiled", "--json", "--target", "sm_90", "--divergence", "forward_kl"),
    *("--configuration", "listed, split", "shared"),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("packages", "more"), [(OLDEST, [AMD, PIECES]), (NEWEST, [])], ids=["oldest", "newest"]
)
def test_launches_compile(packages, more, run):
    """A few for sm_90, of each divergence some, and down to the machine code for gfx942."""
    run(packages, ("tests.ptx.scan", "--few", "--part", "0/8"), *more)


@pytest.mark.full
@pytest.mark.parametrize("packages", [OLDEST, NEWEST], ids=["oldest", "newest"])
def test_every_launch_compiles(packages, run):
    run(packages, ("tests.ptx.scan",))


@pytest.mark.full
def test_kernels_run_and_compile_under_the_oldest_triton(run):
    tests = ("tests/test_kernels.py", "tests/test_ahead_of_time.py", "--quick")
    run(INTERPRETED, ("pytest", "-p", "no:cacheprovider", *tests))
