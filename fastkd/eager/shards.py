"""Rows of a softmax whose columns are spread over owners: three sweeps, and a gather between them.

    statistics of this owner's columns | gather | sums | gather | gradient, all of it local

All is in fp64: which rows need it shows by the divergence, which nobody knows before the end. Tops
and masses join as those of a log-sum-exp do. Sums that the formulas take of products with `climb`,
of growths and of blends change with the tops in a known way, so that they come from the first sweep
too; other sums need the masses of all, and a sweep of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd import sharding
from fastkd.divergences import ALIKE, FATHOM, LN2, MASKED, Divergence, Pair, Pull, Softmax, total
from fastkd.problem import AGREEMENT, CE, ENTROPY, KD, TEACHER_ENTROPY, Coefficients, Problem

from .blocks import Rows, Store, blocks, largest
from .logits import blank, new_gradient, weights_of, write_gradient
from .solver import CLOSE, FAR, ROUNDING, SPREAD, Terms, exact_scales, of_rows, without

SIDES = STUDENT, TEACHER = "student", "teacher"
# In a row whose log-ratios are smaller, the difference of the masses is summed entry by entry.
SMALL = 1e-3
# Pieces whose tops lie nearer are joined by their differences too.
NEAR = 1.0

Known = dict[Any, Tensor]  # what the owners know of each row, [N], by names


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


# --- the sums that a divergence asks for ------------------------------------------------------


class Shard(Pair):
    """A Pair of this owner's columns, whose sums over a row are those of all owners.

    first: those of the first sweep, in the order in which they are asked for; None: they are found,
        of these columns alone.
    later: those that need the masses of all, likewise.
    """

    def __init__(
        self,
        sides: tuple[Softmax, Softmax],
        scale: float | Tensor,
        new: Callable[[], Tensor],
        gap: Tensor,
        first: list[Tensor] | None = None,
        later: list[Tensor] | None = None,
        labels: Labels | None = None,
        student_mean: Tensor | None = None,
    ) -> None:
        super().__init__(*sides, scale, new, gap=gap)
        self.first, self.later, self.own_labels = first, later, labels
        self.student_mean = student_mean  # of its depth
        self.asked: list[tuple[Any, ...]] = []  # what is asked for in the first sweep
        self.found_first: list[Tensor] = []
        self.found_later: list[Tensor] = []

    def _first(self, asked: tuple[Any, ...], find: Callable[[], tuple[Tensor, ...]]) -> Any:
        self.asked.append(asked)
        if self.first is None:
            found = find()
        else:
            start = len(self.found_first)
            found = tuple(self.first[start : start + _width(asked)])
        self.found_first += found
        return found

    def total(self, terms: Tensor) -> Tensor:
        found = total(terms) if self.later is None else self.later[len(self.found_later)]
        self.found_later.append(found)
        return found

    def total_climb(self, side: Softmax, products: Tensor) -> Tensor:
        (found,) = self._first(("climb", self._name(side)), lambda: (total(products),))
        return found

    def total_growth(self, side: Softmax, order: float, terms: Tensor) -> Tensor:
        (found,) = self._first(("growth", self._name(side), order), lambda: (total(terms),))
        return found

    def blend(self, depth: Tensor, a: float) -> tuple[Tensor, Tensor, Tensor]:
        def find() -> tuple[Tensor, Tensor]:
            if not depth.size(1):
                return depth.new_full((len(depth), 1), MASKED), depth.new_zeros(len(depth), 1)
            top = depth.amax(-1, keepdim=True)
            return top, total(torch.exp2(depth - top))

        top, mass = self._first(("blend", a), find)
        return depth.sub_(top).exp2_(), top, mass

    def mean_depth(self, side: Softmax) -> Tensor:
        assert self.student_mean is not None
        return self.student_mean

    def label_logs(self) -> tuple[Tensor, Tensor]:
        assert self.own_labels is not None
        return self.own_labels.lp, self.own_labels.lq

    def add_at_labels(self, rows: Tensor, values: Tensor) -> None:
        assert self.own_labels is not None
        if rows.size(1):
            own = torch.where(self.own_labels.own, values, 0.0)
            rows.scatter_add_(-1, self.own_labels.columns[:, None], own[:, None])

    def _name(self, side: Softmax) -> str:
        return TEACHER if side is self.teacher else STUDENT


class Labels(NamedTuple):
    """The labels of rows, as one owner sees them, [R]."""

    own: Tensor  # bool: whether the column is here
    columns: Tensor  # here, any where it is elsewhere
    lp: Tensor  # log-probabilities of the label, by all owners; of divergences that look at them
    lq: Tensor


def _width(asked: tuple[Any, ...]) -> int:
    return 2 if asked[0] == "blend" else 1


@cache
def asked(kind: type[Divergence], a: float, b: float) -> tuple[tuple[tuple[Any, ...], ...], int]:
    """What a divergence asks for: its sums of the first sweep, and how many need another."""
    row = torch.zeros(1, 1, dtype=torch.float64)
    none = row.new_zeros(1, 0)
    labels = Labels(torch.zeros(1, dtype=torch.bool), none.long(), row[0] - 1, row[0] - 1)
    sides = (_empty(row, row + 1), _empty(row, row + 1))
    pair = Shard(sides, 1.0, lambda: none.clone(), row, labels=labels)
    kind.value_and_pull(pair, a, b)
    return tuple(pair.asked), len(pair.found_later)


def _empty(top: Tensor, mass: Tensor) -> Softmax:
    """Of no columns; top and mass [R, 1]."""
    return Softmax(top, top.new_zeros(len(top), 0), top.new_zeros(len(top), 0), mass)


# --- sweeps -----------------------------------------------------------------------------------


class Sweeps:
    """The sweeps over this owner's columns of all rows that count."""

    def __init__(self, problem: Problem, entropy: bool, metrics: bool) -> None:
        self.problem, self.entropy, self.metrics = problem, entropy, metrics
        self.merge = sharding.of(problem.merge)
        self.sides = [problem.student] + [problem.teacher] * (problem.teacher is not None)
        self.scales = exact_scales(problem)
        self.kind = Divergence.of_name(problem.divergence)
        self.first: tuple[tuple[Any, ...], ...] = ()
        self.later = 0
        if problem.teacher is not None:
            find: Any = asked
            self.first, self.later = find(self.kind, problem.a, problem.b)
        # The derivatives to T are sums as well.
        self.tempered = problem.temperature_trains or problem.moments is not None
        self.store = Store(problem, torch.float64)

    def known(self) -> Generator[Tensor, Tensor, Known]:
        """All that is known of the rows when both sweeps are done."""
        names = _statistics_names(self)
        pieces = yield self._swept(names, self._statistics)
        known = joined(self, dict(zip(names, pieces.unbind(1), strict=True)))
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
            if _is_top(name):
                fields[index] = MASKED
        if problem.vocab_size:
            for rows in self._blocks():
                found = find(rows)
                for field, name in zip(fields, names, strict=True):
                    field[rows.flat] = found[name]
        return fields

    def _blocks(self) -> Iterator[Rows]:
        for rows in blocks(self.problem, -(-largest(self.problem) // 2)):
            self.store.start(rows.size)
            yield rows

    def _logits(self, rows: Rows) -> list[Tensor]:
        columns = self.problem.vocab_size
        found = [side[rows.outer, rows.inner, :columns] for side in self.sides]
        return [self.store.new().copy_(side).clamp_min_(MASKED) for side in found]

    # --- the first sweep ---

    def _statistics(self, rows: Rows) -> Known:
        problem, new = self.problem, self.store.new
        logits = self._logits(rows)
        scales = [of_rows(scale, rows) for scale in self.scales]
        found: Known = {}
        if problem.labels is not None:
            unit = Softmax.of(logits[0], 1.0, new(), new())
            labels = self._labels(rows, {})
            found["unit"] = unit.mass
            found["label"] = self._at_labels(logits[0], labels)
            found["sum"] = total(logits[0])
        if self.metrics:
            best = [x == x.amax(-1, keepdim=True) for x in (logits[0], logits[-1])]
            found["agreement"] = (best[0] & best[1]).any(-1).double()
        if self.kind.label_aware and self.sides[1:]:
            found["teacher_label"] = self._at_labels(logits[-1], self._labels(rows, {}))
        softmaxes = [
            Softmax.of(x, scale, x, new())
            for x, scale in zip(logits, (scales[0], scales[-1]), strict=False)
        ]
        for name, side in zip(SIDES, softmaxes, strict=False):
            found[name, "top"], found[name, "mass"] = side.top, side.mass
            products = torch.mul(side.terms, side.depth, out=new())
            found[name, "depth"] = total(products)
            if self.tempered and self.entropy and name == STUDENT:
                found["depth_square"] = total(products.mul_(side.depth))
        if softmaxes[1:]:
            q, p = softmaxes
            found |= _closeness(q, p, new, self.tempered)
            if self.first:
                pair = Shard((q, p), scales[0], new, torch.zeros_like(q.mass))
                self.kind.value_and_pull(pair, problem.a, problem.b)
                found |= zip(_first_names(self.first), pair.found_first, strict=True)
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
        sides = []
        for name, x, scale in zip(SIDES, self._logits(rows), scales, strict=False):
            top, mass = (known[name, part][rows.flat, None] for part in ("top", "mass"))
            depth = x.sub_(top).mul_(scale / LN2)
            sides.append(Softmax(top, depth, torch.exp2(depth, out=self.store.new()), mass))
        return self._shard(sides, rows, known, scales[0], self.store.new, later)

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
            return known[name][rows.flat, None]

        first = [of(name) for name in _first_names(self.first)]
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
        if self.tempered:
            found["later", "depth"] = total(_times_depth(pull.terms, pair))[:, 0]
        return found

    def _divergence(self, known: Known) -> None:
        """Adds the divergence of all rows, its derivative to T, and which differ little."""
        problem = self.problem
        if problem.teacher is None:
            return
        rows = Rows(0, slice(0, problem.rows), slice(0, problem.rows))
        sides = [
            _empty(known[name, "top"][:, None], known[name, "mass"][:, None]) for name in SIDES
        ]
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
        weights = weights_of(upstream, self.scales[0])
        for rows in self._blocks():
            write_gradient(problem, rows, self._terms(rows, known), weights, target, degrees)

    def _terms(self, rows: Rows, known: Known) -> Terms:
        problem, tempering = self.problem, None
        counts = self._counts(known)[rows.flat]
        unit = None
        if problem.labels is not None:
            raw = self._logits(rows)[0].sub_(known[STUDENT, "top"][rows.flat, None])
            depth = raw.mul_(1 / LN2)
            mass = known["unit"][rows.flat, None]
            unit = Softmax(mass, depth, torch.exp2(depth, out=self.store.new()), mass)
        pair = self._pair(rows, known, later=True)
        if self.tempered:
            zero = torch.zeros_like(pair.student.mass)
            slopes = [
                known[name][rows.flat, None] if name in known else zero
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
        values, close = known["kd"][rows.flat], known["close"][rows.flat] > 0
        infinite = values.abs() > FAR
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
        scales = [of_rows(scale, rows) for scale in self.scales]
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
        return torch.stack([known[name] for name in self._kept()])

    def unpacked(self, state: Tensor) -> Known:
        return dict(zip(self._kept(), state, strict=True))

    def _kept(self) -> list[Any]:
        kept: list[Any] = [(STUDENT, "top"), (STUDENT, "mass"), (STUDENT, "depth")]
        if self.problem.labels is not None:
            kept.append("unit")
        if self.tempered and self.entropy:
            kept.append("entropy_slope")
        if self.problem.teacher is not None:
            kept += [(TEACHER, "top"), (TEACHER, "mass"), "gap", "mean", "kd", "close"]
            kept += _first_names(self.first)
            kept += [("later", i) for i in range(self.later)]
            if self.tempered:
                kept.append("kd_slope")
            if self.kind.label_aware:
                kept += ["lp", "lq"]
        return kept


# --- names of fields --------------------------------------------------------------------------


def _first_names(asked: Sequence[tuple[Any, ...]]) -> list[Any]:
    names = (("first", i) for i in range(sum(map(_width, asked))))
    tops = [part for one in asked for part in (["top", ""] if one[0] == "blend" else [""])]
    return [(*name, top) for name, top in zip(names, tops, strict=True)]


def _is_top(name: Any) -> bool:
    return isinstance(name, tuple) and name[-1] == "top"


def _statistics_names(sweeps: Sweeps) -> list[Any]:
    problem = sweeps.problem
    names: list[Any] = []
    for side in SIDES[: len(sweeps.sides)]:
        names += [(side, "top"), (side, "mass"), (side, "depth")]
    if problem.labels is not None:
        names += ["unit", "label", "sum"]
    if sweeps.metrics:
        names.append("agreement")
    if sweeps.tempered and sweeps.entropy:
        names.append("depth_square")
    if problem.teacher is not None:
        names += ["excess", "mean", "square", "cross", "spread"]
        names += _first_names(sweeps.first)
        if sweeps.kind.label_aware:
            names.append("teacher_label")
    return names


# --- the join of all owners' statistics -------------------------------------------------------


def joined(sweeps: Sweeps, pieces: Known) -> Known:
    """Of the statistics of each owner, [size, N], those of the rows, [N]."""
    known: Known = {}
    scales = [scale[:, 0] if isinstance(scale, Tensor) else scale for scale in sweeps.scales]
    scale = dict(zip(SIDES, (scales[0], scales[-1]), strict=True))
    shift, weight = {}, {}  # of an owner's top to the highest, in nats, and its exponential
    for side in SIDES[: len(sweeps.sides)]:
        tops, masses = pieces[side, "top"], pieces[side, "mass"]
        known[side, "top"] = top = tops.amax(0)
        shift[side] = (tops - top) * scale[side]
        weight[side] = shift[side].exp()
        known[side, "mass"] = mass = (weight[side] * masses).sum(0)
        depths = pieces[side, "depth"] + masses * (shift[side] / LN2)
        known[side, "depth"] = _weighted(weight[side], depths).sum(0) / mass
    sweep, problem = shift[STUDENT], sweeps.problem
    if "depth_square" in pieces:
        bits, masses = sweep / LN2, pieces[STUDENT, "mass"]
        squares = pieces["depth_square"] + bits * (2 * pieces[STUDENT, "depth"] + bits * masses)
        mean = known[STUDENT, "depth"]
        squares = _weighted(weight[STUDENT], squares).sum(0) / known[STUDENT, "mass"]
        known["entropy_slope"] = LN2**2 * (mean * mean - squares)
    if problem.labels is not None:
        to_top = pieces[STUDENT, "top"] - known[STUDENT, "top"]
        known["unit"] = (to_top.exp() * pieces["unit"]).sum(0)
        known["label"] = pieces["label"].sum(0)
        known["sum"] = pieces["sum"].sum(0)
    if sweeps.metrics:
        best = [pieces[side, "top"] == known[side, "top"] for side in shift]
        both = best[0] & best[-1] & (pieces["agreement"] > 0)
        known["agreement"] = both.any(0).double()
    if problem.teacher is not None:
        _join_sides(sweeps, pieces, known, shift, weight)
    if "teacher_label" in pieces:
        for side, name, field in ((TEACHER, "lp", "teacher_label"), (STUDENT, "lq", "label")):
            depth = (pieces[field].sum(0) - known[side, "top"]) * scale[side]
            known[name] = depth - known[side, "mass"].log()
    return known


def _join_sides(sweeps: Sweeps, pieces: Known, known: Known, shift: Known, weight: Known) -> None:
    """Adds what is of both sides: with d the log-ratio of their terms, measured from both tops."""
    apart = shift[TEACHER] - shift[STUDENT]  # what d of an owner lacks
    mass, own = known[STUDENT, "mass"], weight[STUDENT]
    masses = pieces[STUDENT, "mass"]

    excess = own * (pieces["excess"] * apart.exp() + masses * apart.expm1())
    plain = weight[TEACHER] * pieces[TEACHER, "mass"] - own * masses
    excess = torch.where(apart.abs() < NEAR, excess, plain).sum(0)
    ratio = mass / known[TEACHER, "mass"]
    alike = (ratio - 1).abs() < ALIKE
    known["gap"] = torch.where(alike, -(excess / mass).log1p(), ratio.log())

    mean = pieces["mean"] + masses * apart
    square = pieces["square"] + apart * (2 * pieces["mean"] + masses * apart)
    bits = shift[STUDENT] / LN2
    cross = pieces["cross"] + bits * mean + apart * pieces[STUDENT, "depth"]
    mean, square, cross = (_weighted(own, x).sum(0) / mass for x in (mean, square, cross))
    known["mean"], known["variance"] = mean, square - mean * mean
    known["covariance"] = cross - mean * known[STUDENT, "depth"]
    nothing = (own == 0) & (weight[TEACHER] == 0)
    spread = torch.where(nothing, 0.0, pieces["spread"] + apart.abs())
    known["spread"] = spread.amax(0) + mean.abs()

    names = iter(_first_names(sweeps.first))
    for kind, *what in sweeps.first:
        name = next(names)
        if kind == "climb":
            side = what[0]
            climbs = pieces[name] + pieces[side, "mass"] * (apart / LN2)
            known[name] = _weighted(weight[side], climbs).sum(0)
        elif kind == "growth":
            side, order = what
            move, masses = order * apart, pieces[side, "mass"]
            growth = pieces[name] * move.exp() + masses * move.expm1()
            share = _weighted(weight[side], growth).sum(0) / known[side, "mass"]
            known[name] = known[side, "mass"] * (order * known["gap"] + share.log1p()).expm1()
        else:
            (a,), masses = what, pieces[next(names)]
            masked = (pieces[STUDENT, "top"] == MASKED) & (pieces[TEACHER, "top"] == MASKED)
            moved = (a * shift[TEACHER] + (1 - a) * shift[STUDENT]) / LN2
            tops = torch.where(masked, MASKED, pieces[name] + moved)
            known[name] = top = tops.amax(0)
            known[(*name[:1], name[1] + 1, "")] = _weighted((tops - top).exp2(), masses).sum(0)


def _weighted(weight: Tensor, x: Tensor) -> Tensor:
    return torch.where(weight == 0, 0.0, weight * x)


def _closeness(
    q: Softmax, p: Softmax, new: Callable[[], Tensor], tempered: bool
) -> dict[Any, Tensor]:
    """How far apart the sides' terms are: their difference, and sums of their log-ratio d."""
    d = torch.sub(p.depth, q.depth, out=new()).mul_(LN2)
    d.masked_fill_((q.terms + p.terms) == 0, 0.0)
    spread = d.abs().amax(-1, keepdim=True)
    found = {"excess": p.mass - q.mass, "spread": spread}
    found |= {name: torch.zeros_like(spread) for name in ("mean", "square", "cross")}
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
