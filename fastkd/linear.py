"""Output heads: their logits, and the gradient of these to the tensors that they came from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import checks, tracing
from .eager.blocks import slices
from .forms import Head
from .operands import LinearHead
from .operators import readable
from .problem import Problem

# Bytes of a head's columns that are converted at once where it has not the dtype of its products.
GPU_CONVERTED, CPU_CONVERTED = 32 << 20, 4 << 20
# Products that make logits on a CPU, of at least so many columns each: its library may add up in a
# copy of what a product makes, and keep the memory.
CPU_PRODUCTS, LEAST_COLUMNS = 4, 4096


def head_of(side: LinearHead, dtype: torch.dtype) -> Head:
    """The head, whose products are of factors in autocast's dtype, or else in the wider of theirs.

    A CPU, where products of half precision are slow and round, takes factors in fp32. dtype: of the
    arithmetic; in fp64, which the other side may ask for, products are too.
    """
    hidden, weight, bias = map(readable, (side.hidden, side.weight, side.bias))
    product = torch.promote_types(hidden.dtype, weight.dtype)
    place = hidden.device.type
    if tracing.autocasts(place):
        product = torch.get_autocast_dtype(place)
    if place == "cpu" or dtype == torch.float64:
        product = torch.promote_types(product, dtype)
    return Head(
        hidden,
        weight,
        bias,
        scale=1.0 if side.logit_scale is None else side.logit_scale,
        softcap=0.0 if side.logit_softcap is None else side.logit_softcap,
        product=product,
        trains=(checks.trains(hidden), checks.trains(weight), checks.trains(bias)),
    )


def sums_of(problem: Problem, out: Tensor | None = None) -> Any:
    if isinstance(problem.student, Head):
        return _HeadGradients(problem)
    return _LogitsGradient(problem, out)


class _LogitsGradient:
    """The gradient of a student that comes as logits, beside a teacher's head."""

    def __init__(self, problem: Problem, out: Tensor | None) -> None:
        student = problem.student
        rows = torch.contiguous_format
        self.out = (
            torch.zeros_like(student, memory_format=rows)
            if out is None
            else out.view(student.shape)
        )
        self.inplace = out is not None
        if out is not None and problem.counted is not None:
            self.out[:, ~problem.counted] = 0

    def place(self, part: Problem) -> Tensor | None:
        return None

    def add(self, rows: Any, part: Problem, found: Tensor) -> None:
        self.out[:, rows] = found.view(part.student.shape).to(self.out.dtype)

    def gradients(self) -> Tensor:
        return self.out


class _HeadGradients:
    """The gradients of hidden states, weight and bias, as far as these train; sums in fp32."""

    def __init__(self, problem: Problem) -> None:
        self.head = head = problem.student
        self.columns = problem.vocab_size
        hidden, weight, bias = head.trains
        new = problem.student_temperature.new_zeros
        # By rows, as a backend scales it, whatever the layout of the hidden states is.
        rows = torch.contiguous_format
        self.hidden = torch.zeros_like(head.hidden, memory_format=rows) if hidden else None
        self.weight = new(head.weight.shape) if weight else None
        self.bias = new(head.weight.size(0)) if bias else None

    def place(self, part: Problem) -> Tensor | None:
        """Where the logits' gradient may go: over the logits, if nothing needs these any more."""
        return None if self.head.softcap or part.student is part.teacher else part.student

    def add(self, rows: Any, part: Problem, found: Tensor) -> None:
        gradient = found.view(part.student.shape)[0]
        if self.head.softcap:
            slope = 1 - (part.student[0] / self.head.softcap).square_()
            if part.counted is not None:  # what does not count may be NaN, which 0 would not remove
                slope.masked_fill_(~part.counted[:, None], 0.0)
            gradient.mul_(slope)
        if self.head.scale != 1:
            gradient.mul_(self.head.scale)
        if self.bias is not None:
            self.bias[: self.columns] += gradient.sum(0)
        narrow = gradient.to(self.head.product)
        hidden = self.head.hidden[rows].to(self.head.product)
        if part.counted is not None:
            hidden = torch.where(part.counted[:, None], hidden, 0.0)
        sums = None if self.hidden is None else gradient.new_zeros(hidden.shape)
        for some, weight in _converted(self.head, self.columns):
            if sums is not None:
                _add_product(sums, narrow[:, some], weight)
            if self.weight is not None:
                _add_product(self.weight[some], narrow[:, some].t(), hidden)
        if self.hidden is not None and sums is not None:
            self.hidden[rows] = sums.to(self.hidden.dtype)

    def gradients(self) -> list[Tensor | None]:
        head = self.head
        return [
            self.hidden,
            None if self.weight is None else self.weight.to(head.weight.dtype),
            None if self.bias is None or head.bias is None else self.bias.to(head.bias.dtype),
        ]


def logits(head: Head, out: Tensor) -> Tensor:
    """softcap * tanh(scale * (hidden weight^T + bias) / softcap), in the dtype of `out` [R, V]."""
    hidden = head.hidden.to(head.product)
    for some, weight in _converted(head, out.size(1)):
        _product(hidden, weight.t(), out[:, some])
    if head.bias is not None:
        out += head.bias[: out.size(1)]
    if head.scale != 1:
        out *= head.scale
    if head.softcap:
        out.div_(head.softcap).tanh_().mul_(head.softcap)
    return out


def _converted(head: Head, columns: int) -> Iterator[tuple[slice, Tensor]]:
    """The weight's first columns in the dtype of its products, all at once where it has that."""
    weight = head.weight[:columns]
    if weight.dtype == head.product:
        yield slice(0, columns), weight
        return
    size = GPU_CONVERTED if weight.is_cuda else CPU_CONVERTED
    step = max(1, min(columns, size // max(1, weight.size(1) * head.product.itemsize)))
    buffer = weight.new_empty(step, weight.size(1), dtype=head.product)
    for some in slices(columns, step):
        yield some, buffer[: some.stop - some.start].copy_(weight[some])


def _product(x: Tensor, y: Tensor, out: Tensor) -> None:
    """x y, in the dtype of `out`; on a CPU some columns at a time."""
    if x.dtype != out.dtype:
        torch.mm(x, y, out_dtype=out.dtype, out=out)
        return
    columns = out.size(1)
    step = max(LEAST_COLUMNS, -(-columns // CPU_PRODUCTS)) if out.is_cpu else max(columns, 1)
    for some in slices(columns, step):
        torch.mm(x, y[:, some], out=out[:, some])


def _add_product(out: Tensor, x: Tensor, y: Tensor) -> None:
    """out + x y, in the dtype of `out` and in its place."""
    if x.dtype == out.dtype:
        out.addmm_(x, y)
    else:
        torch.addmm(out, x, y, out_dtype=out.dtype, out=out)
