"""Without a GPU, kernels run in Triton's interpreter, which must be chosen before import."""

import dataclasses
import functools
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
if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores: more threads wait for each other by spinning, which takes as long
    # again as what they compute. So for the processes that tests begin.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


def _quicken_interpreter() -> None:
    """What the interpreter does again for every operation, and need not, takes most of its time.

    It patches triton.language for each function that a kernel calls, which nothing takes back; it
    lists all types to find that of NumPy; and it adds in 64 bits what no tensor of a test is large
    enough to make overflow in 32.
    """
    try:
        from triton import language
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
    of_scalar = functools.cache(interpreter._get_np_dtype)
    interpreter._get_np_dtype = lambda type: of_scalar(
        language.uint64 if type.scalar.is_ptr() else type.scalar
    )
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


if DEVICE == "cpu":
    _quicken_interpreter()


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="leave out the tests marked slow")
    parser.addoption("--full", action="store_true", help="run the tests marked full too")
    parser.addoption("--schedule", help="force one schedule of the kernels: see schedules.py")


def pytest_configure(config):
    # xdist begins with the files of many tests; those of a few that compile for a minute come last
    # then, beside idle workers.
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(config, items):
    left_out = {"slow": config.getoption("--quick"), "full": not config.getoption("--full")}
    marks = {mark for mark, out in left_out.items() if out}
    kept = [item for item in items if not marks & set(item.keywords)]
    config.hook.pytest_deselected(items=list(set(items) - set(kept)))
    items[:] = kept


@pytest.fixture(scope="module")
def as_of_many():
    """The PyTorch path takes the few logits of a test as it takes many: see eager/solver.py."""
    from fastkd.eager import solver

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solver, "FEW", 0)
        yield


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def two_threads():
    """What takes one thread for itself must give them back."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


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


@pytest.fixture
def on_device():
    """What a test makes without a word of where lies on the device, as kernels need it."""
    with torch.device(DEVICE) if DEVICE != "cpu" else nullcontext():
        yield


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
