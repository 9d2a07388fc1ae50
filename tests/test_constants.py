"""Numbers that a GPU keeps, by a stand-in for it: when they are filled, and for whom."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastkd
from fastkd import constants
from fastkd.constants import constant

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
FP32 = torch.float32


@pytest.fixture
def gpu(monkeypatch):
    """Two devices: `at` is the current one; streams and captures are by device, fills in order."""
    state = SimpleNamespace(at=0, streams={0: 7, 1: 7}, capturing=set(), filled=[])
    fill = torch.full

    @contextlib.contextmanager
    def at(device):
        before, state.at = state.at, device.index
        yield
        state.at = before

    def full(size, value, *, dtype, device):
        state.filled.append((value, dtype, device))
        return fill(size, value, dtype=dtype)

    fakes = {
        "device": at,
        "is_current_stream_capturing": lambda: state.at in state.capturing,
        "current_stream": lambda: SimpleNamespace(cuda_stream=state.streams[state.at]),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch, "full", full)
    constants._kept.cache_clear()
    yield state
    constants._kept.cache_clear()


def test_a_number_is_filled_once_for_each_dtype_device_and_stream(gpu):
    two = constant(2.0, FP32, FIRST)
    assert (two.item(), two.dtype, two.dim()) == (2.0, FP32, 0)
    assert constant(2.0, FP32, FIRST) is two
    assert len(gpu.filled) == 1
    others = [
        constant(2.5, FP32, FIRST), constant(2.0, torch.float64, FIRST),
        constant(2.0, FP32, SECOND),
    ]  # fmt: skip
    gpu.streams[0] = 8
    others.append(constant(2.0, FP32, FIRST))
    assert len(gpu.filled) == 5
    assert [(x.item(), x.dtype) for x in others] == [
        (2.5, FP32), (2.0, torch.float64), (2.0, FP32), (2.0, FP32),
    ]  # fmt: skip
    assert [device for *_, device in gpu.filled] == [FIRST, FIRST, FIRST, SECOND, FIRST]
    gpu.streams[0] = 7
    assert constant(2.0, FP32, FIRST) is two


@pytest.mark.parametrize("device", [FIRST, SECOND])
def test_a_graph_fills_its_own_numbers(device, gpu):
    """Whatever device is the current one."""
    kept = constant(2.0, FP32, device)
    gpu.capturing = {device.index}
    inside = [constant(2.0, FP32, device), constant(3.0, FP32, device)]
    assert len(gpu.filled) == 3
    assert inside[0] is not kept
    gpu.capturing = set()
    after = constant(3.0, FP32, device)
    assert after is not inside[1]
    assert len(gpu.filled) == 4
    assert constant(2.0, FP32, device) is kept


def test_a_number_of_inference_mode_may_be_saved_later(gpu):
    with torch.inference_mode():
        constant(2.0, FP32, FIRST)
    x = torch.ones((), requires_grad=True)
    (x * constant(2.0, FP32, FIRST)).backward()
    assert x.grad == 2
    assert len(gpu.filled) == 1


def test_what_a_tracer_sees_is_not_kept(gpu):
    with FakeTensorMode():
        constant(2.0, FP32, FIRST)
    assert type(constant(2.0, FP32, FIRST)) is torch.Tensor
    torch.func.vmap(lambda x: x * constant(3.0, FP32, FIRST))(torch.ones(2))
    assert constants._kept.cache_info().currsize == 1


def test_few_are_kept(gpu):
    for step in range(3 * constants.MOST):
        assert constant(1 + step / 7, FP32, FIRST) == pytest.approx(1 + step / 7)
    assert constants._kept.cache_info().currsize == constants.MOST


def test_a_device_is_asked_once_what_it_is(monkeypatch):
    from fastkd.kernels import tuning

    asked = []
    properties = SimpleNamespace(multi_processor_count=132)
    fakes = {
        "get_device_properties": lambda device: asked.append(device) or properties,
        "get_device_capability": lambda device: asked.append(device) or (9, 0),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    for function in (tuning.multiprocessors, tuning.generation):
        function.cache_clear()
    for _ in range(3):
        for rows, columns in ((4, 10), (64, 128256), (4096, 128256)):
            tuning.schedule(rows, columns, 2, FIRST, once=False)
    assert asked == [FIRST, FIRST]
    for function in (tuning.multiprocessors, tuning.generation):
        function.cache_clear()


def test_a_second_call_fills_nothing(gpu, monkeypatch):
    """Calls on the CPU, which here keeps numbers too; and as many others between."""
    student, teacher = torch.randn(2, 3, 12).unbind()
    student.requires_grad_()

    def call(**options):
        loss = fastkd.distillation_loss(student, teacher, **options)
        return loss.detach(), *torch.autograd.grad(loss, student)

    grid = [
        {"temperature": t, "gradient": gradient}
        for t in (1.5, 4.0)
        for gradient in ("forward", "backward")
    ]
    expected = [call(**options) for options in grid]
    monkeypatch.setattr(constants, "_stream", lambda device: 0)
    for _ in range(2):
        gpu.filled.clear()
        for options, before in zip(grid, expected, strict=True):
            assert all(map(torch.equal, call(**options), before))
    assert not gpu.filled
