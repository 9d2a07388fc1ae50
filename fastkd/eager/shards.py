"""Rows of a softmax whose columns are spread over owners: three sweeps, and a gather between them.

    statistics of this owner's columns | gather | sums | gather | gradient, all of it local

Figures of rows are in fp64, and so the gathers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd import sharding
from fastkd.divergences.pair import LN2, MASKED, MASKED_BELOW, Descent, Softmax, total
from fastkd.problem import AGREEMENT, CE, ENTROPY, KD, TEACHER_ENTROPY, WIDTH, Coefficients, Problem

from .blocks import Rows, blank, new_gradient, new_values, vocabulary
from .columns import Columns
from .joins import (
    SIDES,
    STUDENT,
    TEACHER,
    Known,
    Shard,
    by_asked,
    empty,
    first_names,
    joined,
    kept_names,
    state_rows,
    statistics_names,
)
from .logits import weights_of, write_gradient
from .solver import CLOSE, FAR, ROUNDING, SPREAD, Terms, of_rows, without


def phases(problem: Problem, entropy: bool, metrics: bool) -> sharding.Forward:
    """`values`, and as `state` all that the gradient needs of other owners, in fp64."""
    sweeps = Sweeps(problem, entropy, metrics)
    known = yield from sweeps.known()
    return sweeps.values(known), sweeps.packed(known)


def backward(
    problem: Problem, state: Tensor, upstream: Coefficients, gradient: bool, temperature: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradient of the student's logits, in their dtype, and of each row's temperature."""
    sweeps = Sweeps(problem, upstream.entropy is not None, False)
    out = new_gradient(problem) if gradient else None
    degrees = upstream.kd.new_zeros(problem.rows) if temperature else None
    sweeps.gradient(sweeps.unpacked(state), upstream, out, degrees)
    return out, degrees


