"""Rows of student and teacher, and what divergences are made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from ctypes import c_float
from typing import NamedTuple

import torch
from torch import Tensor

LN2 = math.log(2)
# The first columns, whose largest logit is `shift`, but in fp64: to search all takes a tenth of the
# time, and any logit of the row would mostly do. A row too large for that, with a logit larger by
# 44 T elsewhere, comes again in fp64. PyTorch finds the largest of 64 as fast as that of 8.
SEARCHED, FEW = 64, 4
# In fp64 a number stands for -inf, which times 0 is 0; the log2_exp of a masked entry is below the
# second, in fp32 too.
MASKED, MASKED_BELOW = -1e300, -1e200
# Masses whose ratio is 1 but for less have a logarithm that lacks digits.
ALIKE = 1e-4


class Softmax(NamedTuple):
    """softmax(logits / T) of rows, as exp / sum_exp, where exp is exp((logits - shift) / T)."""

    shift: Tensor  # the largest logit, or a large one, [R, 1]
    log2_exp: Tensor  # log2 of exp, [R, V]: torch.exp2 takes a quarter of the time of torch.exp
    exp: Tensor  # [R, V]
    sum_exp: Tensor  # [R, 1]

    @classmethod
    def of(
        cls,
        logits: Tensor,
        scale: float | Tensor,
        log2_exp: Tensor,
        exp: Tensor,
        whole: bool = False,
    ) -> Softmax:
        """In the buffers given, [R, V]; that of log2_exp may be the logits.

        whole: the largest logit of all is to be `shift`.
        """
        shift = top(logits, whole)
        measured(logits, shift, scale, log2_exp)
        return cls(shift, log2_exp, torch.exp2(log2_exp, out=exp), total(exp))

    @property
    def log_sum(self) -> Tensor:
        """log(sum_exp) in fp64, as it is added to what it tends to cancel."""
        return self.sum_exp.double().log()


class Descent(NamedTuple):
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
    arithmetic. Nothing reads the teacher's log2_exp after the divergence: it may be overwritten.
    `labels`, [R], are there for divergences that look at them.
    """

    def __init__(
        self,
        student: Softmax,
        teacher: Softmax,
        student_scale: float | Tensor,
        new: Callable[[], Tensor],
        labels: Tensor | None = None,
        gap: Tensor | None = None,
    ) -> None:
        self.student, self.teacher, self.labels = student, teacher, labels
        self.student_scale, self.new = student_scale, new
        self.gap = self._gap() if gap is None else gap

    def _gap(self) -> Tensor:
        """d where both log2_exp are equal, in nats, [R, 1]; in fp64 with digits of near sides."""
        q, p = self.student, self.teacher
        ratio = q.sum_exp / p.sum_exp
        alike = (ratio - 1).abs() < ALIKE if ratio.dtype == torch.float64 else None
        if alike is None or not alike.any():
            return ratio.log_()
        excess = self.log2_ratio(self.new()).mul_(LN2).expm1_().mul_(q.exp)  # of p's exp over q's
        excess = torch.where(q.exp == 0, p.exp, excess)
        return torch.where(alike, -(total(excess) / q.sum_exp).log1p(), ratio.log())

    def spare(self) -> Tensor:
        """A buffer for what needs no logarithms: the teacher's log2_exp, which nothing reads."""
        return self.teacher.log2_exp

    def log2_ratio(self, out: Tensor) -> Tensor:
        """d = lp - lq in bits and less `gap`; `out` may be the teacher's log2_exp."""
        return torch.sub(self.teacher.log2_exp, self.student.log2_exp, out=out)

    def d(self, out: Tensor) -> Tensor:
        """lp - lq; `out` may be the teacher's log2_exp."""
        return _affine(self.log2_ratio(out), LN2, self.gap, out)

    def logs(self) -> tuple[Tensor, Tensor]:
        """lp and lq, in buffers that are the caller's, with -inf for what stands for it."""
        log_sum = self.student.log_sum  # and by `gap` the teacher's, as d has the digits of `gap`
        lp, lq = (
            _affine(side.log2_exp, LN2, -of_side.to(side.log2_exp.dtype), self.new())
            for side, of_side in ((self.teacher, log_sum - self.gap), (self.student, log_sum))
        )
        if lp.dtype == torch.float64:
            for logs in (lp, lq):
                logs.masked_fill_(logs < MASKED_BELOW, -math.inf)
        return lp, lq

    # --- sums over the columns of a row, which may be spread over processes: [R, 1] -------------

    def total(self, terms: Tensor) -> Tensor:
        """The sum of terms that depend on no other sum."""
        return total(terms)

    def total_product(self, x: Tensor, side: Softmax) -> Tensor:
        """The sum of the products of x and a side's exp, which go to the place of x, if needed."""
        return total(x.mul_(side.exp))

    def total_log2_ratio(self, side: Softmax, products: Callable[[], Tensor]) -> Tensor:
        """The sum of the products of a side's exp and `log2_ratio`, which it asks for if needed."""
        return total(products())

    def total_growth(self, side: Softmax, order: float, terms: Tensor) -> Tensor:
        """The sum of side.exp * (exp(order * d) - 1)."""
        return total(terms)

    def blend(self, log2_exp: Tensor, a: float) -> tuple[Tensor, Tensor, Tensor]:
        """Terms exp2(log2_exp - shift), in the place of log2_exp, `shift` and the terms' sum.

        log2_exp is a * teacher.log2_exp + (1 - a) * student.log2_exp.
        """
        shift = log2_exp.amax(-1, keepdim=True)
        terms = log2_exp.sub_(shift).exp2_()
        return terms, shift, total(terms)

    def label_logs(self) -> tuple[Tensor, Tensor]:
        """lp and lq of the labels, [R]."""
        assert self.labels is not None
        labels = self.labels.long()[:, None]
        lp, lq = (
            (LN2 * side.log2_exp.gather(-1, labels) - side.log_sum.to(side.log2_exp.dtype))[:, 0]
            for side in (self.teacher, self.student)
        )
        return lp, lq

    def add_at_labels(self, rows: Tensor, values: Tensor) -> None:
        """Adds [R] to the labels' columns of [R, V]."""
        assert self.labels is not None
        rows.scatter_add_(-1, self.labels.long()[:, None], values[:, None])

    def mean_log2_exp(self, side: Softmax) -> Tensor:
        """The mean of log2_exp over a side's distribution."""
        return total(torch.mul(side.exp, side.log2_exp, out=self.new())) / side.sum_exp


