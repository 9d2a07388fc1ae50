"""Show what this machine can run, and check it against the reference."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from . import __version__, checks
from .elementwise import kl_div
from .functional import distillation_loss

Loss = Callable[[Tensor, Tensor], Tensor]

# fp32 errors allowed, relative to the largest entry of the truth.
VALUE_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4

ADVICE = """
What to do: a path that fails does not run here or computes wrong numbers; do not train with it.
Bring the GPU driver, PyTorch and Triton up to date. Meanwhile backend="torch" needs none of
Triton. If the failure stays, report it with this output."""


def run() -> int:
    """Print versions, devices and checks; 0 if all is well, else 1."""
    for name, text in _versions():
        print(f"{name:10}{text}")
    print()
    for device in _devices():
        print(f"{device!s:10}{_describe(device)}")
        print(f"{'':10}backend='auto' gives {_auto(device)!r}: {_reason(device)}")
    print()
    healthy = True
    for fault in _faults():
        healthy = False
        print(f"FAIL      {fault}")
    for device in _devices():
        for name, loss in _paths(device):
            try:
                value, gradient = _errors(loss, device)
            except Exception as error:  # whatever a driver or a compiler raises is the finding
                passed, finding = False, f"{type(error).__name__}: {error}"
            else:
                passed = value <= VALUE_TOLERANCE and gradient <= GRADIENT_TOLERANCE
                finding = f"value off by {value:.0e}, gradient by {gradient:.0e}"
            healthy &= passed
            print(f"{'ok' if passed else 'FAIL':10}{device!s:10}{name:30}{finding}")
    if not healthy:
        print(ADVICE)
    return 0 if healthy else 1


def versions(*packages: str) -> dict[str, str | None]:
    """The versions of Python, fastkd and these packages; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "fastkd": __version__}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _versions() -> Iterator[tuple[str, str]]:
    for name, found in versions("torch", "triton", "numpy").items():
        yield name, found or "not installed"
    yield "platform", platform.platform()
    yield "driver", _driver() or "no GPU driver found"


def _driver() -> str | None:
    for path in (Path("/proc/driver/nvidia/version"), Path("/sys/module/amdgpu/version")):
        if path.exists():
            return path.read_text().splitlines()[0]
    return None


def _devices() -> Iterator[torch.device]:
    yield torch.device("cpu")
    for index in range(torch.cuda.device_count()):
        yield torch.device("cuda", index)


def _describe(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{platform.machine()}, {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(device)
    architecture = getattr(properties, "gcnArchName", f"sm_{properties.major}{properties.minor}")
    return f"{properties.name}, {architecture}, {properties.total_memory / 2**30:.0f} GiB"


def _auto(device: torch.device) -> str:
    """What backend="auto" comes to."""
    logits = torch.empty(1, 1, device=device)
    return checks.backend("auto", logits, logits, True)


def _reason(device: torch.device) -> str:
    if device.type == "cpu" and _refusal(device) is None:
        return "TRITON_INTERPRET=1 lets backend='triton' run here, but slowly"
    return _refusal(device) or "Triton compiles for this device"


def _refusal(device: torch.device) -> str | None:
    """Why backend="triton" would not run; None where it would."""
    logits = torch.empty(1, 1, device=device)
    try:
        checks.backend("triton", logits, logits, True)
    except (NotImplementedError, ValueError) as error:
        return str(error)
    return None


def _faults() -> Iterator[str]:
    """What is wrong with the installation, each with what to do."""
    if not checks.HAS_TRITON and platform.system() == "Linux":
        yield 'Triton is not installed: pip install "triton>=3.6"'
    if _driver() and torch.version.cuda is None and torch.version.hip is None:
        yield "there is a GPU driver, but this PyTorch is built for CPUs only: install a GPU build"


def _paths(device: torch.device) -> Iterator[tuple[str, Loss]]:
    """Forward KL at temperature 2, in every way this device can compute it."""
    for backend in ("torch", "triton") if _refusal(device) is None else ("torch",):
        for gradient in ("forward", "backward"):
            yield f"{backend}, gradient={gradient!r}", partial(_distil, backend, gradient)
    yield "kl_div", _kl_div


def _distil(backend: str, gradient: str, student: Tensor, teacher: Tensor) -> Tensor:
    return distillation_loss(
        student,
        teacher,
        temperature=2.0,
        reduction="batchmean",
        gradient=gradient,
        backend=backend,
    )


def _kl_div(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, p = F.log_softmax(student / 2, -1), F.softmax(teacher / 2, -1)
    return 4 * kl_div(log_q, p, reduction="batchmean")


def _errors(loss: Loss, device: torch.device) -> tuple[float, float]:
    """Errors of value and gradient, relative to the largest entry of the fp64 reference."""
    reference = partial(_distil, "reference", "auto")
    truth = _evaluate(reference, torch.device("cpu"), torch.float64)
    pairs = zip(_evaluate(loss, device, torch.float32), truth, strict=True)
    value, gradient = (float((x - y).abs().max() / y.abs().max()) for x, y in pairs)
    return value, gradient


def _evaluate(loss: Loss, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 4, 5003, generator=generator).to(device, dtype).unbind()
    value = loss(student.requires_grad_(), teacher)
    (gradient,) = torch.autograd.grad(value, student)
    return value.detach().double().cpu(), gradient.double().cpu()
