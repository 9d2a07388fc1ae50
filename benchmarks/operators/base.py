"""What the harness asks of an operator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.providers import Provider

# The leaves, which are those that require a gradient, and what else the loss takes.
Operands = tuple[Tensor | None, ...]


class Operator(ABC):
    """One file each: the operands, the truth in fp64, the bytes, and who else computes it.

    A provider of it is a function (*operands, **options) -> 0-d loss.
    """

    name: ClassVar[str]
    divergences: ClassVar[Sequence[str]]
    providers: ClassVar[Mapping[str, Provider]]
    # Tensors of N * V entries that a pass must read or write at least: everyone's numerator. A
    # backward alone has none, since what it must still do is the forward's choice.
    traffic: ClassVar[Mapping[str, int]]

    @abstractmethod
    def operands(
        self, case: Case, divergence: str, dtype: torch.dtype, generator: torch.Generator
    ) -> Operands:
        """Random operands on the generator's device."""

    def options(self, divergence: str, temperature: float) -> dict[str, Any]:
        """The keyword arguments of every provider."""
        return {}

    def change(self, operands: Operands) -> None:
        """Changes them in place so that loss and gradient change too; twice is as before."""
        first, *_ = operands
        assert first is not None
        first.neg_()

    @abstractmethod
    def row_losses(self, operands: Operands, options: Mapping[str, Any]) -> Tensor:
        """The naive loss of each row, 0 where ignored; differentiable, never fast."""

    def divisor(self, operands: Operands) -> float:
        """What the sum of the rows' losses is divided by."""
        first, *_ = operands
        assert first is not None
        return len(first)

    def rows(self, operands: Operands, index: Any) -> Operands:
        """Some rows of the operands, detached, the leaves as leaves again."""
        return tuple(
            x if x is None else x.detach()[index].requires_grad_(x.requires_grad) for x in operands
        )
