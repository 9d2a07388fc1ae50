"""Hidden states with their output head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastkd import checks

from . import checked


@dataclass(frozen=True, eq=False)
class LinearHead:
    r"""Hidden states and the output head that makes logits of them.

    z = s (h W^T + b), and with a soft cap c: z = c tanh(s (h W^T + b) / c).

    A teacher that is sent as hidden states costs 2 H bytes per token in bf16, where its logits cost
    2 V, and its top K about 4 K: with H = 4096, V = 128256 and K = 64 that is 8 KiB, 251 KiB and
    0.3 KiB. It is exact over the whole vocabulary.

    How many rows make a chunk, `chunk_bytes` of the loss says.

    A chunk's logits are fp32 whatever the hidden states are. Relative errors of bf16 gradients
    against fp64, at N = 128, H = 256, V = 32000 with logits of standard deviation 3
    (`python -m benchmarks.head_errors`; a rounding to bf16 is 1.7e-3):

        divergence    chunks in fp32: hidden, weight    logits in bf16: hidden, weight
        forward_kl    1.7e-3, 1.7e-3                    1.2e-2, 1.5e-2
        reverse_kl    1.7e-3, 1.7e-3                    1.4e-2, 1.4e-2
        JSD(0.5)      1.7e-3, 1.7e-3                    1.2e-2, 1.4e-2

    Args:
        hidden: hidden states h, [..., H].
        weight: of the head, [V, H], as in `torch.nn.Linear`.
        bias: [V], or None.
        logit_scale: s, by which logits are multiplied (Cohere; 1 / `logits_scaling` of Granite).
        logit_softcap: c > 0 (Gemma 2).

    Raises:
        TypeError, ValueError: with what was expected and what came.
        NotImplementedError: weights that are quantised, sharded, or flattened by FSDP.

    Example:
        >>> import torch
        >>> head = LinearHead(torch.randn(2, 5, 16), torch.randn(100, 16))
        >>> head.shape
        torch.Size([2, 5, 100])
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float | None = None
    logit_softcap: float | None = None

    def __post_init__(self) -> None:
        checked.floating("LinearHead: hidden", self.hidden)
        _plain_weight(self.weight)
        columns, width = self.weight.shape
        if self.hidden.dim() == 0 or self.hidden.size(-1) != width:
            raise ValueError(
                f"LinearHead: hidden must be [..., {width}] for a weight of "
                f"{tuple(self.weight.shape)}, which is [V, H], got {tuple(self.hidden.shape)}"
            )
        if self.bias is not None:
            checked.floating("LinearHead: bias", self.bias)
            if self.bias.shape != (columns,):
                raise ValueError(
                    f"LinearHead: bias must be [{columns}], got {tuple(self.bias.shape)}"
                )
        checked.one_device("LinearHead", hidden=self.hidden, weight=self.weight, bias=self.bias)
        for name in ("logit_scale", "logit_softcap"):
            value = getattr(self, name)
            if value is not None:
                value = checks.finite(f"LinearHead: {name}", value)
                if value <= 0:
                    raise ValueError(f"LinearHead: {name} must be > 0, got {value!r}")
                object.__setattr__(self, name, value)

    @property
    def outline(self) -> Tensor:
        """Shape, dtype, device of its logits, and whether they train: a tensor without memory."""
        sources = [x for x in (self.hidden, self.weight, self.bias) if x is not None]
        dtype = torch.promote_types(self.hidden.dtype, self.weight.dtype)
        return checked.outline(self.shape, dtype, sources)

    def logits(self) -> Tensor:
        """All of them, [..., V], by plain PyTorch."""
        dtype = self.outline.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        logits = F.linear(self.hidden.to(dtype), self.weight.to(dtype), bias)
        if self.logit_scale is not None:
            logits = logits * self.logit_scale
        cap = self.logit_softcap
        return logits if cap is None else cap * (logits / cap).tanh()

    @property
    def shape(self) -> torch.Size:
        """The shape of the logits that it stands for, [..., V]."""
        return torch.Size((*self.hidden.shape[:-1], self.weight.size(0)))


def _plain_weight(weight: Any) -> None:
    """Refuses what is no matrix of numbers."""
    name = "LinearHead: weight"
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"{name} must be a tensor, got {type(weight).__name__}: of a layer pass its weight"
        )
    if hasattr(weight, "device_mesh"):
        raise NotImplementedError(f"{name} is a DTensor, not supported yet: pass full_tensor()")
    wrapped = is_traceable_wrapper_subclass(weight)
    if wrapped or not (weight.dtype.is_floating_point or weight.dtype.is_complex):
        what = type(weight).__name__ if wrapped else weight.dtype
        raise NotImplementedError(
            f"{name} is quantised ({what}), not supported yet: dequantise it, or pass the logits"
        )
    checked.floating(name, weight)
    if weight.dim() == 1:
        raise NotImplementedError(
            f"{name} must be [V, H], got {tuple(weight.shape)}: where FSDP has flattened it, "
            "use it inside FullyShardedDataParallel.summon_full_params"
        )
    if weight.dim() != 2:
        raise ValueError(f"{name} must be [V, H], got {tuple(weight.shape)}")
