"""Numbers as users pass them, of NumPy's types say, as Python's own."""

from __future__ import annotations

import numbers
from typing import Any

import torch

MOST = 2**63 - 1


def number(name: str, value: Any) -> Any:
    """The number in Python's own type; a compiler's symbol remains one."""
    if type(value) is float or isinstance(value, (torch.SymFloat, torch.SymInt)):
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not isinstance(value, numbers.Integral):
        return float(value)
    whole = int(value)
    if abs(whole) > MOST:
        raise ValueError(f"{name} must be a number of 64 bits, got one of {whole.bit_length()}")
    return whole


def own_numbers(parameters: Any) -> None:
    """Makes the fields of a frozen dataclass Python's own numbers; refuses what is none."""
    for name, value in vars(parameters).items():
        found = number(f"{type(parameters).__name__}: {name}", value)
        if found is not value:
            object.__setattr__(parameters, name, found)
