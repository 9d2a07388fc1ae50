"""One owner's columns of rows that several share: blocks of rows, each in the dtype that it needs.

Rows are computed in the dtype of the problem, and in fp64 where that may lose digits. Which these
are the divergence itself says too late; the total variation of both sides, of which the first sweep
gives bounds, says it before. Figures of rows are in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd import sharding
from fastkd.divergences import LN2, MASKED, Divergence, Softmax, total
from fastkd.problem import Problem

from .blocks import Rows, Store, blocks, largest
from .joins import SIDES, STUDENT, Known, Labels, Shard, asked, first_names, is_shift
from .solver import CERTAIN, LARGE, LEAST_SCALE, exact_scales, of_rows

# In a row whose log-ratios are smaller, the difference of the sums is formed entry by entry.
SMALL = 1e-3
# Rows whose sides are further apart than the first, in total variation, have divergences that fp32
# gives. An owner takes the second for its own columns: where a row is near, the columns of owners
# that do not find so weigh little.
APART, APART_HERE = 1 / 7, 1 / 6


class Columns:
    """This owner's columns of all rows that count."""

    def __init__(self, problem: Problem, entropy: bool, metrics: bool) -> None:
        self.problem, self.entropy, self.metrics = problem, entropy, metrics
        self.merge = sharding.of(problem.merge)
        self.sides = [problem.student] + [problem.teacher] * (problem.teacher is not None)
        self.kind = Divergence.of_name(problem.divergence)
        self.first: tuple[tuple[Any, ...], ...] = ()
        self.later = 0
        single = problem.dtype != torch.float64
        if problem.teacher is not None:
            find: Any = asked
            numbers = self.kind, problem.a, problem.b
            self.first, self.later = find(*numbers, torch.float64)
            single = single and find(*numbers, problem.dtype) == (self.first, self.later)
            # Of rows further apart than APART, by Pinsker's bound; a parameter may make it small.
            curvature = self.kind.curvature(problem.a, problem.b)
            least = math.inf if curvature is None else 2 * curvature * APART**2
            single = single and least > self.kind.least_in_fp32
        self.tempered = is_tempered(problem)
        self.means = entropy or metrics or self.tempered
        # Against a student that is nearly certain.
        self.guarded = self.means or (self.kind.cancels and problem.teacher is not None)
        self.exact_scales = exact_scales(problem)
        self.exact_store = Store(problem, torch.float64)
        self.plain_store = Store(problem, problem.dtype)
        # Rows that need fp64, as far as this owner's columns are concerned.
        self.exact = problem.student.new_full((problem.rows,), not single, dtype=torch.bool)
        self.begin(False)

    def begin(self, exact: bool) -> None:
        """What comes next is computed in fp64, or in the dtype of the problem."""
        self.store = self.exact_store if exact else self.plain_store
        self.scales = [
            scale.to(self.store.dtype) if isinstance(scale, Tensor) else scale
            for scale in self.exact_scales
        ]

    def _swept(self, names: Sequence[Any], find: Callable[[Rows], Known]) -> Tensor:
        """What a sweep finds of this owner's columns, [F, N]; 0 in rows that do not count."""
        problem = self.problem
        fields = problem.student.new_zeros(len(names), problem.rows, dtype=torch.float64)
        for index, name in enumerate(names):
            if is_shift(name):
                fields[index] = MASKED
        for rows in self._blocks():
            exact = self.store is self.exact_store
            self._keep(fields, names, rows, found := find(rows))
            if not exact and (lost := self._lost(found, rows)).any():
                self.exact[rows.flat] = lost
                for part in self._parts(rows.only(lost)):
                    self._keep(fields, names, part, find(part))
        return fields

    def _keep(self, fields: Tensor, names: Sequence[Any], rows: Rows, found: Known) -> None:
        for field, name in zip(fields, names, strict=True):
            field[rows.flat] = found[name].to(field.dtype)

    def _blocks(self) -> Iterator[Rows]:
        """All rows that count, in blocks, and the store made ready for them."""
        if not self.problem.vocab_size:
            return
        for rows in blocks(self.problem.student, self.problem.counted, largest(self.problem)):
            exact = self.exact[rows.flat]
            some = bool(exact.any())
            if not some or not exact.all():
                kept = rows.only(~exact) if some else rows
                self.begin(False)
                self.store.start(kept.size)
                yield kept
            if some:
                yield from self._parts(rows.only(exact))

    def _parts(self, rows: Rows) -> Iterator[Rows]:
        """Rows in fp64, which takes twice the memory."""
        for part in rows.parts(-(-largest(self.problem) // 2)):
            self.begin(True)
            self.store.start(part.size)
            yield part

    def _lost(self, found: Known, rows: Rows) -> Tensor:
        """Rows of which this owner's columns need fp64, [R]."""
        figures = torch.stack([x.to(self.problem.dtype) for x in found.values()])
        kept = figures.isfinite().all(0)
        if "apart" in found:
            kept &= found["apart"] > APART_HERE
        if self.guarded and (STUDENT, "sum_exp") in found:
            kept &= found[STUDENT, "sum_exp"] > CERTAIN
        for scale in self.scales:
            if isinstance(scale, Tensor):
                kept &= of_rows(scale, rows)[:, 0] > LEAST_SCALE
        if "saturated" in found:
            kept &= found["saturated"] == 0
        sums_exp = [found[name, "sum_exp"] for name in SIDES if (name, "sum_exp") in found]
        size = torch.stack(sums_exp).amax(0) if sums_exp else self.sum_exp[rows.flat]
        for name in found.keys() & set(self._sums_of_columns()):
            kept &= found[name].abs() < LARGE * size
        return ~kept

    def _sums_of_columns(self) -> list[Any]:
        return [name for name in first_names(self.first) if not is_shift(name)] + [
            ("later", i) for i in range(self.later)
        ]

    def _mark(self, known: Known) -> None:
        """Marks the rows that need fp64 by what is known of all columns."""
        kept = known[STUDENT, "sum_exp"] > (CERTAIN if self.guarded else 0)
        if self.problem.teacher is not None:
            kept &= known["apart"] > APART
        self.exact |= ~kept
        self.sum_exp = torch.stack(
            [known[name, "sum_exp"] for name in SIDES[: len(self.sides)]]
        ).amax(0)

    def _logits(self, rows: Rows) -> list[Tensor]:
        """Of both sides; in fp64 in buffers, and with a number for -inf, which times 0 is 0."""
        columns = self.problem.vocab_size
        found = [side[rows.outer, rows.inner, :columns] for side in self.sides]
        if self.store is self.exact_store:
            return [self.store.new().copy_(x).clamp_min_(MASKED) for x in found]
        dtype = self.store.dtype
        return [x if x.dtype == dtype else self.store.new().copy_(x) for x in found]

    def _softmax(
        self,
        x: Tensor,
        scale: float | Tensor,
        shift: Tensor | None = None,
        sum_exp: Tensor | None = None,
    ) -> Softmax:
        """With the shift and sum of all owners, or of these columns.

        Logits are measured from the top before they are scaled: a rounding that is common to the
        columns of one owner would not cancel against those of others.
        """
        shift = x.amax(-1, keepdim=True) if shift is None else shift
        log2_exp = torch.sub(x, shift, out=self.store.new()).mul_(scale / LN2)
        terms = torch.exp2(log2_exp, out=self.store.new())
        return Softmax(shift, log2_exp, terms, total(terms) if sum_exp is None else sum_exp)

    def _of(self, known: Known, name: Any, rows: Rows) -> Tensor:
        """Of these rows, [R, 1], in the dtype of what is computed."""
        return known[name][rows.flat, None].to(self.store.dtype)

    def _at_labels(self, logits: Tensor, labels: Labels) -> Tensor:
        """The labels' logits, 0 where another owner has them."""
        return torch.where(labels.own, logits.gather(-1, labels.columns[:, None])[:, 0], 0.0)

    def _labels(self, rows: Rows, known: Known) -> Labels:
        assert self.problem.labels is not None
        columns = self.problem.labels[rows.flat].long() - self.merge.first_column
        own = (columns >= 0) & (columns < self.problem.vocab_size)
        logs = [known[name][rows.flat] if name in known else columns for name in ("lp", "lq")]
        return Labels(own, torch.where(own, columns, 0), *logs)

    def _counts(self, known: Known) -> Tensor:
        """Rows with a logit on either side, [N]."""
        masked = [known[name, "shift"] == MASKED for name in SIDES[: len(self.sides)]]
        return ~(masked[0] | masked[-1])

    def _statistics(self, rows: Rows) -> Known:
        problem, new = self.problem, self.store.new
        logits = self._logits(rows)
        scales = [of_rows(scale, rows) for scale in self.scales]
        found: Known = {}
        if self.metrics:
            best = [x == x.amax(-1, keepdim=True) for x in (logits[0], logits[-1])]
            found["agreement"] = (best[0] & best[1]).any(-1).to(logits[0].dtype)
        if problem.labels is not None:
            labels = self._labels(rows, {})
            found["label"] = self._at_labels(logits[0], labels)
            found["sum"] = total(logits[0])
            if self.kind.label_aware and self.sides[1:]:
                found["teacher_label"] = self._at_labels(logits[-1], labels)
        softmaxes = [
            self._softmax(x, scale)
            for x, scale in zip(logits, (scales[0], scales[-1]), strict=False)
        ]
        if problem.labels is not None:
            at_one = isinstance(scales[0], float) and scales[0] == 1
            unit = softmaxes[0] if at_one else self._softmax(logits[0], 1.0)
            found["unit"] = unit.sum_exp
        for name, side in zip(SIDES, softmaxes, strict=False):
            found[name, "shift"], found[name, "sum_exp"] = side.shift, side.sum_exp
            if self.means:
                products = torch.mul(side.exp, side.log2_exp, out=new())
                found[name, "log2_exp"] = total(products)
                if self.tempered and self.entropy and name == STUDENT:
                    found["log2_exp_square"] = total(products.mul_(side.log2_exp))
        if softmaxes[1:]:
            q, p = softmaxes
            found["apart"] = _apart(q, p, new())
            found |= _closeness(q, p, new, self.tempered)
            if self.first:
                pair = Shard((q, p), scales[0], new, torch.zeros_like(q.sum_exp))
                self.kind.value_and_descent(pair, problem.a, problem.b)
                found |= zip(first_names(self.first), pair.found_first, strict=True)
        return {name: x[:, 0] if x.dim() == 2 else x for name, x in found.items()}


def is_tempered(problem: Problem) -> bool:
    """Whether the derivatives to T may be asked for, which are sums of all columns as well."""
    standardized = problem.standardize or problem.moments is not None
    return problem.temperature_trains or standardized


def _apart(q: Softmax, p: Softmax, spare: Tensor) -> Tensor:
    """The total variation of both sides over these columns alone, [R, 1]."""
    apart = torch.mul(q.exp, p.sum_exp / q.sum_exp, out=spare).sub_(p.exp)
    return torch.linalg.vector_norm(apart, 1, dim=-1, keepdim=True) / (2 * p.sum_exp)


def _closeness(
    q: Softmax, p: Softmax, new: Callable[[], Tensor], tempered: bool
) -> dict[Any, Tensor]:
    """How far apart the sides' terms are: their difference, and sums of their log-ratio d."""
    found = {"excess": p.sum_exp - q.sum_exp, "spread": torch.ones_like(q.sum_exp)}
    found |= {name: torch.zeros_like(q.sum_exp) for name in ("mean", "square", "cross")}
    if q.log2_exp.dtype != torch.float64:  # not in rows that need it
        return found
    d = torch.sub(p.log2_exp, q.log2_exp, out=new()).mul_(LN2)
    d.masked_fill_((q.exp + p.exp) == 0, 0.0)
    spread = d.abs().amax(-1, keepdim=True)
    found["spread"] = spread
    small = (spread[:, 0] < SMALL).nonzero()[:, 0]
    if len(small):
        d, terms = d[small], q.exp[small]
        found["excess"][small] = total(d.expm1().mul_(terms))
        products = d * terms
        found["mean"][small] = total(products)
        found["square"][small] = total(products * d)
        if tempered:
            found["cross"][small] = total(products.mul_(q.log2_exp[small]).nan_to_num_(nan=0.0))
    return found
