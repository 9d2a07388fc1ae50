"""The moments of both sides' rows, for standardised logits: in fp32, and in fp64 where needed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastkd.problem import EPS, FLAT
from fastkd.sharding import LOCAL, Merge

from .blocks import blocks

# The std of a row is right in fp32 between these, and where it is no rounding of the mean.
LEAST_STD, MOST_STD, NEAR_ROUNDING = 1e-14, 1e17, 1e-4
MOST_WIDTH_SLOPE = 1e37
BLOCK_ELEMENTS = 1 << 18  # of rows that are worked off at once, and stay in the cache


def fill(
    out: Tensor,
    student: Tensor,
    teacher: Tensor,
    counted: Tensor | None,
    vocab_size: int,
    merge: Merge = LOCAL,
) -> Tensor:
    """Fills `out` with the moments [2, 3, N] of the rows of both."""
    sides = [x[..., :vocab_size] for x in (student, teacher)]
    if merge.size > 1:
        pieces = merge.gather(torch.stack([_piece(x, out) for x in sides]))
        for found, piece in zip(out, pieces.unbind(1), strict=True):
            found.copy_(_joined(*piece.unbind(1)))
    else:
        for found, logits in zip(out, sides, strict=True):
            for rows, block in _blocks(logits):
                found[:, rows] = _of_block(block)
    if counted is not None:  # what does not count may hold NaN
        out[:, :, ~counted] = out.new_tensor([0.0, FLAT, 0.0])[:, None]
    return out


def _blocks(logits: Tensor) -> Iterator[tuple[Any, Tensor]]:
    """Rows of [N], and their logits [R, V]; also of those that do not count."""
    step = max(1, BLOCK_ELEMENTS // logits.size(-1))
    for outer, inner, flat in blocks(logits, None, step):
        yield flat, logits[outer, inner]


def _of_block(x: Tensor) -> Tensor:
    """Mean, width and its slope, [3, R], of [R, V]; in fp64 where fp32 has no room for squares."""
    if x.dtype == torch.float64:
        return _exact(x)
    x = x.float()
    mean = x.mean(-1, keepdim=True)
    centred = x - mean
    rest = centred.mean(-1).double()  # that the rounded mean lacks
    mean = mean[:, 0].double()
    variance = centred.square_().mean(-1).double() - rest.square()
    std = (variance * (x.size(-1) / max(x.size(-1) - 1, 1))).sqrt()
    found = _rows(mean + rest, std, x.size(-1))
    doubtful = ~((std > LEAST_STD) & (std > NEAR_ROUNDING * mean.abs()) & (std < MOST_STD))
    if doubtful.any():
        found[:, doubtful] = _exact(x[doubtful].double())
    return found


def _exact(x: Tensor) -> Tensor:
    """The same in fp64, without the entries that are -inf, of any size."""
    count, mean, deviation, least, most = _sums(x)
    std = deviation * (count.double() / (count - 1).clamp_min(1)).sqrt()
    return _rows(mean, torch.where(most > least, std, 0.0), count)


def _sums(x: Tensor) -> tuple[Tensor, ...]:
    """Count, mean, root mean square deviation, least and most of the entries that are not -inf."""
    kept = x != -math.inf
    count = kept.sum(-1, keepdim=True)
    unit = _largest(torch.where(kept, x, 0.0))
    x = torch.where(kept, x, 0.0) / unit
    mean = x.sum(-1, keepdim=True) / count.clamp_min(1)
    centred = torch.where(kept, x - mean, 0.0)
    size = _largest(centred)
    square = (centred / size).square().sum(-1, keepdim=True)
    deviation = unit * size * (square / count.clamp_min(1)).sqrt()
    least = torch.where(kept, x, math.inf).amin(-1, keepdim=True)
    most = torch.where(kept, x, -math.inf).amax(-1, keepdim=True)
    figures = (count, unit * mean, deviation, least * unit, most * unit)
    return tuple(figure[:, 0] for figure in figures)


# --- rows over several owners -----------------------------------------------------------------


def _piece(logits: Tensor, like: Tensor) -> Tensor:
    """The figures of an owner's columns [O, I, V], [5, N] in fp64."""
    rows, columns = logits.shape[:2].numel(), logits.size(-1)
    found = like.new_zeros(5, rows, dtype=torch.float64)
    found[3], found[4] = math.inf, -math.inf
    if columns:
        for some, block in _blocks(logits):
            found[:, some] = torch.stack([x.double() for x in _sums(block.double())])
    return found


def _joined(
    counts: Tensor, means: Tensor, deviations: Tensor, least: Tensor, most: Tensor
) -> Tensor:
    """Mean, width and its slope, [3, N], of the figures of each owner, [size, N]."""
    count = counts.sum(0)
    mean = (counts / count.clamp_min(1) * means).sum(0)
    apart = means - mean
    size = torch.maximum(deviations, torch.where(counts > 0, apart.abs(), 0.0)).amax(0)
    size = torch.where(size > 0, size, 1.0)
    squares = counts * ((deviations / size).square() + (apart / size).square())
    std = size * (squares.sum(0) / (count - 1).clamp_min(1)).sqrt()
    spread = most.amax(0) > least.amin(0)
    return _rows(mean, torch.where(spread, std, 0.0), count)


def _largest(x: Tensor) -> Tensor:
    """The largest magnitude of each row, [R, 1], by which it is divided; 1 where there is none."""
    largest = x.abs().amax(-1, keepdim=True)
    return torch.where(largest > 0, largest, 1.0)


def _rows(mean: Tensor, std: Tensor, count: int | Tensor) -> Tensor:
    """Mean, width and its slope, [3, R]; of a row without spread std is 0.

    The slope stays in the range of fp32: where it is cut, what it is multiplied by is as good as 0.
    """
    spread = std > 0
    width_slope = torch.where(spread, 1 / ((count - 1) * std), 0.0).clamp_max(MOST_WIDTH_SLOPE)
    return torch.stack((mean, torch.where(spread, std + EPS, FLAT), width_slope))
