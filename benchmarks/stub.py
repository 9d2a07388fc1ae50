"""A stand-in for a GPU that computes nothing.

Tensors stay on the CPU. A kernel is specialised, looked up, compiled for the target or loaded from
Triton's cache as it would be on a GPU; its launch does nothing. So the cache may be filled for a
GPU that is not here, and the host's part of a call be timed.
"""

from __future__ import annotations

from typing import Any

TARGET, PROCESSORS = 90, 132
SHARED = 232448  # bytes to a thread block


class Launcher:
    """Of a compiled kernel, with Triton's arguments."""

    calls = 0

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        Launcher.calls += 1


class Utilities:
    @staticmethod
    def load_binary(name: str, code: bytes, shared: int, device: int) -> tuple[int, ...]:
        """Handles of module and function, registers, spills, threads to a block."""
        return 1, 1, 0, 0, 1024

    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED, "multiprocessor_count": PROCESSORS}


class Driver:
    """What Triton asks of a GPU's driver."""

    utils = Utilities
    launcher_cls = Launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", TARGET, 32)


def install(driver: Any = None) -> None:
    """From now on this process takes the CPU for that GPU."""
    import triton

    triton.runtime.driver.set_active(driver or Driver())
    pretend()


def pretend() -> None:
    """fastkd takes tensors of the CPU for those of a GPU, of so many processors."""
    from fastkd import checks, constants, elementwise
    from fastkd.kernels import bernoulli, events, logits, moments, tuning
    from fastkd.kernels import elementwise as elementwise_kernels

    class Device:
        type, index = "cuda", 0

    schedule, registers, at_once = tuning.schedule, tuning.registers, tuning.at_once
    device: Any = Device()

    def scheduled(rows: int, columns: int, itemsize: int, _: Any, **more: bool) -> Any:
        return schedule(rows, columns, itemsize, device, **more)

    replaced: dict[str, Any] = {
        "schedule": (scheduled, (bernoulli, events, logits, moments)),
        "registers": (lambda _, *of: registers(device, *of), (logits,)),
        "at_once": (lambda _, *of: at_once(device, *of), (logits,)),
        "multiprocessors": (lambda _: PROCESSORS, (tuning, logits)),
        "generation": (lambda _: TARGET // 10, (tuning,)),
        "elementwise": (lambda _: tuning.ELEMENTWISE, (elementwise_kernels,)),
        "_on_triton": (lambda *operands: operands[0].dtype.itemsize < 8, (elementwise,)),
        "_stream": (lambda _: 0, (constants,)),
        "backend": (lambda name, *_: "triton" if name == "auto" else name, (checks,)),
    }
    for name, (new, owners) in replaced.items():
        for owner in owners:
            getattr(owner, name)  # raises where it has gone
            setattr(owner, name, new)
