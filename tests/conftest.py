"""Without a GPU, kernels run in Triton's interpreter, which must be chosen before import."""

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="leave out the tests marked slow")
    parser.addoption("--full", action="store_true", help="run the tests marked full too")


def pytest_collection_modifyitems(config, items):
    left_out = {"slow": config.getoption("--quick"), "full": not config.getoption("--full")}
    marks = {mark for mark, out in left_out.items() if out}
    kept = [item for item in items if not marks & set(item.keywords)]
    config.hook.pytest_deselected(items=list(set(items) - set(kept)))
    items[:] = kept


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def device():
    return DEVICE