def fused(
    problem: Problem, coefficients: Coefficients, metrics: bool, out: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Weighted loss rows, `values` with metrics, and the gradient of the sum of those rows."""
    target = new_gradient(problem) if out is None else out.view(problem.student.shape)
    entropy = coefficients.entropy is not None
    alone = (coefficients.ce is None or problem.teacher is None) and not entropy
    room = vocabulary(target, problem) if alone and out is None else None
    sweeps = Sweeps(problem, entropy, metrics, room)
    known = sharding.run(problem.merge, sweeps.known())
    values = sweeps.values(known)
    sweeps.gradient(known, coefficients, target, None)
    if out is not None:
        blank(problem, target)
    return coefficients.weigh(values), values if metrics else None, target


# --- sweeps -----------------------------------------------------------------------------------


PARTS = ("origin", "sum_exp")


class Sweeps(Columns):
    """The sweeps over this owner's columns."""

    def known(self) -> sharding.Phases[Known]:
        """All that is known of the rows when both sweeps are done."""
        names = statistics_names(self)
        fields = self._swept(names, self._statistics)
        if self.sides[1:]:
            self._plain(dict(zip(names, fields, strict=True)))
        pieces = yield torch.cat([fields, self.exact[None].double()])
        known = joined(self, dict(zip([*names, "exact"], pieces.unbind(1), strict=True)))
        self._mark(known)
        later: list[Any] = [("later", i) for i in range(self.later)]
        if self.tempered and self.sides[1:]:
            later.append(("later", "log2_exp"))
        later += ["mass"] * self.cancels_later
        if later:
            self._table(known)
            pieces = yield self._swept(later, self._sums, ["slope"] * self.cancels_later)
            known.update(zip(later, pieces.sum(0), strict=True))
        if self.cancels_later:
            known[STUDENT, "sum_exp"] = known[STUDENT, "sum_exp"] * known["mass"]
        self._divergence(known)
        return known

    def _plain(self, own: Known) -> None:
        """What stands for the `closeness` of rows that are not in fp64, and far apart."""
        excess = own[TEACHER, "sum_exp"] - own[STUDENT, "sum_exp"]
        own["excess"].copy_(torch.where(self.exact, own["excess"], excess))
        own["spread"].masked_fill_(~self.exact, 1.0)

    # --- the second and third ---

    def _pair(self, rows: Rows, later: bool) -> Shard:
        """Of these rows, with the shifts and sums of all owners, and with their later sums."""
        scales = [of_rows(scale, rows) for scale in self.scales]
        sides = [
            self._later(x, scale, *(self._of((name, part), rows) for part in PARTS))
            for name, x, scale in zip(
                SIDES, self._logits(rows), (scales[0], scales[-1]), strict=False
            )
        ]
        if (kept := self._place(rows)) is not None:
            weight, place = self._of("weight", rows), kept if later else self.store.new()
            sides[0].find_exp = lambda: torch.mul(kept, weight, out=place)
            if not self.sides[1:]:  # the cross-entropy asks for shares alone
                q = Softmax(sides[0].shift, kept, kept, sides[0].sum_exp / weight)
                return self._shard([q], rows, scales[0], self.store.new, later)
        return self._shard(sides, rows, scales[0], self.store.new, later)

    def _shard(
        self,
        sides: Sequence[Softmax],
        rows: Rows,
        scale: float | Tensor,
        new: Callable[[], Tensor],
        later: bool,
    ) -> Shard:
        known = self.tables[True]
        first = by_asked(self.first, lambda name: self._of(name, rows))
        sums = [self._of(("later", i), rows) for i in range(self.later)] if later else None
        labels = None if self.problem.labels is None else self._labels(rows)
        gap = self._of("gap", rows) if sides[1:] else torch.zeros_like(sides[0].sum_exp)
        mean = (STUDENT, "log2_exp")
        student_mean = self._of(mean, rows) if mean in known else None
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
            if self.store is self.exact_store:  # with more digits than at first
                found["mass"] = total(pair.student.exp) / pair.student.sum_exp
        if self.tempered:
            found["later", "log2_exp"] = total(_times_log2_exp(descent.terms, pair))
        return found

    def _divergence(self, known: Known) -> None:
        """Adds the divergence of all rows, its derivative to T, and which differ little."""
        problem = self.problem
        if problem.teacher is None:
            return
        rows = Rows(0, slice(0, problem.rows), slice(0, problem.rows))
        self._table(known)
        self.begin(True)
        sides = [
            empty(known[name, "shift"][:, None], known[name, "sum_exp"][:, None]) for name in SIDES
        ]
        none = sides[0].exp
        scale = self.scales[0]
        pair = self._shard(sides, rows, scale, lambda: torch.empty_like(none), later=True)
        value, descent = self.kind.value_and_descent(pair, problem.a, problem.b)
        kd = value[:, 0].clone()
        close = kd.abs() < CLOSE
        kd.masked_fill_(kd.abs() < ROUNDING, 0.0)
        curvature = self.kind.curvature(problem.a, problem.b)
        if curvature is None:
            close &= known["spread"] == 0
        else:
            close &= known["spread"] < SPREAD
            kd = torch.where(close, curvature / 2 * known["variance"], kd)
        known["kd"], known["close"] = kd, close.double()
        if self.tempered:
            factor = torch.as_tensor(descent.factor, dtype=kd.dtype, device=kd.device)
            sums = torch.as_tensor(descent.total, dtype=kd.dtype, device=kd.device)
            factor, sums = factor.expand_as(value)[:, 0], sums.expand_as(value)[:, 0]
            slope = LN2 * (sums * known[STUDENT, "log2_exp"] - factor * known["later", "log2_exp"])
            dead = ~self._counts(known) | (kd.abs() > FAR) & ~_finite(descent)[:, 0].expand_as(kd)
            slope = torch.where(dead, 0.0, slope)
            if curvature is not None:
                slope = torch.where(close, -curvature * LN2 * known["covariance"], slope)
            known["kd_slope"] = slope

    # --- what comes of it ---

    def values(self, known: Known) -> Tensor:
        """`values`, in the dtype of the problem."""
        problem = self.problem
        kinds = problem.kinds(self.entropy, self.metrics)
        found = {KD: known.get("kd")}
        if problem.labels is not None:
            found[CE] = self._cross_entropy(known)
        if self.entropy or self.metrics:
            found[ENTROPY] = self._entropy(known, STUDENT)
        if self.metrics:
            found[TEACHER_ENTROPY] = self._entropy(known, TEACHER)
            found[AGREEMENT] = known["agreement"]
        values = new_values(problem, kinds)
        kept = self._counts(known)
        if problem.counted is not None:
            kept = kept & problem.counted
        for kind, value in found.items():
            if kind < kinds and value is not None:
                value = torch.where(value > FAR, torch.inf, value)
                values[kind] = torch.where(kept, value, 0.0).to(values.dtype)
        return values

    def _cross_entropy(self, known: Known) -> Tensor:
        problem = self.problem
        assert problem.labels is not None
        smoothing, columns = problem.label_smoothing, problem.columns
        shift = known[STUDENT, "shift"]
        loss = known["unit"].log() - (1 - smoothing) * (known["label"] - shift)
        if smoothing:
            loss = loss - smoothing * (known["sum"] / columns - shift)
        labels = problem.labels
        return torch.where((labels >= 0) & (labels < columns), loss, torch.nan)

    def _entropy(self, known: Known, name: str) -> Tensor:
        name = name if (name, "log2_exp") in known else STUDENT
        return known[name, "sum_exp"].log() - LN2 * known[name, "log2_exp"]

    def gradient(
        self, known: Known, upstream: Coefficients, out: Tensor | None, degrees: Tensor | None
    ) -> None:
        """Writes the gradient to the student's logits, and to the temperature of each row."""
        problem = self.problem
        target = None if out is None else out[..., : problem.vocab_size]
        weights = weights_of(upstream, self.exact_scales[0])
        plain = Coefficients._make(
            x.to(problem.dtype) if isinstance(x, Tensor) else x for x in weights
        )
        self._table(known)
        counts, odd = self._counts(known), None
        if problem.teacher is not None:
            odd = ~counts | (known["kd"].abs() < FAR).logical_not_() | (known["close"] > 0)
            odd = odd if odd.any() else None
        some_count = None if counts.all() else counts
        for exact, some in ((False, plain), (True, weights)):
            for rows in self._rows(exact):
                terms = self._terms(rows, known, some_count, odd)
                write_gradient(problem, rows, terms, some, target, None)
        if degrees is not None:
            degrees.copy_(self._temperature(known, weights))

    def _temperature(self, known: Known, weights: Coefficients) -> Tensor:
        """The derivative to T of each row, the same on all owners."""
        slopes = (known.get("kd_slope"), None, known.get("entropy_slope"))
        found = sum(
            -(weight[:, 0] if isinstance(weight, Tensor) else weight) * slope
            for weight, slope in zip(weights, slopes, strict=True)
            if weight is not None and slope is not None
        )
        kept = self._counts(known)
        if self.problem.counted is not None:
            kept = kept & self.problem.counted
        if self.problem.moments is not None:
            found = found * self.problem.moments[0, WIDTH]
        return torch.where(kept, found, 0.0)

    def _terms(self, rows: Rows, known: Known, counts: Tensor | None, odd: Tensor | None) -> Terms:
        """counts: see `_counts`; odd: [N], rows whose descent is none, or not that of the formulas.

        None: all count, none is odd.
        """
        problem, tempering = self.problem, None
        pair, unit = self._pair(rows, later=True), None
        if problem.labels is not None:
            unit = pair.student
            if not isinstance(pair.student_scale, float) or pair.student_scale != 1:
                unit = self._unit(rows)
        if self.tempered:
            zero = torch.zeros_like(pair.student.sum_exp)
            slopes = [
                self._of(name, rows) if name in known else zero
                for name in ("kd_slope", "entropy_slope")
            ]
            tempering = slopes[0], slopes[1]
        descent = None
        if problem.teacher is not None:
            _, descent = self.kind.value_and_descent(pair, problem.a, problem.b)
            if odd is not None and odd[rows.flat].any():
                descent = self._mended(rows, known, pair, descent)
        self._make(pair.student if problem.teacher is not None or self.entropy else unit, unit)
        here = None if counts is None else counts[rows.flat, None]
        place = self._place(rows) if here is None else None
        return Terms({}, pair, descent, unit, here, tempering, place)

    def _make(self, *sides: Softmax | None) -> None:
        """Finds what the gradient reads of the student's logits, which it may overwrite."""
        made = [side.exp for side in sides if side is not None]
        if sides[0] is not None and made and (self.entropy or self.problem.moments is not None):
            made.append(sides[0].log2_exp)

    def _mended(self, rows: Rows, known: Known, pair: Shard, descent: Descent) -> Descent:
        """See `Solver.mended`: but what says so is known of all columns."""
        dead = ~self._counts(known)[rows.flat]
        values, close = self._of("kd", rows)[:, 0], known["close"][rows.flat] > 0
        infinite = values.abs() >= FAR
        if infinite.any():
            dead = dead | infinite & ~_finite(descent)[:, 0]
        if close.any():
            descent = self._close(rows, known, close, pair, descent)
        if values.isnan().any():  # and so is all of the gradient, which shows it
            descent = descent._replace(
                factor=descent.factor * torch.where(values.isnan(), values, 1)[:, None]
            )
        return without(descent, dead[:, None]) if dead.any() else descent

    def _close(
        self, rows: Rows, known: Known, close: Tensor, pair: Shard, descent: Descent
    ) -> Descent:
        """Puts in the first term of rows that differ little."""
        q = pair.student
        scales = [of_rows(scale, rows) for scale in self.exact_scales]
        columns = self.problem.vocab_size
        d = _log2_exp(self.sides[1], rows, known[TEACHER, "shift"], scales[-1], columns)
        d -= _log2_exp(self.sides[0], rows, known[STUDENT, "shift"], scales[0], columns)
        d.masked_fill_(q.exp + pair.teacher.exp == 0, 0.0)
        d -= known["mean"][rows.flat, None]
        curvature = self.kind.curvature(self.problem.a, self.problem.b) or 0.0
        close = close[:, None]
        terms = torch.where(close, d * q.exp, descent.terms)
        factor = torch.where(close, curvature / q.sum_exp, descent.factor)
        return Descent(terms, factor, torch.where(close, 0.0, descent.total))

    def packed(self, known: Known) -> Tensor:
        """What the gradient needs, [F, N]."""
        kept = [self.exact.double()] + [known[name] for name in self._kept()]
        spare = state_rows(self.problem, self.entropy) - len(kept)
        return torch.stack(kept + [torch.zeros_like(kept[0])] * spare)

    def unpacked(self, state: Tensor) -> Known:
        self.exact = state[0] > 0
        return dict(zip(self._kept(), state[1:], strict=False))

    def _kept(self) -> list[Any]:
        """The names of what the gradient needs; the sums that the divergence asks for come last."""
        names = kept_names(self.problem, self.entropy) + first_names(self.first)
        return names + [("later", i) for i in range(self.later)]


# --- pieces of rows ---------------------------------------------------------------------------


def _times_log2_exp(terms: Tensor, pair: Shard) -> Tensor:
    log2_exps = pair.student.log2_exp
    return torch.mul(terms, log2_exps, out=pair.new()).masked_fill_(log2_exps <= MASKED_BELOW, 0.0)


def _finite(descent: Descent) -> Tensor:
    """Whether the slopes of a row are, [R, 1]; with a slope, their sum is infinite."""
    here = descent.terms.device
    factor, sums = (torch.as_tensor(x, device=here) for x in (descent.factor, descent.total))
    return factor.abs() + sums.abs() < FAR


def _log2_exp(
    logits: Tensor, rows: Rows, shift: Tensor, scale: float | Tensor, columns: int
) -> Tensor:
    """(logit - shift) / T of these rows, in fp64."""
    x = logits[rows.outer, rows.inner, :columns].double().clamp_min_(MASKED)
    return x.sub_(shift[rows.flat, None]).mul_(scale)
