"""config.toml: the settings of a run as a file, which --config takes."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from .errors import Usage, needs, one_line
from .settings import Common


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
    lines = []
    for item in dataclasses.fields(settings):
        value = getattr(settings, item.name)
        value = list(value) if isinstance(value, tuple) else value
        # Strings, lists, numbers and booleans of these kinds are spelt in TOML as in JSON.
        line = f"{item.name} = {json.dumps(value, ensure_ascii=False)}"
        lines.append(f"{line}  # {item.metadata['help']}")
    return "\n".join(lines) + "\n"
