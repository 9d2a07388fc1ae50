"""A divergence per token from hidden states and output heads, a chunk of logits at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastkd.functional import distillation_loss

CHUNK = 2**26  # entries of one side's logits at a time: 256 MiB

Gather = Callable[..., AbstractContextManager[Any]]


class Head(NamedTuple):
    """Logits as softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None
    scale: float
    softcap: float | None

    def cast(self, dtype: torch.dtype) -> Head:
        return self._replace(hidden=self.hidden.to(dtype), weight=self.weight.to(dtype))

    def raw(self, rows: slice) -> Tensor:
        """Before scale and softcap, fp32 [n, V]."""
        product = _product(self.hidden[rows], self.weight)
        return product if self.bias is None else product.add_(self.bias.float())

    def logits(self, raw: Tensor) -> Tensor:
        scaled = raw if self.scale == 1 else raw * self.scale
        if self.softcap is None:
            return scaled
        return self.softcap * torch.tanh(scaled / self.softcap)


def divergence(
    student: Head, teacher: Head, gather: Gather, **settings: Any
) -> tuple[Tensor, Tensor]:
    """The divergence of each token and the student's entropy, fp32 [N]; the entropy is detached.

    Args:
        gather: a context in which parameters that are sharded are whole.
        settings: those of `distillation_loss`.
    """
    scales = (student.scale, student.softcap, teacher.scale, teacher.softcap)
    return _PerToken.apply(*student[:3], *teacher[:3], scales, gather, settings)


class _PerToken(Function):
    """Keeps hidden states only: the backward makes each chunk's logits again."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        tensors, (ctx.scales, ctx.gather, ctx.settings) = arguments[:6], arguments[6:]
        ctx.save_for_backward(*tensors)
        ctx.dtypes = [_dtype_of_product(hidden) for hidden in (tensors[0], tensors[3])]
        rows, entropies = tensors[0].new_zeros(2, 0, dtype=torch.float32)
        with _whole(tensors, ctx.gather):
            student, teacher = _heads(tensors, ctx.scales, ctx.dtypes)
            for part in _parts(student):
                loss, metrics = distillation_loss(
                    student.logits(student.raw(part)),
                    teacher.logits(teacher.raw(part)),
                    reduction="none",
                    return_metrics=True,
                    **ctx.settings,
                )
                rows = torch.cat([rows, loss])
                entropies = torch.cat([entropies, metrics.student_entropy])
        ctx.mark_non_differentiable(entropies)
        return rows, entropies

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        sums = [
            torch.zeros_like(tensor, dtype=torch.float32) if wanted else None
            for tensor, wanted in zip(tensors[:3], ctx.needs_input_grad[:3], strict=True)
        ]
        hidden, weight, bias = sums
        with _whole(tensors, ctx.gather):
            student, teacher = _heads(tensors, ctx.scales, ctx.dtypes)
            for part in _parts(student):
                slope = _slope(student, teacher, part, upstream[0], ctx.settings)
                rounded = slope.to(student.weight.dtype)
                if hidden is not None:
                    hidden[part] = _product(rounded, student.weight.t())
                if weight is not None:
                    weight += _product(rounded.t(), student.hidden[part].t())
                if bias is not None:
                    bias += slope.sum(0)
        given = [
            None if total is None else total.to(tensor.dtype)
            for total, tensor in zip(sums, tensors[:3], strict=True)
        ]
        return (*given, *(None,) * 6)


def _slope(
    student: Head, teacher: Head, part: slice, upstream: Tensor, settings: dict[str, Any]
) -> Tensor:
    """Of the loss by what the student's head gives before scale and softcap, [n, V]."""
    target = teacher.logits(teacher.raw(part))
    raw = student.raw(part).requires_grad_()
    with torch.enable_grad():
        loss = distillation_loss(
            student.logits(raw),
            target,
            weight=upstream[part].float(),
            reduction="sum",
            **settings,
        )
        return torch.autograd.grad(loss, raw)[0]


@contextlib.contextmanager
def _whole(tensors: Sequence[Tensor], gather: Gather) -> Iterator[None]:
    """Both heads' parameters as they are, and products in the dtype that is asked for."""
    off = torch.autocast(tensors[0].device.type, enabled=False)
    with gather(*tensors[1:3]), gather(*tensors[4:]), off:
        yield


def _heads(
    tensors: Sequence[Tensor], scales: Sequence[Any], dtypes: Sequence[torch.dtype]
) -> tuple[Head, Head]:
    student = Head._make((*tensors[:3], *scales[:2]))
    teacher = Head._make((*tensors[3:], *scales[2:]))
    return student.cast(dtypes[0]), teacher.cast(dtypes[1])


def _parts(student: Head) -> Iterator[slice]:
    step = max(1, CHUNK // student.weight.size(0))
    for start in range(0, student.hidden.size(0), step):
        yield slice(start, start + step)


def _product(rows: Tensor, columns: Tensor) -> Tensor:
    """rows @ columns.T, summed and returned in fp32: rounded logits cost a gradient its digits."""
    if rows.is_cuda and rows.dtype != torch.float32:
        return torch.mm(rows, columns.t(), out_dtype=torch.float32)
    return rows.float() @ columns.float().t()


def _dtype_of_product(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
