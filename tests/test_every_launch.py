"""Every launch that a user can reach compiles: see tests/ptx/scan.py. tests/test_old_triton.py runs
it under other Tritons."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need triton")

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_every_launch_compiles(request):
    # Others of these few are compiled by tests/test_old_triton.py.
    few = [] if request.config.getoption("--full") else ["--few", "--part", "1/6"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.ptx.scan", *few],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout, done.stderr[-5000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert len(results) > 10
    assert {call: wrong for call, wrong in results.items() if wrong} == {}
