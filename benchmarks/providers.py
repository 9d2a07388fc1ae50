"""Who computes a loss: functions (*operands, **options) -> 0-d loss, by name or from a checkout."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Loss = Callable[..., Tensor]


class NotOffered(Exception):
    """The provider has no such loss: no row, and its reason under the table."""


@dataclass(frozen=True)
class Provider:
    """A loss under a name; with `mode`, through torch.compile."""

    name: str
    loss: Loss
    mode: str | None = None

    def bind(self, options: Mapping[str, Any]) -> Loss:
        def bound(*operands: Tensor | None) -> Tensor:
            return self.loss(*operands, **options)

        if self.mode is None:
            return bound
        return torch.compile(bound, mode=self.mode, dynamic=False)

    @property
    def ours(self) -> bool:
        return self.name.startswith("fastkd")


def by_name(*providers: Provider) -> dict[str, Provider]:
    return {provider.name: provider for provider in providers}


def compiled(eager: Loss) -> tuple[Provider, Provider]:
    """What torch.compile makes of the eager loss, in its two modes that keep ordinary memory."""
    autotune = "max-autotune-no-cudagraphs"
    return (
        Provider("compile", eager, mode="default"),
        Provider("compile-max-autotune", eager, mode=autotune),
    )


def find(text: str, known: Mapping[str, Provider]) -> Provider:
    """A provider by its name, or `path.to.module:function` as seen from the working directory."""
    if ":" not in text:
        if text not in known:
            raise ValueError(
                f"unknown provider {text!r}: one of {', '.join(known)}, or path.to.module:function"
            )
        return known[text]
    module, _, function = text.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        return Provider(text, getattr(importlib.import_module(module), function))
    except (ImportError, AttributeError) as error:
        raise ValueError(f"unknown provider {text!r}: {error}") from None
