"""fastkd inside the trainers of others: one module for each, imported by its full name."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version


def require(package: str, oldest: str, below: str, extra: str | None = None) -> None:
    """Refuses a package that is absent, or of a version that fastkd was not tested with.

    Raises:
        ImportError: in one line, with the command that mends it.
    """
    wanted = f'pip install "{package}>={oldest},<{below}"'
    command = wanted if extra is None else f'pip install "fastkd[{extra}]"'
    try:
        found = version(package)
    except PackageNotFoundError:
        raise ImportError(
            f"fastkd.integrations needs {package}, which is not installed: {command}"
        ) from None
    if not numbers(oldest) <= numbers(found) < numbers(below):
        raise ImportError(
            f"fastkd.integrations takes {package} from {oldest} up to, but not with, {below}; "
            f"this is {found}: {wanted}"
        )


def numbers(text: str) -> tuple[int, ...]:
    """The numbers of a version: (5, 23) of 5.23.0.dev0."""
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])
