"""One owner's columns of rows that several share: blocks of rows, each in the dtype that it needs.

Rows are computed in the dtype of the problem, and in fp64 where that may lose digits. Which these
are the divergence of an owner's columns alone says after the first sweep, where its sums are all of
the first; otherwise the total variation of both sides, of which that sweep gives bounds, says it
before, and the slopes say after the second that a student is too certain. Figures of rows are in
fp64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastkd import sharding
from fastkd.divergences import Divergence
from fastkd.divergences.pair import MASKED, Softmax, measurable, measured, top, total
from fastkd.problem import Problem

from .blocks import Precision, Rows, blocks, largest, of_rows, place_of, scales_of
from .joins import (
    PARTS,
    SIDES,
    STUDENT,
    TEACHER,
    Asked,
    Known,
    Labels,
    Later,
    Shard,
    asked,
    empty,
    is_shift,
    is_tempered,
    with_gap,
)
from .near import apart, closeness
from .solver import FAR, LARGE, LEAST_SCALE, MOST_SUM_EXP, UNCERTAIN

# Rows whose sides are further apart than the first, in total variation, have divergences that fp32
# gives. An owner takes the second for its own columns: where a row is near, the columns of owners
# that do not find so weigh little.
APART, APART_HERE = 1 / 7, 1 / 6
# From here on an owner takes the slope of its own columns for near its bound: where a row is
# saturated, the columns of owners that do not find so weigh little.
NEARLY_HERE = 1 - 2.0**-5


class Columns:
    """This owner's columns of all rows that count.

    room: [O, I, V], where the student's exp may stay between the sweeps: the place of the gradient.
    """

    def __init__(
        self, problem: Problem, entropy: bool, metrics: bool, room: Tensor | None = None
    ) -> None:
        self.problem, self.entropy, self.metrics, self.room = problem, entropy, metrics, room
        self.merge = sharding.of(problem.merge)
        self.sides = SIDES[: 1 + (problem.teacher is not None)]
        self.kind = Divergence.of_name(problem.divergence)
        self.tempered = is_tempered(problem)
        self.first: tuple[Asked, ...] = ()
        self.later = 0
        if problem.teacher is not None:
            self.first, self.later = self._asked(torch.float64)
        self.means = entropy or metrics or self.tempered
        # Whether rows with a nearly certain student need fp64.
        self.guarded = self.means or (self.kind.cancels and problem.teacher is not None)
        # Whether a sum of slopes, in the second sweep, tells such rows.
        self.cancels_later = self.kind.cancels and self.later > 0
        self.bound = self.kind.most(problem.a, problem.b)
        # Sides whose largest logits are to be known.
        self.topped = self.sides if metrics else SIDES[: int(self.guarded)]
        scales = scales_of(problem)
        self.plain = self.precision = Precision(problem, problem.dtype, scales)
        self.exact = self.plain if self.plain.exact else Precision(problem, torch.float64, scales)
        self.precisions = dict.fromkeys((self.plain, self.exact))  # of fp64 there is one alone
        # Rows that need fp64, as far as this owner's columns are concerned.
        exact = not problem.vocab_size or not self._joins_in(problem.dtype)
        self.in_fp64 = problem.student.new_full((problem.rows,), exact, dtype=torch.bool)
        self.known: Known = {}  # of all columns
        self._learn({})
        self.every = Rows(0, slice(0, problem.rows), slice(0, problem.rows))

    def _asked(self, dtype: torch.dtype) -> tuple[tuple[Asked, ...], int]:
        find: Any = asked
        return find(self.kind, self.problem.a, self.problem.b, dtype)

    def _joins_in(self, dtype: torch.dtype) -> bool:
        """Whether what an owner finds in this dtype joins what others find in fp64."""
        if dtype == torch.float64:
            return False
        if not self.sides[1:]:
            return True
        first, later = self._asked(dtype)
        if not set(first) <= set(self.first) or later != self.later:
            return False
        # Terms of other sums differ by some q: a sum of these does not join.
        if first != self.first and self.tempered:
            return False
        # The least divergence of rows further apart than APART, by Pinsker's bound.
        curvature = self.kind.curvature(self.problem.a, self.problem.b)
        if not self.later or curvature is None:
            return True
        return 2 * curvature * APART**2 > self.kind.least_in_fp32

    def _swept(
        self,
        names: Sequence[Any],
        find: Callable[[Rows], Known],
        doubtful: Callable[[Known], Tensor],
        own: Sequence[Any] = (),
    ) -> Tensor:
        """What a sweep finds of this owner's columns, [F, N]; 0 in rows that do not count.

        doubtful: which rows need fp64 by what is found, [N].
        own: names of what is found for that alone.
        """
        problem, every = self.problem, [*names, *own]
        fields = problem.student.new_zeros(len(every), problem.rows, dtype=torch.float64)
        for field, name in zip(fields, every, strict=True):
            if is_shift(name):
                field.fill_(MASKED)
        if not problem.vocab_size:
            return fields[: len(names)]
        for precision in self.precisions:
            mask = self._mask(precision)
            if found := [find(rows) for rows in self._rows(precision)]:
                columns = [torch.cat([some[name] for some in found]).double() for name in every]
                fields[:, mask] = torch.cat(columns, -1).t()
            if not precision.exact:
                lost = doubtful(dict(zip(every, fields, strict=True))) | ~fields.isfinite().all(0)
                self.in_fp64 |= lost & mask
        return fields[: len(names)]

    def _mask(self, precision: Precision) -> Tensor:
        """Rows that count and are computed in it, [N]."""
        mask, counted = self.in_fp64 if precision.exact else ~self.in_fp64, self.problem.counted
        return mask if counted is None else mask & counted

    def _rows(self, precision: Precision) -> Iterator[Rows]:
        """These rows, in blocks, with buffers made ready."""
        mask = self._mask(precision)
        if not mask.any():
            return
        self.precision = precision
        size, whole = largest(self.problem), bool(mask.all())
        size = -(-size // 2) if precision.exact else size  # fp64 takes twice the memory
        for rows in blocks(self.problem.student, self.problem.counted, size):
            if not (whole or (some := mask[rows.flat]).all()):
                rows = rows.only(some.nonzero()[:, 0])
            if rows.size:
                precision.store.start(rows.size)
                yield rows

    def _doubtful_statistics(self, found: Known) -> Tensor:
        """Rows that need fp64 by what the first sweep finds of these columns, [N]."""
        kept, value = self._in_fp32(found), None
        for scale in self.exact.scales:
            if isinstance(scale, Tensor):
                kept &= scale[:, 0] > LEAST_SCALE
        if self.later:
            kept &= found["apart"] > APART_HERE
        elif self.sides[1:]:
            value = self._value(found)
            kept &= value > self.kind.least_in_fp32
            kept &= value < (LARGE if self.guarded else FAR)
        return ~kept | self._certain(found, value)

    def _doubtful_sums(self, found: Known) -> Tensor:
        """Rows that need fp64 by what the second sweep finds, [N]."""
        sum_exp = torch.maximum(*(self.known[name, "sum_exp"] for name in SIDES))
        doubtful = torch.zeros_like(self.in_fp64)
        for i in range(self.later):
            doubtful |= ~(found["later", i].abs() < LARGE * sum_exp)
        if self.cancels_later:
            doubtful |= ~(found["slope"] <= NEARLY_HERE * self.bound)
            doubtful |= self._certain(self.known, found["slope"])
        return doubtful

    def _value(self, found: Known) -> Tensor:
        """The divergence of these columns alone, of which their sums say all, [N].

        Each owner's share of it is a part of that of all columns, which is no smaller.
        """
        q, p = (found[name, "sum_exp"][:, None] for name in SIDES)
        sums, gap = {STUDENT: q, TEACHER: p}, (q / p).log()
        first = {name: found[name][:, None] for name in self.first}
        for one in self.first:
            if one[0] == "growth":
                first[one] = with_gap(first[one], sums[one[1]], one[2], gap)
        sides = (empty(q, q), empty(p, p))
        pair = Shard(sides, 1.0, lambda: q.new_empty(len(q), 0), gap, first, [])
        return self.kind.value_and_descent(pair, self.problem.a, self.problem.b)[0][:, 0]

    def _mark(self) -> None:
        """Marks the rows that need fp64 by what is known of all columns."""
        kept = self._in_fp32(self.known)
        if self.later:
            kept &= self.known["apart"] > APART
        self.in_fp64 |= ~kept | self._certain(self.known, None)

    def _in_fp32(self, known: Known) -> Tensor:
        """Rows whose sums fp32 can hold."""
        sums = [x for name, x in known.items() if name == "unit" or name[1:] == ("sum_exp",)]
        return torch.stack(sums).amax(0) < MOST_SUM_EXP

    def _certain(self, known: Known, slope: Tensor | None) -> Tensor:
        """Rows whose student is nearly certain: see `solver.UNCERTAIN`.

        slope: a size of what the gradient is a difference of.
        """
        if not self.guarded:
            return torch.zeros_like(self.in_fp64)
        scale = self.exact.scales[0]
        scale = scale[:, 0] if isinstance(scale, Tensor) else scale
        largest = ((known[STUDENT, "top"] - known[STUDENT, "shift"]) * scale).exp()
        slope = torch.ones_like(largest) if slope is None else slope.clamp(1, LARGE)
        return known[STUDENT, "sum_exp"] <= (1 + UNCERTAIN * slope) * largest

    def _place(self, rows: Rows) -> Tensor | None:
        """Where the student's exp stay, measured from the shift of these columns alone."""
        return None if self.room is None else place_of(self.room, rows, self.precision.dtype)

    def _softmax(
        self, x: Tensor, shift: Tensor, scale: float | Tensor, exp: Tensor | None = None
    ) -> Softmax:
        """The softmax of these columns alone about a shift in fp64; `exp`: where its exp may go."""
        log2_exp = measured(x, shift, scale, self.precision.store.new())
        if not self.precision.exact:
            shift = measurable(shift, scale, self.precision.dtype)
        if exp is None:
            exp = self.precision.store.new() if self._reads_logarithms() else log2_exp
        return Softmax(shift, log2_exp, torch.exp2(log2_exp, out=exp), total(exp))

    def _reads_logarithms(self) -> bool:
        """Whether the first sweep does; if not, exp takes their place."""
        return self.means or bool(self.first) or self.precision.exact

    def _later(self, x: Tensor, shift: Tensor, scale: float | Tensor, sum_exp: Tensor) -> Later:
        """The softmax of these columns with the shift and the sum of all owners."""
        new, side = self.precision.store.new, Later(shift, shift, shift, sum_exp)
        side.find_log2_exp = lambda: measured(x, shift, scale, new())
        side.find_exp = lambda: measured(x, shift, scale, new()).exp2_()
        return side

    def shift_of_all(self, shifts: Tensor, scale: float | Tensor, exact: Tensor) -> Tensor:
        """The highest shift of all owners; if not all are exact, one near to it that fp32 has."""
        shift = shifts.amax(0)
        near = measurable(shift, scale, self.plain.dtype)
        return torch.where(near.isfinite() & ~exact.all(0), near, shift)

    # --- what is known of all columns ---

    def _learn(self, known: Known) -> None:
        """Adds to what is known, [N] in fp64."""
        self.known |= known
        # The same, [N, 1] in a dtype, as far as it was asked for.
        self.tables: dict[torch.dtype, Known] = {self.plain.dtype: {}, torch.float64: {}}

    def _of(self, name: Any, rows: Rows, dtype: torch.dtype | None = None) -> Tensor:
        """What is known of these rows, [R, 1], in the dtype of what is computed, or in another."""
        dtype = dtype or self.precision.dtype
        table = self.tables[dtype]
        if name not in table:
            table[name] = self.known[name][:, None].to(dtype)
        return table[name][rows.flat]

    def _in_full(self, name: Any, rows: Rows) -> Tensor:
        """What is known of these rows in fp64, as shifts are."""
        return self._of(name, rows, torch.float64)

    def _unit(self, rows: Rows) -> Softmax:
        """The student's at temperature 1."""
        shift = unit = self._in_full((STUDENT, "shift"), rows)
        if not self.precision.exact:
            unit = measurable(shift, 1.0, self.precision.dtype)
        sum_exp = self._in_full("unit", rows) * (shift - unit).exp()
        x = self.precision.logits(rows)[0]
        return self._later(x, unit, 1.0, sum_exp.to(self.precision.dtype))

    def _at_labels(self, logits: Tensor, labels: Labels) -> Tensor:
        """The labels' logits, 0 where another owner has them, [R, 1]."""
        return torch.where(labels.own[:, None], logits.gather(-1, labels.columns[:, None]), 0.0)

    @cached_property
    def _places_of_labels(self) -> tuple[Tensor, Tensor]:
        """Whether a row's label is among these columns, and where, [N]."""
        labels = self.problem.labels
        assert labels is not None
        columns = labels.long() - self.merge.first_column
        own = (columns >= 0) & (columns < self.problem.vocab_size)
        return own, torch.where(own, columns, 0)

    def _labels(self, rows: Rows) -> Labels:
        own, columns = (x[rows.flat] for x in self._places_of_labels)
        known = "lp" in self.known
        logs = [self._of(name, rows)[:, 0] if known else columns for name in ("lp", "lq")]
        return Labels(own, columns, *logs)

    @cached_property
    def counts(self) -> Tensor:
        """Rows with a logit on either side, [N]."""
        masked = [self.known[name, "shift"] == MASKED for name in self.sides]
        return ~(masked[0] | masked[-1])

    def _statistics(self, rows: Rows) -> Known:
        problem, new = self.problem, self.precision.store.new
        logits = self.precision.logits(rows)
        scales = [of_rows(scale, rows) for scale in self.precision.scales]
        tops = [top(x, name in self.topped) for name, x in zip(SIDES, logits, strict=False)]
        found: Known = {(name, "top"): x for name, x in zip(self.topped, tops, strict=False)}
        if self.metrics:
            best = [x == most for x, most in ((logits[0], tops[0]), (logits[-1], tops[-1]))]
            found["agreement"] = (best[0] & best[1]).any(-1, keepdim=True)
        if problem.labels is not None:
            labels = self._labels(rows)
            found["label"] = self._at_labels(logits[0], labels)
            if problem.label_smoothing:
                found["sum"] = total(logits[0])
            if self.kind.label_aware and self.sides[1:]:
                found["teacher_label"] = self._at_labels(logits[-1], labels)
        softmaxes = [
            self._softmax(x, most, scale, place)
            for x, most, scale, place in zip(
                logits, tops, scales, (self._place(rows), None), strict=False
            )
        ]
        for name, side in zip(SIDES, softmaxes, strict=False):
            found[name, "shift"], found[name, "sum_exp"] = side.shift, side.sum_exp
            if self.means:
                products = torch.mul(side.exp, side.log2_exp, out=new())
                found[name, "log2_exp"] = total(products)
                if self.tempered and self.entropy and name == STUDENT:
                    found["log2_exp_square"] = total(products.mul_(side.log2_exp))
        if problem.labels is not None:
            found["unit"] = softmaxes[0].sum_exp
            if not isinstance(scales[0], float) or scales[0] != 1:
                unit = self._softmax(logits[0], tops[0], 1.0)
                found["unit"] = unit.sum_exp * (unit.shift - softmaxes[0].shift).exp()
        if softmaxes[1:]:
            q, p = softmaxes
            if self.later:
                found["apart"] = apart(q, p, new())
            found |= closeness(q, p, new, self.tempered)
            if self.first:
                pair = Shard((q, p), scales[0], new, torch.zeros_like(q.sum_exp))
                self.kind.value_and_descent(pair, problem.a, problem.b)
                found |= pair.found_first
                for one in self.first:
                    if one not in found:  # fp32 asks for no growth
                        found[one] = _growth(pair, *one[1:])
        return found


def _growth(pair: Shard, side: str, order: float) -> Tensor:
    """The sum of a growth, from that of the blend with the same terms, [R, 1] in fp64."""
    a = order if side == STUDENT else order + 1
    shift, sum_exp = (pair.found_first["blend", a, part] for part in PARTS)
    own = pair.student if side == STUDENT else pair.teacher
    return sum_exp.double() * shift.double().exp2() - own.sum_exp
