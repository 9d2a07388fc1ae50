"""Who looks on, and what may be asked of a tensor then: its values, or whether it trains."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

DEBUG = os.environ.get("FASTKD_DEBUG") == "1"


def trains(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled()


def trained_of(operands: dict[str, Any]) -> list[str]:
    return [name for name, value in operands.items() if trains(value)]


def traced() -> bool:
    """Whether the compiler or a functorch transform looks on, for which values are not there."""
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None


def watched() -> bool:
    """Whether any of these or a dispatch mode looks on, which may have no values either."""
    return traced() or _get_current_dispatch_mode() is not None


def opaque(tensor: Tensor) -> bool:
    """Whether a tensor holds no numbers of its own: fake, on the meta device, or a wrapper."""
    return tensor.is_meta or type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def may_read(tensor: Tensor) -> bool:
    """Whether looking at values costs no synchronisation, or was asked for."""
    return not (watched() or opaque(tensor)) and (tensor.device.type == "cpu" or DEBUG)
