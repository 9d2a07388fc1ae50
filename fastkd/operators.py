"""Functions that a tracer sees as one operator, and what makes them and autograd cheap to call.

Where nothing traces they are called without the dispatcher, whose Python is slow after large
tensors have swept the cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import checks

Function = TypeVar("Function", bound=type[torch.autograd.Function])


class Operator:
    """A function that a tracer sees as one call."""

    def __init__(
        self, name: str, function: Callable[..., Any], schema: str, mutates: tuple[str, ...]
    ) -> None:
        self.function = function
        self.traced = torch.library.custom_op(name, function, mutates_args=mutates, schema=schema)
        self.register_fake = self.traced.register_fake

    def __call__(self, *arguments: Any) -> Any:
        watched = checks.watched() or checks.opaque(arguments[0])
        return (self.traced if watched else self.function)(*arguments)


def operator(
    name: str, schema: str, mutates: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], Operator]:
    return lambda function: Operator(name, function, schema, mutates)


def signed(function: Function) -> Function:
    """Keeps the signature of `forward`, for which `apply` looks in each call.

    That takes 30 us, and 100 when the cache is cold.
    """
    forward: Any = function.forward
    forward.__signature__ = inspect.signature(forward)
    return function


def readable(value: Any) -> Any:
    """A tensor as a kernel may read it and autograd may save it; anything else as it is.

    A lazily negated tensor has its sign in a flag, which a kernel does not see. Autograd saves no
    tensor from inference mode; of its memory another tensor is made.
    """
    if not isinstance(value, Tensor) or checks.traced():
        return value
    value = value.resolve_neg()
    if not value.is_inference() or torch.is_inference_mode_enabled():
        return value
    if checks.opaque(value):
        return value.clone()
    alias = torch.empty(0, dtype=value.dtype, device=value.device)
    return alias.set_(value.untyped_storage(), value.storage_offset(), value.size(), value.stride())
