"""Rows of a softmax whose columns are spread over owners: three sweeps, and a gather between them.

    statistics of this owner's columns | gather | sums | gather | gradient, all of it local

Figures of rows are in fp64, and so the gathers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastkd import sharding
from fastkd.divergences.pair import LN2, MASKED_BELOW, Descent, Softmax, total
from fastkd.problem import AGREEMENT, CE, ENTROPY, KD, TEACHER_ENTROPY, Coefficients, Problem

from .blocks import Rows, blank, new_gradient, new_values, of_rows, vocabulary
from .columns import Columns
from .joins import (
    PARTS,
    SIDES,
    STUDENT,
    TEACHER,
    Known,
    Shard,
    empty,
    joined,
    kept_names,
    state_rows,
    statistics_names,
)
from .logits import weights_of, write_gradient
from .near import CLOSE, ROUNDING, first_term, log_ratios, serves
from .solver import FAR, Terms, finite, mended


def phases(problem: Problem, entropy: bool, metrics: bool) -> sharding.Forward:
    """`values`, and as `state` all that the gradient needs of other owners, in fp64."""
    sweeps = Sweeps(problem, entropy, metrics)
    yield from sweeps.forward()
    return sweeps.values(), sweeps.packed()


def backward(
    problem: Problem, state: Tensor, upstream: Coefficients, gradient: bool, temperature: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradient of the student's logits, in their dtype, and of each row's temperature."""
    sweeps = Sweeps(problem, upstream.entropy is not None, False)
    sweeps.unpack(state)
    out = new_gradient(problem) if gradient else None
    target = None if out is None else vocabulary(out, problem)
    temperature_grad = upstream.kd.new_zeros(problem.rows) if temperature else None
    weights = weights_of(upstream, sweeps.plain.scales[0])
    for rows, terms in sweeps:
        write_gradient(problem, rows, terms, weights, target, temperature_grad)
    return out, temperature_grad


