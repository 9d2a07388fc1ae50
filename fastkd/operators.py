"""Functions that a tracer sees as one operator, and what makes them and autograd cheap to call.

Where nothing traces they are called without the dispatcher, whose Python is slow after large
tensors have swept the cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch

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
        watched = checks.traced() or torch._C._len_torch_dispatch_stack() > 0
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
