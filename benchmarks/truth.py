"""The right answer in fp64, and how far from it an answer may be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .operators import Operands, Operator

# Relative errors allowed in fp32 and fp64: |loss| and the norm of the gradient. In fp32 twice what
# eager makes where that is more, and the second at most: of an entry where p and q differ in the
# last digit, total variation takes either sign.
ALLOWED, AT_MOST_IN_FP32 = 1e-3, 1e-2
# In 16 bits, twice what eager PyTorch makes of the same rows; not less than this many roundings,
# and not so much that half the right gradient would pass.
ROUNDINGS, AT_MOST = 4, 0.45
# fp16 gradients of a mean underflow without a scaler.
UPSTREAM = {torch.float16: 1024.0}

# Entries of rows whose gradient is checked whole, and entries of a block of the fp64 loss.
CHECKED, BLOCK = 1 << 22, 1 << 23
# Of how many rows each timed call must have got right how many of the largest gradient entries.
# They are read while the clock runs: more would be seen in the time of small vocabularies.
SAMPLED_ROWS, SAMPLED = 1 << 10, 4


class Errors(NamedTuple):
    """Relative: of the loss, and of the gradient in norm."""

    loss: float
    gradient: float


class Truth(NamedTuple):
    loss: float
    rows: Tensor  # those whose gradient is known
    gradients: tuple[Tensor, ...]  # fp64, those rows of each leaf
    positions: tuple[Tensor, ...]  # flat, of some rows' largest entries in each leaf
    sample: tuple[Tensor, ...]  # fp64, the entries there
    allowed: Errors


def _double(operands: Operands) -> Operands:
    return tuple(
        x.detach().double().requires_grad_(x.requires_grad)
        if x is not None and x.is_floating_point()
        else x
        for x in operands
    )


def leaves(operands: Operands) -> list[Tensor]:
    return [x for x in operands if x is not None and x.requires_grad]


def relative(got: Tensor, truth: Tensor) -> float:
    """Of the norm; infinite where anything is not finite."""
    error = (got.double() - truth).norm() / truth.norm()
    return float(error) if error.isfinite() else float("inf")


def truth_of(operator: Operator, operands: Operands, options: Mapping[str, Any]) -> Truth:
    leaf = leaves(operands)[0]
    count, width = leaf.shape
    divisor = operator.divisor(operands)
    step = max(1, BLOCK // width)
    total = 0.0
    with torch.no_grad():
        for start in range(0, count, step):
            block = _double(operator.rows(operands, slice(start, start + step)))
            total += operator.row_losses(block, options).sum().item()

    generator = torch.Generator().manual_seed(count * width)
    checked = min(count, max(8, CHECKED // width))
    rows = torch.randperm(count, generator=generator)[:checked].sort().values.to(leaf.device)
    some = operator.rows(operands, rows)
    exact = _double(some)
    loss = operator.row_losses(exact, options).sum()
    gradients = torch.autograd.grad(loss, leaves(exact))
    allowed = _allowed(operator, some, options, loss.item(), gradients)
    gradients = tuple(gradient / divisor for gradient in gradients)

    sampled = slice(None, None, -(-checked // SAMPLED_ROWS))
    sample = [gradient[sampled] for gradient in gradients]
    largest = [part.abs().topk(min(SAMPLED, width)).indices for part in sample]
    return Truth(
        total / divisor,
        rows,
        gradients,
        tuple((rows[sampled, None] * width + columns).flatten() for columns in largest),
        tuple(part.gather(-1, c).flatten() for part, c in zip(sample, largest, strict=True)),
        allowed,
    )


def _allowed(
    operator: Operator,
    some: Operands,
    options: Mapping[str, Any],
    loss: float,
    gradients: tuple[Tensor, ...],
) -> Errors:
    dtype = leaves(some)[0].dtype
    if dtype == torch.float64:
        return Errors(ALLOWED, ALLOWED)
    divisor, scale = operator.divisor(some), UPSTREAM.get(dtype, 1.0)
    answer = operator.providers["eager"].bind(options)(*some)
    got = torch.autograd.grad(answer, leaves(some), torch.full_like(answer, scale))
    errors = (
        abs(answer.item() * divisor / loss - 1),
        max(relative(g, t * scale / divisor) for g, t in zip(got, gradients, strict=True)),
    )
    least, most = ROUNDINGS * torch.finfo(dtype).eps, AT_MOST
    if dtype == torch.float32:
        least, most = ALLOWED, AT_MOST_IN_FP32
    return Errors(*(min(max(2 * error, least), most) for error in errors))
