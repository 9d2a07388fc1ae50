"""What a side of a Problem may be besides logits; as its tensors, numbers, and a word; as rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Head(NamedTuple):
    """Rows of logits that are not made yet: hidden states and the layer that makes logits of them.

    logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap); without the cap where
    softcap is 0.
    """

    hidden: Tensor  # [N, H]
    weight: Tensor  # [>= V, H]
    bias: Tensor | None  # [>= V]
    scale: float
    softcap: float
    product: torch.dtype  # of the factors of all products
    trains: tuple[bool, bool, bool]  # which of the three tensors do

    def same(self, other: Head) -> bool:
        """Whether the logits are those of the other, made of the same memory."""
        places = [
            [(x.data_ptr(), x.dtype, x.shape, x.stride()) for x in head[:3] if x is not None]
            for head in (self, other)
        ]
        return places[0] == places[1] and self[3:6] == other[3:6]


class Events(NamedTuple):
    """A teacher of which K entries are known; all others are one event. Each is listed once."""

    indices: Tensor  # [N, K], int64; -1: nothing is listed
    log_probs: Tensor  # [N, K], at the teacher's temperature
    rest: Tensor | None  # log-mass of what is not listed, [N]; None: that is left out


class Mixture(NamedTuple):
    """Several teachers of the same rows, which become one chunk by chunk."""

    combine: str  # "probs" or "logits"
    members: tuple[Any, ...]  # logits [1, N, >= V], Heads, or Events that leave no rest
    weights: Tensor  # [M, N]; the sum of a row is 1
    routed: tuple[bool, ...]  # which of the members may weigh nothing in a row, and are not read
    # Of "probs" whose columns have several owners: what each member's softmax has of all columns,
    # its top, its width, and the logarithm of its mass, [M, 3, N].
    norms: Tensor | None = None


# --- a side as its tensors, numbers, and a word for what they are ------------------------------

LOGITS, EVENTS, NOTHING = "logits", "events", ""


def sources(side: Any) -> list[Any]:
    """The tensors that a side's logits come from, and its gradient goes to."""
    if isinstance(side, Tensor):
        return [side]
    if isinstance(side, Mixture):
        return [
            *(x for member in side.members for x in sources(member)), side.weights, side.norms,
        ]  # fmt: skip
    return [] if side is None else list(side[:3])


def numbers_of(side: Any) -> list[float]:
    if isinstance(side, Mixture):
        return [x for member in side.members for x in numbers_of(member)]
    return [side.scale, side.softcap] if isinstance(side, Head) else []


def kind_of(side: Any) -> str:
    if isinstance(side, Head):
        return f"{str(side.product)[6:]}:{''.join(str(int(flag)) for flag in side.trains)}"
    if isinstance(side, Mixture):
        routed = "".join(str(int(flag)) for flag in side.routed)
        return ",".join((side.combine, routed, *map(kind_of, side.members)))
    if isinstance(side, Events):
        return EVENTS
    return NOTHING if side is None else LOGITS


def side_of(kind: str, found: Iterator[Any], scales: Iterator[Any]) -> Any:
    """A side of this kind, from the next tensors and numbers."""
    if kind == NOTHING:
        return None
    if kind == LOGITS:
        return next(found)
    if kind == EVENTS:
        return Events(next(found), next(found), next(found))
    if "," in kind:
        combine, routed, *kinds = kind.split(",")
        members = tuple(side_of(one, found, scales) for one in kinds)
        weights, norms = next(found), next(found)
        return Mixture(combine, members, weights, tuple(flag == "1" for flag in routed), norms)
    product, trains = kind.split(":")
    flags = tuple(flag == "1" for flag in trains)
    return Head._make((
        next(found), next(found), next(found), next(scales), next(scales),
        getattr(torch, product), flags,
    ))  # fmt: skip


def rows_of_sides(sides: Sequence[Any]) -> list[Any]:
    """Logits as [O, I, width], beside a head as [1, N, width], and heads' hidden states as [N, H].

    Where one is not logits the rows of both are worked off in chunks, whatever their dimensions.
    """
    if all(isinstance(side, Tensor) for side in sides):
        return as_rows(*sides)
    return [one_dimension(side) for side in sides]


def one_dimension(side: Any) -> Any:
    if isinstance(side, Tensor):
        return as_rows(side.reshape(1, math.prod(side.shape[:-1]), side.size(-1)))[0]
    if isinstance(side, Head):
        return side._replace(hidden=side.hidden.reshape(-1, side.hidden.size(-1)))
    if isinstance(side, Mixture):
        return side._replace(members=tuple(map(one_dimension, side.members)))
    return side


def as_rows(*tensors: Tensor) -> list[Tensor]:
    """Views [O, I, width] with one split for all; a copy only where the strides allow none."""
    if all(t.dim() == 2 and t.stride(1) == 1 for t in tensors):
        return [t.unsqueeze(0) for t in tensors]
    tensors = tuple(t if t.stride(-1) == 1 or t.size(-1) == 1 else t.contiguous() for t in tensors)
    seams = {seam for tensor in tensors for seam in _seams(tensor)}
    if len(seams) > 1:
        tensors, seams = tuple(t.contiguous() for t in tensors), set()
    split = max(seams, default=0)
    leading = tensors[0].shape[:-1]
    outer, inner = math.prod(leading[:split]), math.prod(leading[split:])
    return [tensor.view(outer, inner, tensor.size(-1)) for tensor in tensors]


def _seams(tensor: Tensor) -> list[int]:
    """The leading dimensions that do not merge with the one before."""
    leading = range(tensor.dim() - 1)
    dims = [(i, tensor.size(i), tensor.stride(i)) for i in leading if tensor.size(i) != 1]
    return [i for (_, _, before), (i, size, stride) in pairwise(dims) if before != size * stride]