def fused(
    problem: Problem, coefficients: Coefficients, metrics: bool, out: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Weighted loss rows, `values` with metrics, and the gradient of the sum of those rows."""
    inplace = out is not None
    out = new_gradient(problem) if out is None else out.view(problem.student.shape)
    target, entropy = vocabulary(out, problem), coefficients.entropy is not None
    alone = (coefficients.ce is None or problem.teacher is None) and not entropy
    sweeps = Sweeps(problem, entropy, metrics, target if alone and not inplace else None)
    sharding.run(problem.merge, sweeps.forward())
    values = sweeps.values()
    weights = weights_of(coefficients, sweeps.plain.scales[0])
    for rows, terms in sweeps:
        write_gradient(problem, rows, terms, weights, target, None)
    if inplace:
        blank(problem, out)
    return coefficients.weigh(values), values if metrics else None, out


# --- sweeps -----------------------------------------------------------------------------------


class Sweeps(Columns):
    """The sweeps over this owner's columns."""

    def forward(self) -> sharding.Phases[None]:
        """Finds all that is to be known of the rows, by two sweeps."""
        names = statistics_names(self)
        fields = self._swept(names, self._statistics, self._doubtful_statistics)
        pieces = yield torch.cat([fields, self.in_fp64[None].double()])
        self._learn(joined(self, dict(zip([*names, "exact"], pieces.unbind(1), strict=True))))
        self._mark()
        later: list[Any] = [("later", i) for i in range(self.later)]
        if self.tempered and self.sides[1:]:
            later.append(("later", "log2_exp"))
        later += ["mass"] * self.cancels_later
        if later:
            own = ["slope"] * self.cancels_later
            pieces = yield self._swept(later, self._sums, self._doubtful_sums, own)
            found = dict(zip(later, pieces.sum(0), strict=True))
            if self.cancels_later:
                name = STUDENT, "sum_exp"
                found[name] = self.known[name] * found["mass"]
            self._learn(found)
        if self.sides[1:]:
            self._divergence()

    # --- the second and third ---

    def _pair(self, rows: Rows, later: bool) -> Shard:
        """The pair of these rows, with the shifts and sums of all owners, and their later sums."""
        precision = self.precision
        scales = [of_rows(scale, rows) for scale in precision.scales]
        sides = [
            self._later(
                x, self._in_full((name, "shift"), rows), scale, self._of((name, "sum_exp"), rows)
            )
            for name, x, scale in zip(SIDES, precision.logits(rows), scales, strict=False)
        ]
        if (kept := self._place(rows)) is not None:
            weight, place = self._of("weight", rows), kept if later else precision.store.new()
            sides[0].find_exp = lambda: torch.mul(kept, weight, out=place)
            if not self.sides[1:]:  # the cross-entropy asks for shares alone
                q = Softmax(sides[0].shift, kept, kept, sides[0].sum_exp / weight)
                return self._shard([q], rows, scales[0], precision.store.new, later)
        return self._shard(sides, rows, scales[0], precision.store.new, later)

    def _shard(
        self,
        sides: Sequence[Softmax],
        rows: Rows,
        scale: float | Tensor,
        new: Callable[[], Tensor],
        later: bool,
    ) -> Shard:
        first = {name: self._of(name, rows) for name in self.first}
        sums = [self._of(("later", i), rows) for i in range(self.later)] if later else None
        labels = None if self.problem.labels is None else self._labels(rows)
        gap = self._of("gap", rows) if sides[1:] else torch.zeros_like(sides[0].sum_exp)
        mean = (STUDENT, "log2_exp")
        student_mean = self._of(mean, rows) if mean in self.known else None
        pair = (sides[0], sides[-1])
        return Shard(pair, scale, new, gap, first, sums, labels, student_mean)

    def _sums(self, rows: Rows) -> Known:
        """The sums that need the sums of the exponentials of all."""
        pair = self._pair(rows, later=False)
        _, descent = self.kind.value_and_descent(pair, self.problem.a, self.problem.b)
        found: Known = {("later", i): sums for i, sums in enumerate(pair.found_later)}
        if self.cancels_later:
            share = self._of("share", rows)
            slope = torch.as_tensor(descent.total, device=share.device).abs()
            found["slope"] = slope / share.clamp_min(torch.finfo(share.dtype).tiny)
            found["mass"] = share
            if self.precision.exact:  # with more digits than at first
                found["mass"] = total(pair.student.exp) / pair.student.sum_exp
        if self.tempered:
            found["later", "log2_exp"] = total(_times_log2_exp(descent.terms, pair))
        return found

    def _divergence(self) -> None:
        """Adds the divergence of all rows, its derivative to T, and which differ little."""
        problem, known, self.precision = self.problem, self.known, self.exact
        sides = [empty(*(self._of((name, part), self.every) for part in PARTS)) for name in SIDES]
        none, scale = sides[0].exp, self.exact.scales[0]
        pair = self._shard(sides, self.every, scale, lambda: torch.empty_like(none), later=True)
        value, descent = self.kind.value_and_descent(pair, problem.a, problem.b)
        kd = value[:, 0].clone()
        close = kd.abs() < CLOSE
        kd.masked_fill_(kd.abs() < ROUNDING, 0.0)
        curvature = self.kind.curvature(problem.a, problem.b)
        close &= serves(known["spread"], curvature)
        kd = torch.where(close, (curvature or 0.0) / 2 * known["variance"], kd)
        known["kd"], known["close"] = kd, close.double()
        if self.tempered:
            mean, sums = known[STUDENT, "log2_exp"], known["later", "log2_exp"]
            slope = LN2 * (descent.total * mean[:, None] - descent.factor * sums[:, None])[:, 0]
            dead = ~self.counts | (kd.abs() > FAR) & ~finite(descent)[:, 0].expand_as(kd)
            slope = torch.where(dead, 0.0, slope)
            if curvature is not None:
                slope = torch.where(close, -curvature * LN2 * known["covariance"], slope)
            known["kd_slope"] = slope

    # --- what comes of it ---

    def values(self) -> Tensor:
        """`values`, in the dtype of the problem."""
        problem, known = self.problem, self.known
        kinds = problem.kinds(self.entropy, self.metrics)
        found = {KD: known.get("kd")}
        if problem.labels is not None:
            found[CE] = self._cross_entropy()
        if self.entropy or self.metrics:
            found[ENTROPY] = self._entropy(STUDENT)
        if self.metrics:
            found[TEACHER_ENTROPY] = self._entropy(TEACHER)
            found[AGREEMENT] = known["agreement"]
        values = new_values(problem, kinds)
        kept = self.counts if problem.counted is None else self.counts & problem.counted
        for kind, value in found.items():
            if kind < kinds and value is not None:
                value = torch.where(value > FAR, torch.inf, value)
                values[kind] = torch.where(kept, value, 0.0).to(values.dtype)
        return values

    def _cross_entropy(self) -> Tensor:
        problem, known = self.problem, self.known
        assert problem.labels is not None
        smoothing, columns = problem.label_smoothing, problem.columns
        shift = known[STUDENT, "shift"]
        loss = known["unit"].log() - (1 - smoothing) * (known["label"] - shift)
        if smoothing:
            loss = loss - smoothing * (known["sum"] / columns - shift)
        labels = problem.labels
        return torch.where((labels >= 0) & (labels < columns), loss, torch.nan)

    def _entropy(self, name: str) -> Tensor:
        name = name if name in self.sides else STUDENT
        return self.known[name, "sum_exp"].log() - LN2 * self.known[name, "log2_exp"]

    def __iter__(self) -> Iterator[tuple[Rows, Terms]]:
        """The terms of all rows that count, block by block, but for their values."""
        for precision in self.precisions:
            for rows in self._rows(precision):
                yield rows, self._terms(rows)

    @cached_property
    def odd(self) -> Tensor | None:
        """Rows that have no gradient, or not that of the formulas, [N]; None: there is none."""
        odd = ~self.counts
        if self.sides[1:]:
            odd = odd | ~(self.known["kd"].abs() < FAR) | (self.known["close"] > 0)
        return odd if odd.any() else None

    @cached_property
    def tempering(self) -> list[Tensor]:
        """As Terms have it, [N, 1]; in fp64, and so the same on all owners."""
        none = torch.zeros_like(self.known[STUDENT, "shift"])
        slopes = [self.known.get(name, none) for name in ("kd_slope", "entropy_slope")]
        return [torch.where(self.counts, slope, 0.0)[:, None] for slope in slopes]

    def _terms(self, rows: Rows) -> Terms:
        problem, pair = self.problem, self._pair(rows, later=True)
        descent = unit = counts = tempering = None
        if problem.labels is not None:
            unit = pair.student
            if not isinstance(pair.student_scale, float) or pair.student_scale != 1:
                unit = self._unit(rows)
        if self.sides[1:]:
            _, descent = self.kind.value_and_descent(pair, problem.a, problem.b)
        if self.odd is not None and self.odd[rows.flat].any():
            counts = self.counts[rows.flat, None]
            descent = None if descent is None else self._mended(rows, pair, descent)
        self._make(pair.student if self.sides[1:] or self.entropy else unit, unit)
        if self.tempered:
            tempering = [slope[rows.flat] for slope in self.tempering]
        place = self._place(rows) if counts is None else None
        return Terms({}, pair, descent, unit, counts, tempering, place)

    def _make(self, *sides: Softmax | None) -> None:
        """Finds what the gradient reads of the student's logits, which it may overwrite."""
        made = [side.exp for side in sides if side is not None]
        if sides[0] is not None and made and (self.entropy or self.problem.moments is not None):
            made.append(sides[0].log2_exp)

    def _mended(self, rows: Rows, pair: Shard, descent: Descent) -> Descent:
        """The descent mended as by Solver, from what is known of all columns."""
        some = self.known["close"][rows.flat].nonzero()[:, 0]
        if len(some):
            d = log_ratios(self.exact, rows, pair, some)
            d -= self._in_full("mean", rows)[some]
            curvature = self.kind.curvature(self.problem.a, self.problem.b)
            descent = first_term(descent, some, d, pair.student, curvature)
        return mended(descent, self._of("kd", rows)[:, 0], ~self.counts[rows.flat])

    def packed(self) -> Tensor:
        """What the gradient needs, [F, N]."""
        kept = [self.in_fp64.double()] + [self.known[name] for name in self._kept()]
        spare = state_rows(self.problem, self.entropy) - len(kept)
        return torch.stack(kept + [torch.zeros_like(kept[0])] * spare)

    def unpack(self, state: Tensor) -> None:
        self.in_fp64 = state[0] > 0
        self._learn(dict(zip(self._kept(), state[1:], strict=False)))

    def _kept(self) -> list[Any]:
        """The names of what the gradient needs; the sums that the divergence asks for come last."""
        later = [("later", i) for i in range(self.later)]
        return [*kept_names(self.problem, self.entropy), *self.first, *later]


# --- pieces of rows ---------------------------------------------------------------------------


def _times_log2_exp(terms: Tensor, pair: Shard) -> Tensor:
    log2_exps = pair.student.log2_exp
    return torch.mul(terms, log2_exps, out=pair.new()).masked_fill_(log2_exps <= MASKED_BELOW, 0.0)
