"""Without a GPU, kernels run in Triton's interpreter, which must be chosen before import."""

import os
import signal
from contextlib import ExitStack, nullcontext

import pytest
import torch

from tests.schedules import forced

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup hands on that it is ignored

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"


def _patch_language_once() -> None:
    """The interpreter patches triton.language for every function that a kernel calls, each time,
    which takes two thirds of its time; the first time is enough, as nothing takes it back.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    patched = set()

    def call(function, *arguments, **more):
        if function.fn not in patched:
            patched.add(function.fn)
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*arguments, **more)

    interpreter.InterpretedFunction.__call__ = call


if DEVICE == "cpu":
    _patch_language_once()


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="leave out the tests marked slow")
    parser.addoption("--full", action="store_true", help="run the tests marked full too")
    parser.addoption("--schedule", help="force one schedule of the kernels: see schedules.py")


def pytest_collection_modifyitems(config, items):
    left_out = {"slow": config.getoption("--quick"), "full": not config.getoption("--full")}
    marks = {mark for mark, out in left_out.items() if out}
    kept = [item for item in items if not marks & set(item.keywords)]
    config.hook.pytest_deselected(items=list(set(items) - set(kept)))
    items[:] = kept


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _device_lost():
    """A device that a kernel broke fails whatever its process runs later: xdist begins another."""
    yield
    if DEVICE == "cuda" and "PYTEST_XDIST_WORKER" in os.environ:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(3)


@pytest.fixture
def device():
    return DEVICE


@pytest.fixture(autouse=True)
def _schedule(request):
    plan = request.config.getoption("--schedule")
    with forced(plan) if plan else nullcontext():
        yield


@pytest.fixture
def force():
    """force(plan) makes the launchers use one schedule, until the test ends."""
    with ExitStack() as stack:
        yield lambda plan: stack.enter_context(forced(plan))
