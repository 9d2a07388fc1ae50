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

    Where they cannot be installed the test is skipped, but not in CI.
    """
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "--retries", "1")
    installed = subprocess.run([*pip, "install", *requirements], capture_output=True, text=True)
    if installed.returncode and "CI" not in os.environ:
        pytest.skip(f"{' and '.join(requirements)} do not install here: {installed.stderr[-300:]}")
    assert installed.returncode == 0, installed.stderr
    (site,) = folder.glob("lib/python*/site-packages")
    behind = {Path(path).resolve() for path in sys.path if path.endswith("site-packages")}
    behind |= {Path(torch.__file__).parents[1]}
    (site / "behind.pth").write_text("\n".join(map(str, behind)))
    return python
