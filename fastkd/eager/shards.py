"""Rows of a softmax whose columns are spread over owners: three sweeps, and a gather between them.

    statistics of this owner's columns | gather | sums | gather | gradient, all of it local

Rows are computed in the dtype of the problem, and in fp64 where that may lose digits. Which these
are the divergence itself says too late; the total variation of both sides, of which the first sweep
gives bounds, says it before. Figures of rows are in fp64, and so the gathers.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd import sharding
from fastkd.divergences import FATHOM, LN2, MASKED, Divergence, Pull, Softmax, total
from fastkd.problem import (
    AGREEMENT,
    CE,
    ENTROPY,
    KD,
    TEACHER_ENTROPY,
    WIDTH,
    Coefficients,
    Problem,
)

from .blocks import Rows, Store, blocks, largest
from .joins import (
    SIDES,
    STUDENT,
    TEACHER,
    Known,
    Labels,
    Shard,
    asked,
    empty,
    first_names,
    is_top,
    joined,
    statistics_names,
)
from .logits import blank, new_gradient, weights_of, write_gradient
from .solver import (
    CERTAIN,
    CLOSE,
    FAR,
    LARGE,
    LEAST_SCALE,
    ROUNDING,
    SPREAD,
    Terms,
    exact_scales,
    of_rows,
    without,
)

# In a row whose log-ratios are smaller, the difference of the masses is summed entry by entry.
SMALL = 1e-3
# Rows whose sides are further apart than the first, in total variation, have divergences that fp32
# gives. An owner takes the second for its own columns, and the third for a slope near its bound:
# where a row is near, or saturated, the columns of owners that do not find so weigh little.
APART, APART_HERE, NEARLY_HERE = 1 / 7, 1 / 6, 1 - 2.0**-5


def forward(problem: Problem, entropy: bool, metrics: bool) -> tuple[Tensor, Tensor]:
    """`values`, and as `state` all that the gradient needs of other owners, in fp64."""
    merge = sharding.of(problem.merge)
    (result,) = sharding.together(merge, phases(problem, entropy, metrics))
    return result


def phases(
    problem: Problem, entropy: bool, metrics: bool
) -> Generator[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """`forward` up to its gathers: see `sharding.together`."""
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
    sweeps = Sweeps(problem, coefficients.entropy is not None, metrics)
    (known,) = sharding.together(sweeps.merge, sweeps.known())
    values = sweeps.values(known)
    target = new_gradient(problem) if out is None else out.view(problem.student.shape)
    sweeps.gradient(known, coefficients, target, None)
    if out is not None:
        blank(problem, target)
    return coefficients.weigh(values), values if metrics else None, target


# --- sweeps -----------------------------------------------------------------------------------


PARTS = ("top", "mass")


class Sweeps:
    """The sweeps over this owner's columns of all rows that count."""

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
        # The derivatives to T are sums as well.
        self.tempered = problem.temperature_trains or problem.moments is not None
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

    def known(self) -> Generator[Tensor, Tensor, Known]:
        """All that is known of the rows when both sweeps are done."""
        names = statistics_names(self)
        pieces = yield self._swept(names, self._statistics)
        known = joined(self, dict(zip(names, pieces.unbind(1), strict=True)))
        self._mark(known)
        later: list[Any] = [("later", i) for i in range(self.later)]
        if self.tempered and self.sides[1:]:
            later.append(("later", "depth"))
        if later:
            pieces = yield self._swept(later, lambda rows: self._sums(rows, known))
            known.update(zip(later, pieces.sum(0), strict=True))
        self._divergence(known)
        return known

    def _swept(self, names: Sequence[Any], find: Callable[[Rows], Known]) -> Tensor:
        """What a sweep finds of this owner's columns, [F, N]; 0 in rows that do not count."""
        problem = self.problem
        fields = problem.student.new_zeros(len(names), problem.rows, dtype=torch.float64)
        for index, name in enumerate(names):
            if is_top(name):
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
        for rows in blocks(self.problem, largest(self.problem)):
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
        if self.guarded and (STUDENT, "mass") in found:
            kept &= found[STUDENT, "mass"] > CERTAIN
        for scale in self.scales:
            if isinstance(scale, Tensor):
                kept &= of_rows(scale, rows)[:, 0] > LEAST_SCALE
        if "saturated" in found:
            kept &= found["saturated"] == 0
        masses = [found[name, "mass"] for name in SIDES if (name, "mass") in found]
        size = torch.stack(masses).amax(0) if masses else self.mass[rows.flat]
        for name in found.keys() & set(self._sums_of_columns()):
            kept &= found[name].abs() < LARGE * size
        return ~kept

    def _sums_of_columns(self) -> list[Any]:
        return [name for name in first_names(self.first) if not is_top(name)] + [
            ("later", i) for i in range(self.later)
        ]

    def _mark(self, known: Known) -> None:
        """Marks the rows that need fp64 by what is known of all columns."""
        kept = known[STUDENT, "mass"] > (CERTAIN if self.guarded else 0)
        if self.problem.teacher is not None:
            kept &= known["apart"] > APART
        self.exact |= ~kept
        self.mass = torch.stack([known[name, "mass"] for name in SIDES[: len(self.sides)]]).amax(0)

    def _logits(self, rows: Rows) -> list[Tensor]:
        """Of both sides; in fp64 in buffers, and with a number for -inf, which times 0 is 0."""
        columns = self.problem.vocab_size
        found = [side[rows.outer, rows.inner, :columns] for side in self.sides]
        if self.store is self.exact_store:
            return [self.store.new().copy_(x).clamp_min_(MASKED) for x in found]
        dtype = self.store.dtype
        return [x if x.dtype == dtype else self.store.new().copy_(x) for x in found]

    # --- the first sweep ---

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
            found["unit"] = unit.mass
        for name, side in zip(SIDES, softmaxes, strict=False):
            found[name, "top"], found[name, "mass"] = side.top, side.mass
            if self.means:
                products = torch.mul(side.terms, side.depth, out=new())
                found[name, "depth"] = total(products)
                if self.tempered and self.entropy and name == STUDENT:
                    found["depth_square"] = total(products.mul_(side.depth))
        if softmaxes[1:]:
            q, p = softmaxes
            found["apart"] = _apart(q, p, new())
            found |= _closeness(q, p, new, self.tempered)
            if self.first:
                pair = Shard((q, p), scales[0], new, torch.zeros_like(q.mass))
                self.kind.value_and_pull(pair, problem.a, problem.b)
                found |= zip(first_names(self.first), pair.found_first, strict=True)
        return {name: x[:, 0] if x.dim() == 2 else x for name, x in found.items()}

    def _at_labels(self, logits: Tensor, labels: Labels) -> Tensor:
        """The labels' logits, 0 where another owner has them."""
        return torch.where(labels.own, logits.gather(-1, labels.columns[:, None])[:, 0], 0.0)

    def _labels(self, rows: Rows, known: Known) -> Labels:
        assert self.problem.labels is not None
        columns = self.problem.labels[rows.flat].long() - self.merge.first_column
        own = (columns >= 0) & (columns < self.problem.vocab_size)
        logs = [known[name][rows.flat] if name in known else columns for name in ("lp", "lq")]
        return Labels(own, torch.where(own, columns, 0), *logs)

    # --- the second and third ---

    def _pair(self, rows: Rows, known: Known, later: bool) -> Shard:
        """Of these rows, with the tops and masses of all owners, and with their later sums."""
        scales = [of_rows(scale, rows) for scale in self.scales]
        scales = [scales[0], scales[-1]]
        sides = [
            self._softmax(x, scale, *(self._of(known, (name, part), rows) for part in PARTS))
            for name, x, scale in zip(SIDES, self._logits(rows), scales, strict=False)
        ]
        return self._shard(sides, rows, known, scales[0], self.store.new, later)

    def _softmax(
        self,
        x: Tensor,
        scale: float | Tensor,
        top: Tensor | None = None,
        mass: Tensor | None = None,
    ) -> Softmax:
        """With the top and mass of all owners, or of these columns.

        Logits are measured from the top before they are scaled: a rounding that is common to the
        columns of one owner would not cancel against those of others.
        """
        top = x.amax(-1, keepdim=True) if top is None else top
        depth = torch.sub(x, top, out=self.store.new()).mul_(scale / LN2)
        terms = torch.exp2(depth, out=self.store.new())
        return Softmax(top, depth, terms, total(terms) if mass is None else mass)

    def _of(self, known: Known, name: Any, rows: Rows) -> Tensor:
        """Of these rows, [R, 1], in the dtype of what is computed."""
        return known[name][rows.flat, None].to(self.store.dtype)

    def _shard(
        self,
        sides: list[Softmax],
        rows: Rows,
        known: Known,
        scale: float | Tensor,
        new: Callable[[], Tensor],
        later: bool,
    ) -> Shard:
        def of(name: Any) -> Tensor:
            return self._of(known, name, rows)

        first = [of(name) for name in first_names(self.first)]
        sums = [of(("later", i)) for i in range(self.later)] if later else None
        labels = None if self.problem.labels is None else self._labels(rows, known)
        gap = of("gap") if sides[1:] else torch.zeros_like(sides[0].mass)
        mean = of((STUDENT, "depth")) if (STUDENT, "depth") in known else None
        pair = (sides[0], sides[-1])
        return Shard(pair, scale, new, gap, first, sums, labels, mean)

    def _sums(self, rows: Rows, known: Known) -> Known:
        """The sums that need the masses of all."""
        pair = self._pair(rows, known, later=False)
        _, pull = self.kind.value_and_pull(pair, self.problem.a, self.problem.b)
        found: Known = {("later", i): sums[:, 0] for i, sums in enumerate(pair.found_later)}
        bound = self.kind.most(self.problem.a, self.problem.b)
        if self.guarded and bound < torch.inf:  # of this owner's share of the student's mass
            share = total(pair.student.terms) / pair.student.mass
            slopes = torch.as_tensor(pull.total)
            found["saturated"] = (slopes.abs() > NEARLY_HERE * bound * share)[:, 0]
        if self.tempered:
            found["later", "depth"] = total(_times_depth(pull.terms, pair))[:, 0]
        return found

    def _divergence(self, known: Known) -> None:
        """Adds the divergence of all rows, its derivative to T, and which differ little."""
        problem = self.problem
        if problem.teacher is None:
            return
        rows = Rows(0, slice(0, problem.rows), slice(0, problem.rows))
        self.begin(True)
        sides = [empty(known[name, "top"][:, None], known[name, "mass"][:, None]) for name in SIDES]
        none = sides[0].terms
        scale = self.scales[0]
        pair = self._shard(sides, rows, known, scale, lambda: torch.empty_like(none), later=True)
        value, pull = self.kind.value_and_pull(pair, problem.a, problem.b)
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
            factor = torch.as_tensor(pull.factor, dtype=kd.dtype, device=kd.device)
            sums = torch.as_tensor(pull.total, dtype=kd.dtype, device=kd.device)
            factor, sums = factor.expand_as(value)[:, 0], sums.expand_as(value)[:, 0]
            slope = LN2 * (sums * known[STUDENT, "depth"] - factor * known["later", "depth"])
            dead = ~self._counts(known) | (kd.abs() > FAR) & ~_finite(pull)[:, 0].expand_as(kd)
            slope = torch.where(dead, 0.0, slope)
            if curvature is not None:
                slope = torch.where(close, -curvature * LN2 * known["covariance"], slope)
            known["kd_slope"] = slope

    def _counts(self, known: Known) -> Tensor:
        """Rows with a logit on either side, [N]."""
        masked = [known[name, "top"] == MASKED for name in SIDES[: len(self.sides)]]
        return ~(masked[0] | masked[-1])

    # --- what comes of it ---

    def values(self, known: Known) -> Tensor:
        """`values`, in the dtype of the problem."""
        problem = self.problem
        kinds = 5 if self.metrics else 3 if self.entropy or problem.labels is not None else 1
        found = {KD: known.get("kd")}
        if problem.labels is not None:
            found[CE] = self._cross_entropy(known)
        if self.entropy or self.metrics:
            found[ENTROPY] = self._entropy(known, STUDENT)
        if self.metrics:
            found[TEACHER_ENTROPY] = self._entropy(known, TEACHER)
            found[AGREEMENT] = known["agreement"]
        values = problem.student.new_zeros(kinds, problem.rows, dtype=problem.dtype)
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
        smoothing, top, columns = problem.label_smoothing, known[STUDENT, "top"], problem.columns
        loss = known["unit"].log() - (1 - smoothing) * (known["label"] - top)
        if smoothing:
            loss = loss - smoothing * (known["sum"] / columns - top)
        labels = problem.labels
        return torch.where((labels >= 0) & (labels < columns), loss, torch.nan)

    def _entropy(self, known: Known, name: str) -> Tensor:
        name = name if (name, "depth") in known else STUDENT
        return known[name, "mass"].log() - LN2 * known[name, "depth"]

    def gradient(
        self, known: Known, upstream: Coefficients, out: Tensor | None, degrees: Tensor | None
    ) -> None:
        """Writes the gradient to the student's logits, and to the temperature of each row."""
        problem = self.problem
        target = None if out is None else out[..., : problem.vocab_size]
        weights = weights_of(upstream, self.exact_scales[0])
        plain = Coefficients._make(None if x is None else x.to(problem.dtype) for x in weights)
        for rows in self._blocks():
            some = weights if self.store is self.exact_store else plain
            write_gradient(problem, rows, self._terms(rows, known), some, target, None)
        if degrees is not None:
            degrees.copy_(self._temperature(known, weights))

    def _temperature(self, known: Known, weights: Coefficients) -> Tensor:
        """The derivative to T of each row, the same on all owners."""
        slopes = (known.get("kd_slope"), None, known.get("entropy_slope"))
        found = sum(
            -(weight[:, 0] if weight.dim() else weight) * slope
            for weight, slope in zip(weights, slopes, strict=True)
            if weight is not None and slope is not None
        )
        kept = self._counts(known)
        if self.problem.counted is not None:
            kept = kept & self.problem.counted
        if self.problem.moments is not None:
            found = found * self.problem.moments[0, WIDTH]
        return torch.where(kept, found, 0.0)

    def _terms(self, rows: Rows, known: Known) -> Terms:
        problem, tempering = self.problem, None
        counts = self._counts(known)[rows.flat]
        pair, unit = self._pair(rows, known, later=True), None
        if problem.labels is not None:
            top, mass = (self._of(known, name, rows) for name in ((STUDENT, "top"), "unit"))
            unit = pair.student
            if not isinstance(pair.student_scale, float) or pair.student_scale != 1:
                unit = self._softmax(self._logits(rows)[0], 1.0, top, mass)
        if self.tempered:
            zero = torch.zeros_like(pair.student.mass)
            slopes = [
                self._of(known, name, rows) if name in known else zero
                for name in ("kd_slope", "entropy_slope")
            ]
            tempering = slopes[0], slopes[1]
        pull = None
        if problem.teacher is not None:
            _, pull = self.kind.value_and_pull(pair, problem.a, problem.b)
            pull = self._mended(rows, known, pair, pull, ~counts)
        return Terms({}, pair, pull, unit, None if counts.all() else counts[:, None], tempering)

    def _mended(self, rows: Rows, known: Known, pair: Shard, pull: Pull, dead: Tensor) -> Pull:
        """See `Solver.mended`: but what says so is known of all columns."""
        values, close = self._of(known, "kd", rows)[:, 0], known["close"][rows.flat] > 0
        infinite = values.abs() >= FAR
        if infinite.any():
            dead = dead | infinite & ~_finite(pull)[:, 0]
        if close.any():
            pull = self._close(rows, known, close, pair, pull)
        if values.isnan().any():  # and so is all of the gradient, which shows it
            pull = pull._replace(
                factor=pull.factor * torch.where(values.isnan(), values, 1)[:, None]
            )
        return without(pull, dead[:, None]) if dead.any() else pull

    def _close(self, rows: Rows, known: Known, close: Tensor, pair: Shard, pull: Pull) -> Pull:
        """Puts in the first term of rows that differ little."""
        q = pair.student
        scales = [of_rows(scale, rows) for scale in self.exact_scales]
        columns = self.problem.vocab_size
        d = _depth(self.sides[1], rows, known[TEACHER, "top"], scales[-1], columns)
        d -= _depth(self.sides[0], rows, known[STUDENT, "top"], scales[0], columns)
        d.masked_fill_(q.terms + pair.teacher.terms == 0, 0.0)
        d -= known["mean"][rows.flat, None]
        curvature = self.kind.curvature(self.problem.a, self.problem.b) or 0.0
        close = close[:, None]
        terms = torch.where(close, d * q.terms, pull.terms)
        factor = torch.where(close, curvature / q.mass, pull.factor)
        return Pull(terms, factor, torch.where(close, 0.0, pull.total))

    def packed(self, known: Known) -> Tensor:
        """What the gradient needs, [F, N]."""
        return torch.stack([known[name] for name in self._kept()] + [self.exact.double()])

    def unpacked(self, state: Tensor) -> Known:
        self.exact = state[-1] > 0
        return dict(zip(self._kept(), state[:-1], strict=True))

    def _kept(self) -> list[Any]:
        kept: list[Any] = [(STUDENT, "top"), (STUDENT, "mass")]
        if self.entropy or self.tempered:
            kept.append((STUDENT, "depth"))
        if self.problem.labels is not None:
            kept.append("unit")
        if self.tempered and self.entropy:
            kept.append("entropy_slope")
        if self.problem.teacher is not None:
            kept += [(TEACHER, "top"), (TEACHER, "mass"), "gap", "mean", "kd", "close"]
            kept += first_names(self.first)
            kept += [("later", i) for i in range(self.later)]
            if self.tempered:
                kept.append("kd_slope")
            if self.kind.label_aware:
                kept += ["lp", "lq"]
        return kept


