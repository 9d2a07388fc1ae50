"""Rows of student and teacher, and what divergences are made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor


class Pair:
    """Rows of student and teacher logits, [R, V], and what divergences are made of, when needed.

    A scale is 1 / T: a number where all rows share it, else [R, 1]. `new()` is a buffer [R, V],
    for `out=`, from a store that outlasts the rows: fresh memory costs more than arithmetic.
    """

    def __init__(
        self,
        student: Tensor,
        teacher: Tensor,
        student_scale: float | Tensor,
        teacher_scale: float | Tensor,
        new: Callable[[], Tensor],
    ) -> None:
        self.student, self.teacher = student, teacher
        self.student_scale, self.teacher_scale = student_scale, teacher_scale
        self.new = new
        self.student_max, self._q, self._q_sum = _exponentials(student, student_scale, new())
        self.teacher_max, self._p, self._p_sum = _exponentials(teacher, teacher_scale, new())

    @cached_property
    def p(self) -> Tensor:
        return self._p.mul_(1 / self._p_sum)

    @cached_property
    def q(self) -> Tensor:
        return self._q.mul_(1 / self._q_sum)

    @cached_property
    def lp(self) -> Tensor:
        shift = -self.log_sums[0].to(self.teacher.dtype)
        return _affine(self.teacher, self.teacher_scale, shift, self.new())

    @cached_property
    def lq(self) -> Tensor:
        shift = -self.log_sums[1].to(self.student.dtype)
        return _affine(self.student, self.student_scale, shift, self.new())

    @cached_property
    def log_sums(self) -> tuple[Tensor, Tensor]:
        """log sum exp(logit / T) of teacher and student, [R, 1], in fp64 as they tend to cancel."""
        return (
            self.teacher_max.double() * self.teacher_scale + self._p_sum.double().log(),
            self.student_max.double() * self.student_scale + self._q_sum.double().log(),
        )

    @cached_property
    def d(self) -> Tensor:
        """lp - lq, not made of them: the difference of logits keeps more digits."""
        of_p, of_q = self.log_sums
        gap, d = (of_q - of_p).to(self.student.dtype), self.new()
        if self.teacher_scale is self.student_scale:
            return _affine(torch.sub(self.teacher, self.student, out=d), self.teacher_scale, gap, d)
        _affine(self.teacher, self.teacher_scale, gap, d)
        return d.sub_(self.student * self.student_scale)

    def blend(self, a: float) -> Tensor:
        """The logits / T, a times the teacher's and 1 - a times the student's."""
        out = torch.mul(self.student, (1 - a) * self.student_scale, out=self.new())
        scale = a * self.teacher_scale
        if isinstance(scale, Tensor):
            return out.addcmul_(self.teacher, scale)
        return out.add_(self.teacher, alpha=scale)

    def times_q(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """rows * q, for [R, 1], in one pass whether q has been asked for or not."""
        out = self.new() if out is None else out
        if "q" in vars(self):
            return torch.mul(self.q, rows, out=out)
        return torch.mul(self._q, rows / self._q_sum, out=out)


def _exponentials(x: Tensor, scale: float | Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """max, exp((x - max) * scale) and its sum. exp2 takes half the time of exp."""
    top, scale = x.amax(-1, keepdim=True), scale * math.log2(math.e)
    terms = _affine(x, scale, top * -scale, out).exp2_()
    return top, terms, terms.sum(-1, keepdim=True)


def _affine(x: Tensor, scale: float | Tensor, shift: Tensor, out: Tensor) -> Tensor:
    """x * scale + shift, in one pass where the scale is a number."""
    if isinstance(scale, Tensor):
        return torch.mul(x, scale, out=out).add_(shift)
    return torch.add(shift, x, alpha=scale, out=out)


# --- helpers of the formulas ------------------------------------------------------------------


def plogr(lp: Tensor, r: Tensor) -> Tensor:
    """exp(lp) * r, and 0 where exp(lp) is 0, in value and in gradient."""
    p = lp.exp()
    return torch.where(p > 0, p * torch.where(p > 0, r, 0.0), 0.0)


def total(terms: Tensor) -> Tensor:
    return terms.sum(-1, keepdim=True)
