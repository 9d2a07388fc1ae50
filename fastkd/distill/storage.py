"""The folder of a run: every file is written whole under another name, and then renamed."""

from __future__ import annotations

import contextlib
import datetime
import errno
import io
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .errors import RunError, Usage, one_line

CHECKPOINT = "checkpoint.pt"  # of the default job
INPUTS = "inputs.json"  # of the user's models: teacher and settings that the run began with
CONFIG = "config.toml"
METRICS = "metrics.json"
TRAINER_STATE = "trainer_state.json"
# What a process leaves that is killed while it replaces a file.
LEFTOVER = re.compile(r"\..+\.\d+")


@contextlib.contextmanager
def new_folder(out: str | None, *, ours: str = "") -> Iterator[Path]:
    """A folder for one run, which no other run may use meanwhile.

    It must be new or empty, so that nothing of the user's is overwritten; or hold the file `ours`,
    which an earlier run of the same command left there to be added to. It goes again if nothing
    came into it.
    """
    folder = Path(out) if out else dated()
    with _writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        if not (ours and (folder / ours).exists()):
            _check_empty(folder)
        for path in _leftovers(folder):
            path.unlink(missing_ok=True)
        with _writable(folder), tempfile.TemporaryFile(dir=folder):
            pass  # before hours go into training
        try:
            yield folder
        finally:
            with contextlib.suppress(OSError):
                folder.rmdir()


def dated(suffix: str = "") -> Path:
    """The folder of a run that was told none."""
    return Path("runs") / (datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S") + suffix)


@contextlib.contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Usage(f"cannot write to {folder}: {error.strerror}; choose another --out") from None


def _check_empty(folder: Path) -> None:
    if (folder / METRICS).exists():
        raise Usage(f"{folder} already holds a run: choose another --out")
    if (folder / CONFIG).exists():
        raise Usage(
            f"{folder} holds a run that stopped: --resume {folder}, or choose another --out"
        )
    for path in set(folder.iterdir()) - set(_leftovers(folder)):
        raise Usage(
            f"{folder} is not empty: it holds {path.name}; choose a new or empty folder as --out"
        )


def _leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.glob(".*") if LEFTOVER.fullmatch(path.name)]


@contextlib.contextmanager
def old_folder(resume: str) -> Iterator[Path]:
    """The folder of an unfinished run, which no other run may use meanwhile."""
    folder = Path(resume)
    if not os.path.isdir(folder):
        raise Usage(f"--resume {folder}: there is no such folder")
    if (folder / METRICS).exists():
        raise Usage(f"--resume {folder}: this run is finished, see {folder / METRICS}")
    if not (folder / CONFIG).exists():
        raise Usage(f"--resume {folder}: it holds no {CONFIG}, so no run began there")
    with _locked(folder):
        yield folder


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Refuses a folder that another run is using; the system forgets the lock with the process."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise Usage(f"another run is using {folder}: choose another --out") from None
    except OSError:  # some network file systems lock no folders
        pass
    try:
        yield
    finally:
        os.close(handle)


def reason(error: BaseException, path: Path) -> str:
    """Why a file was not written; libraries have words of their own for a full disk."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if shutil.disk_usage(path if path.exists() else path.parent).free < 2**20:
        return os.strerror(errno.ENOSPC)
    if "PytorchStreamWriter" in str(error) or "inline_container" in str(error):
        return "PyTorch could not write all of it: is the disk full?"
    return one_line(error)


def write(path: Path, data: bytes | str) -> None:
    """Writes as `replace` does; raises RunError where the file cannot be written."""
    try:
        replace(path, data)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}") from None


def replace(path: Path, data: bytes | str) -> None:
    """Writes all of it or nothing: a reader never meets half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def json_text(values: Any) -> str:
    """The values as JSON, which knows no NaN and no infinity: null in their place."""
    return json.dumps(_finite(values), indent=2, allow_nan=False) + "\n"


def _finite(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: _finite(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write(folder / CHECKPOINT, buffer.getvalue())


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """None where the run was ended before the first checkpoint."""
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises many kinds here, and each means the same
        raise RunError(
            f"{path} is broken and cannot be read ({type(error).__name__}): "
            "delete the folder and start again"
        ) from None
    if not isinstance(state, dict):
        raise RunError(f"{path} is no checkpoint of fastkd distill: delete it and start again")
    return state


# --- checkpoints of the Trainer --------------------------------------------------------------


def last_checkpoint(folder: Path) -> Path | None:
    """The latest that was written to the end."""
    found = [path for path in folder.glob("checkpoint-*") if _whole(path)]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def drop_halves(folder: Path) -> bool:
    """Removes checkpoints that were not; whether there were any."""
    halves = [path for path in folder.glob("checkpoint-*") if not _whole(path)]
    for path in halves:
        shutil.rmtree(path, ignore_errors=True)
    return bool(halves)


def _whole(checkpoint: Path) -> bool:
    """The state of the trainer comes last, and a kill may leave half of it too."""
    try:
        json.loads((checkpoint / TRAINER_STATE).read_bytes())
    except (OSError, ValueError):
        return False
    return True