def top(logits: Tensor, whole: bool) -> Tensor:
    """The largest logit, [R, 1], or, unless whole, one that mostly does."""
    if not (whole or logits.dtype == torch.float64):
        logits = logits[:, : SEARCHED if logits.size(1) >= SEARCHED else FEW]
    return logits.amax(-1, keepdim=True)


def measured(logits: Tensor, shift: Tensor, scale: float | Tensor, out: Tensor) -> Tensor:
    """log2 of exp((logits - shift) / T), in `out`, which may be the logits; shift in any dtype."""
    dtype = logits.dtype
    if dtype == torch.float64 or isinstance(scale, Tensor):
        # A product by itself would round a common offset.
        return torch.sub(logits, shift.to(dtype), out=out).mul_(scale / LN2)
    if shift.dtype == dtype:
        return _affine(logits, scale / LN2, shift * (-scale / LN2), out)
    bits = fp32_bits(scale)  # of which a `measurable` shift has a product without rounding
    return _affine(logits, bits, (shift * -bits).to(dtype), out)


def measurable(shift: Tensor, scale: float | Tensor, dtype: torch.dtype) -> Tensor:
    """The shift next to it, in fp64, from which `measured` measures logits of the dtype without
    rounding it: what is found of columns by themselves then joins.
    """
    if dtype == torch.float64 or isinstance(scale, Tensor):
        return shift.to(dtype).double()
    bits = fp32_bits(scale)
    return (shift * -bits).to(dtype).double() / -bits


def fp32_bits(scale: float) -> float:
    """What makes exponents of 2 of logits times `scale`, as fp32 has it."""
    return c_float(scale / LN2).value


def _affine(x: Tensor, scale: float, shift: Tensor, out: Tensor) -> Tensor:
    """x * scale + shift, with one rounding."""
    return torch.add(shift, x, alpha=scale, out=out)


# --- helpers of the formulas ------------------------------------------------------------------


def plogr(lp: Tensor, r: Tensor) -> Tensor:
    """exp(lp) * r, and 0 where exp(lp) is 0, in value and in gradient."""
    p = lp.exp()
    kept = p != 0
    return torch.where(kept, p * torch.where(kept, r, 0.0), 0.0)


def total(terms: Tensor) -> Tensor:
    return terms.sum(-1, keepdim=True)
