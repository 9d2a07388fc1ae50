"""Rows of student and teacher, and what divergences are made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

LN2 = math.log(2)
# The first columns, whose largest logit is `top`, but in fp64: to search all takes a tenth of the
# time, and any logit of the row would do. A row too large for that, with a logit larger by 44 T
# elsewhere, comes again in fp64. PyTorch finds the largest of 64 as fast as that of 8.
SEARCHED, FEW = 64, 4


class Softmax(NamedTuple):
    """softmax(logits / T) of rows, as terms / mass, where the terms are exp((logits - top) / T)."""

    top: Tensor  # the largest logit, or a large one, [R, 1]
    depth: Tensor  # log2 of the terms, [R, V]: exp2 takes a quarter of the time of exp
    terms: Tensor  # [R, V]
    mass: Tensor  # their sum, [R, 1]

    @classmethod
    def of(cls, logits: Tensor, scale: float | Tensor, depth: Tensor, terms: Tensor) -> Softmax:
        """In the buffers given, [R, V]; that of the depth may be the logits."""
        if logits.dtype == torch.float64:
            top = logits.amax(-1, keepdim=True)
            torch.sub(logits, top, out=depth).mul_(scale / LN2)
        else:
            some = logits[:, : SEARCHED if logits.size(1) >= SEARCHED else FEW]
            top, bits = some.amax(-1, keepdim=True), scale / LN2
            _affine(logits, bits, top * -bits, depth)
        mass = total(torch.exp2(depth, out=terms))
        return cls(top, depth, terms, mass)

    @property
    def log_mass(self) -> Tensor:
        """In fp64, as it is added to what it tends to cancel."""
        return self.mass.double().log()


class Pull(NamedTuple):
    """-d divergence / d lq as terms * factor, and its sum over each row.

    Any multiple of q may be added to it: it has no effect on the logits.
    """

    terms: Tensor  # [R, V]
    factor: float | Tensor  # [R, 1]
    total: float | Tensor  # [R, 1]


class Pair:
    """Rows of student and teacher, [R, V], and what divergences are made of, when needed.

    `student_scale` is 1 / T: a number where all rows share it, else [R, 1]. `new()` is a buffer
    [R, V], for `out=`, from a store that outlasts the rows: fresh memory costs more than
    arithmetic. Nothing reads the teacher's depth after the divergence: it may be overwritten.
    """

    def __init__(
        self,
        student: Softmax,
        teacher: Softmax,
        student_scale: float | Tensor,
        new: Callable[[], Tensor],
    ) -> None:
        self.student, self.teacher = student, teacher
        self.student_scale, self.new = student_scale, new

    def climb(self, out: Tensor) -> Tensor:
        """d = lp - lq in bits and less `gap`; `out` may be the teacher's depth."""
        return torch.sub(self.teacher.depth, self.student.depth, out=out)

    @cached_property
    def gap(self) -> Tensor:
        """d where the depths are equal, in nats, [R, 1]."""
        return (self.student.mass / self.teacher.mass).log_()

    def d(self, out: Tensor) -> Tensor:
        """lp - lq; `out` may be the teacher's depth."""
        return _affine(self.climb(out), LN2, self.gap, out)

    def logs(self) -> tuple[Tensor, Tensor]:
        """lp and lq, in buffers that are the caller's."""
        lp, lq = (
            _affine(side.depth, LN2, -side.log_mass.to(side.depth.dtype), self.new())
            for side in (self.teacher, self.student)
        )
        return lp, lq


def _affine(x: Tensor, scale: float | Tensor, shift: Tensor, out: Tensor) -> Tensor:
    """x * scale + shift, in one pass where the scale is a number."""
    if isinstance(scale, Tensor):
        return torch.mul(x, scale, out=out).add_(shift)
    return torch.add(shift, x, alpha=scale, out=out)


# --- helpers of the formulas ------------------------------------------------------------------


def plogr(lp: Tensor, r: Tensor) -> Tensor:
    """exp(lp) * r, and 0 where exp(lp) is 0, in value and in gradient."""
    p = lp.exp()
    kept = p != 0
    return torch.where(kept, p * torch.where(kept, r, 0.0), 0.0)


def total(terms: Tensor) -> Tensor:
    return terms.sum(-1, keepdim=True)
