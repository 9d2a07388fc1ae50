"""Who looks on, and what may be asked of a tensor then: its values, or whether it trains.

What PyTorch's dispatcher does not say in public is asked here, and nowhere else.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, _autograd, _functorch, _SetExcludeDispatchKeyGuard
from torch.utils._python_dispatch import _get_current_dispatch_mode

DEBUG = os.environ.get("FASTKD_DEBUG") == "1"
# Asked once, since the compiler of PyTorch 2.11 cannot trace the question.
DEVICES = ("cpu", "cuda", "hpu", "ipu", "maia", "mps", "mtia", "privateuseone", "xla", "xpu")
AUTOCASTS = [device for device in DEVICES if torch.amp.is_autocast_available(device)]


def trains(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled()


def trained_of(operands: dict[str, Any]) -> list[str]:
    return [name for name, value in operands.items() if trains(value)]


def traced() -> bool:
    """Whether the compiler or a functorch transform looks on, for which values are not there."""
    return torch.compiler.is_compiling() or transformed()


def transformed() -> bool:
    """Whether a functorch transform looks on."""
    return _functorch.peek_interpreter_stack() is not None


def transforms() -> set[str]:
    """The functorch transforms that look on, by PyTorch's names: Grad, Vmap, Jvp."""
    if torch.compiler.is_compiling() or not transformed():
        return set()
    return {interpreter.key().name for interpreter in _functorch.get_interpreter_stack()}


def watched() -> bool:
    """Whether any of these or a dispatch mode looks on, which may have no values either."""
    return traced() or _get_current_dispatch_mode() is not None


def opaque(tensor: Tensor) -> bool:
    """Whether a tensor holds no numbers of its own: fake, on the meta device, or a wrapper."""
    return tensor.is_meta or type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def may_read(tensor: Tensor) -> bool:
    """Whether looking at values costs no synchronisation, or was asked for."""
    return not (watched() or opaque(tensor)) and (tensor.device.type == "cpu" or DEBUG)


def frozen(tensor: Tensor) -> bool:
    """Whether autograd lets nobody write to it: a view as of split, or of a module with a full
    backward hook.
    """
    if traced() or tensor._base is None:
        return False
    return _autograd._get_creation_meta(tensor) != _autograd.CreationMeta.DEFAULT


def autocasts(device: str) -> bool:
    """Whether autocast is on for a type of device; some, as meta, know none."""
    return device in AUTOCASTS and torch.is_autocast_enabled(device)


@contextlib.contextmanager
def autograd() -> Iterator[None]:
    """Autograd inside an operator, whose body the dispatcher runs with autograd's keys excluded.

    torch.func.grad is no help in a compiled function, which excludes functorch's keys too. No
    public context takes in ADInplaceOrView, without which a view changed in place goes unseen.
    """
    views = _SetExcludeDispatchKeyGuard(DispatchKey.ADInplaceOrView, False)
    with torch.inference_mode(False), views, _kept_as_it_is():
        yield


def _kept_as_it_is() -> AbstractContextManager[Any]:
    """Without the caller's hooks for what autograd saves: a checkpoint would run all that it holds
    once more for what is used at once, and save_on_cpu copy it twice.
    """
    if _autograd._top_saved_tensors_default_hooks(True) is None:
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_itself, _itself)


def _itself(tensor: Tensor) -> Tensor:
    return tensor
