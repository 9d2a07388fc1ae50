"""An environment with other versions of some packages, in front of this one."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch


def with_others(folder, *requirements):
    """Its Python, with these installed in front of this environment's packages.

    What they need is taken from here where it fits, and torch stays the one under test. Where they
    cannot be installed the test is skipped, but not in CI.
    """
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    behind = {Path(path).resolve() for path in sys.path if path.endswith("site-packages")}
    behind |= {Path(torch.__file__).parents[1]}
    (site / "behind.pth").write_text("\n".join(map(str, behind)))
    kept = folder / "constraints.txt"
    kept.write_text(f"torch=={torch.__version__}")
    pip = (sys.executable, "-m", "pip", "--python", python, "--retries", "1")
    installed = subprocess.run(
        [*pip, "install", "-c", kept, *requirements], capture_output=True, text=True
    )
    if installed.returncode and "CI" not in os.environ:
        pytest.skip(f"{' and '.join(requirements)} do not install here: {installed.stderr[-300:]}")
    assert installed.returncode == 0, installed.stderr
    return python
