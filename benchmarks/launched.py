"""A plugin of pytest for benchmarks.cache: tests launch on the stand-in, and judge nothing.

For `python -O`, which leaves assertions out, as results are what memory held.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch

# Before tests/conftest.py chooses the interpreter for what is imported from then on.
from fastkd.kernels import bernoulli, elementwise, events, logits, moments  # noqa: F401
from tests import closeness

from . import cache

FOUND = cache.install()


def pytest_configure(config: Any) -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    for owner in (torch.testing, closeness):
        for name in [name for name in vars(owner) if name.startswith("assert_")]:
            setattr(owner, name, lambda *_, **__: None)


def pytest_unconfigure(config: Any) -> None:
    print(json.dumps(FOUND))
