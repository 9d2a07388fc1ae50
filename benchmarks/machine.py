"""What a result was measured on: the device and the versions, and nothing else of the machine."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from fastkd import doctor

from . import cache

ROOT = Path(__file__).parent.parent
PACKAGES = (
    "torch", "triton", "liger-kernel", "trl", "orda-kernel", "quack-kernels", "speculators",
)  # fmt: skip


def device_of(text: str | None) -> torch.device:
    if text is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", 0)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"no device {text!r} here: {reason}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"no clock for device {text!r}: use cpu or cuda")
    return device


def header(
    device: torch.device, arguments: Sequence[str], commit: str | None, module: str = "benchmarks"
) -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "device": _device(device),
        "versions": doctor.versions(*PACKAGES),
        "commit": commit or _commit(),
        "command": command(arguments, module),
    }


def announce(device: torch.device, arguments: Sequence[str], commit: str | None) -> int:
    """Says what is measured on, whether a carried cache serves here, and what runs; 0 if all."""
    for name, value in header(device, arguments, commit).items():
        print(f"{name}: {value}")
    print(cache.verdict()[1], flush=True)
    return doctor.run()


def command(arguments: Sequence[str], module: str = "benchmarks") -> str:
    return shlex.join(["python", "-m", module, *map(_bare, arguments)])


def answers(device: torch.device) -> bool:
    """Whether a device still does what this process asks: none that a kernel has broken does."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def begin_again(module: str, arguments: Sequence[str]) -> NoReturn:
    """In a new process, which a device answers whatever has broken it for this one."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-u", "-m", module, *arguments])


def resident() -> tuple[int, int]:
    """Bytes of this process in memory now, and at most since this was last asked."""
    text = Path("/proc/self/status").read_text()
    now, most = (
        1024 * int(line.split()[1])
        for name in ("VmRSS:", "VmHWM:")
        for line in text.splitlines()
        if line.startswith(name)
    )
    Path("/proc/self/clear_refs").write_text("5")
    return now, most


def _device(device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        return {"name": _processor(), "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_mib": properties.L2_cache_size / 2**20,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda or torch.version.hip,
        **clocks(device),
    }


def clocks(device: torch.device) -> dict[str, str]:
    """Driver, clocks, temperature and power as they are now; empty where nothing tells."""
    fields = (
        "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu",
        "power.draw",
    )  # fmt: skip
    query = ["nvidia-smi", f"--id={device.index or 0}", f"--query-gpu={','.join(fields)}"]
    if device.type != "cuda" or (text := _output([*query, "--format=csv,noheader"])) is None:
        return {}
    values = text.split(", ")  # a sentence, where there is no such GPU
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _commit() -> str | None:
    """Of the checkout, marked where files that it tracks have changed."""
    head = _output(["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"])
    if head is None:
        return None
    status = _output(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"])
    return f"{head} and changes" if status else head


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _bare(argument: str) -> str:
    """Without the folders of this machine."""
    return Path(argument).name if argument.startswith("/") else argument
