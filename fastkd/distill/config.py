"""config.toml: the settings of a run as a file, which --config takes."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import RunError, Usage, needs, one_line
from .settings import Common
from .storage import CONFIG

# What may change while a run is stopped: the student does not depend on it. A teacher is known by
# its weights, wherever they lie.
MAY_CHANGE = {
    "checkpointing", "chunk_mib", "device", "keep", "report_to", "teacher", "teacher_cache",
    "teacher_device", "threads",
}  # fmt: skip


def read(path: Path) -> dict[str, Any]:
    """The settings of a TOML file, not yet checked."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        needs("tomli")
        import tomli as tomllib
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise Usage(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # of TOML, of UTF-8, of 5,000 digits
        raise Usage(f"{path} is not TOML: {one_line(error)}") from None


def text(settings: Common) -> str:
    """The settings as a file that --config takes."""
    about = {item.name: item.metadata["help"] for item in dataclasses.fields(settings)}
    return "".join(f"{line(*item)}  # {about[item[0]]}\n" for item in values(settings).items())


def values(settings: Common) -> dict[str, Any]:
    """The settings by name, as TOML and JSON have them."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(settings).items()
    }


def line(name: str, value: Any) -> str:
    """A line of TOML, in which values of these kinds are spelt as in JSON."""
    return f"{name} = {json.dumps(value, ensure_ascii=False)}"


def check_same(settings: Common, before: Mapping[str, Any]) -> None:
    """Refuses to go on with other settings than a run began with."""
    for name, value in values(settings).items():
        if name not in MAY_CHANGE and before.get(name, value) != value:
            raise RunError(
                f"{CONFIG} has {line(name, value)}, and this run began with "
                f"{line(name, before[name])}: put that back, or start another run"
            )
