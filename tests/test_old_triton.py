"""The oldest Triton that pyproject.toml allows, in an environment of its own."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
# The interpreter of Triton 3.6 does not know NumPy 2.4.
OLDEST = ("triton==3.6.0", "numpy<2.4")


@pytest.mark.slow
def test_kernels_run_and_compile_under_the_oldest_triton(tmp_path):
    venv.create(tmp_path, symlinks=True)
    python = tmp_path / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "--retries", "1")
    installed = subprocess.run([*pip, "install", *OLDEST], capture_output=True, text=True)
    if installed.returncode and "CI" not in os.environ:
        pytest.skip(f"{' and '.join(OLDEST)} cannot be installed here: {installed.stderr[-300:]}")
    assert installed.returncode == 0, installed.stderr

    # torch and pytest come from this environment, behind the new one's own packages.
    (site,) = tmp_path.glob("lib/python*/site-packages")
    (site / "behind.pth").write_text(str(Path(torch.__file__).parents[1]))
    versions = "import numpy, triton; print(triton.__version__, numpy.__version__ < '2.4')"
    used = subprocess.run([python, "-c", versions], capture_output=True, text=True, check=True)
    assert used.stdout.split() == ["3.6.0", "True"]

    tests = ("tests/test_kernels.py", "tests/test_ahead_of_time.py", "--quick")
    done = subprocess.run(
        [python, "-m", "pytest", "-p", "no:cacheprovider", *tests],
        cwd=ROOT,
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