# --- pieces of rows ---------------------------------------------------------------------------


def _times_depth(terms: Tensor, pair: Shard) -> Tensor:
    depths = pair.student.depth
    return torch.mul(terms, depths, out=pair.new()).masked_fill_(depths <= FATHOM, 0.0)


def _finite(pull: Pull) -> Tensor:
    """Whether the slopes of a row are, [R, 1]; with a slope, their sum is infinite."""
    size = torch.as_tensor(pull.total).abs() + torch.as_tensor(pull.factor).abs()
    return size < FAR


def _depth(logits: Tensor, rows: Rows, top: Tensor, scale: float | Tensor, columns: int) -> Tensor:
    """(logit - top) / T of these rows, in fp64."""
    x = logits[rows.outer, rows.inner, :columns].double().clamp_min_(MASKED)
    return x.sub_(top[rows.flat, None]).mul_(scale)


def _apart(q: Softmax, p: Softmax, spare: Tensor) -> Tensor:
    """The total variation of both sides over these columns alone, [R, 1]."""
    apart = torch.mul(q.terms, p.mass / q.mass, out=spare).sub_(p.terms)
    return torch.linalg.vector_norm(apart, 1, dim=-1, keepdim=True) / (2 * p.mass)


def _closeness(
    q: Softmax, p: Softmax, new: Callable[[], Tensor], tempered: bool
) -> dict[Any, Tensor]:
    """How far apart the sides' terms are: their difference, and sums of their log-ratio d."""
    found = {"excess": p.mass - q.mass, "spread": torch.ones_like(q.mass)}
    found |= {name: torch.zeros_like(q.mass) for name in ("mean", "square", "cross")}
    if q.depth.dtype != torch.float64:  # not in rows that need it
        return found
    d = torch.sub(p.depth, q.depth, out=new()).mul_(LN2)
    d.masked_fill_((q.terms + p.terms) == 0, 0.0)
    spread = d.abs().amax(-1, keepdim=True)
    found["spread"] = spread
    small = (spread[:, 0] < SMALL).nonzero()[:, 0]
    if len(small):
        d, terms = d[small], q.terms[small]
        found["excess"][small] = total(d.expm1().mul_(terms))
        products = d * terms
        found["mean"][small] = total(products)
        found["square"][small] = total(products * d)
        if tempered:
            found["cross"][small] = total(products.mul_(q.depth[small]).nan_to_num_(nan=0.0))
    return found
