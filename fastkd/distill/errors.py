"""What goes wrong outside the code: one clear line on the terminal, never a traceback."""

from __future__ import annotations

import difflib
import importlib
import logging
from collections.abc import Iterable
from typing import Any


class RunError(Exception):
    """Something that the user can mend; `code` is the exit code."""

    code = 1


class Usage(RunError):
    """What was asked for cannot be."""

    code = 2


class Interrupted(RunError):
    """Ctrl-C, after the checkpoint was written."""

    code = 130


def needs(*modules: str, extra: str = "distill") -> None:
    """Refuses to go on where a package of an extra is missing."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            if error.name != module:  # it is there, and broken
                raise RunError(f"{module} does not import: {error}") from error
            wanted = f'"fastkd[{extra}]"' if extra else module
            raise Usage(
                f"this needs {module}, which is not installed: pip install {wanted}"
            ) from None


def hush_torchao() -> None:
    """transformers imports it where it is installed, and it warns of kernels for other devices."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def known(what: str, name: Any, names: Iterable[str]) -> None:
    """Refuses a name that is not among `names`, and says which comes near."""
    names = list(names)
    if name not in names:
        near = difflib.get_close_matches(str(name), names, n=1)
        hint = (
            f"did you mean {near[0]!r}?" if near else f"there are {', '.join(filter(None, names))}"
        )
        raise Usage(f"{what} {name!r} is unknown: {hint}")


def in_range(what: str, value: float, interval: str) -> None:
    """Refuses a number outside of an interval, as in '(0, 1]'; NaN lies in none."""
    low, high = map(float, interval[1:-1].split(","))
    above = value > low if interval[0] == "(" else value >= low
    below = value < high if interval[-1] == ")" else value <= high
    if not (above and below):
        raise Usage(f"{what} must lie in {interval}, got {value}")


def one_line(error: BaseException) -> str:
    """The first line of what an exception says."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
