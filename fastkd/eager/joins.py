"""Rows of a softmax whose columns are spread over owners: what joins, and how.

Shifts and sums join as those of a log-sum-exp do. What an owner sums up is measured from its own
shifts: `lower` is what these lack of the highest. Sums that the formulas take of products with
`log2_ratio`, of growths and of blends change with the shifts in a known way, and need no other sum;
all others are taken when the sums of the exponentials of all owners are known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastkd.divergences import Divergence
from fastkd.divergences.pair import ALIKE, LN2, MASKED, Pair, Softmax, total
from fastkd.problem import Problem

if TYPE_CHECKING:
    from .columns import Columns

SIDES = STUDENT, TEACHER = "student", "teacher"
PARTS = "shift", "sum_exp"
# Pieces whose shifts lie nearer are joined by their differences too.
NEAR = 1.0

Known = dict[Any, Tensor]  # what the owners know of each row, [N], by names
Asked = tuple[Any, ...]  # a kind of sum, and of what; of a blend its shift too


# --- the sums that a divergence asks for ------------------------------------------------------


class Later(Softmax):
    """One whose log2_exp and exp are found when they are asked for.

    Neither is found from the other, which the divergence may have overwritten.
    """

    find_log2_exp: Callable[[], Tensor]
    find_exp: Callable[[], Tensor]

    @cached_property
    def log2_exp(self) -> Tensor:
        return self.find_log2_exp()

    @cached_property
    def exp(self) -> Tensor:
        return self.find_exp()


class Shard(Pair):
    """A Pair of this owner's columns, whose sums over a row are those of all owners.

    first: those of the first sweep, by what is asked for; None: they are found, of these columns
        alone.
    later: those that need the masses of all, in the order in which they are asked for; likewise.
    """

    def __init__(
        self,
        sides: tuple[Softmax, Softmax],
        scale: float | Tensor,
        new: Callable[[], Tensor],
        gap: Tensor,
        first: Known | None = None,
        later: list[Tensor] | None = None,
        labels: Labels | None = None,
        student_mean: Tensor | None = None,
    ) -> None:
        super().__init__(*sides, scale, new, gap=gap)
        self.first, self.later, self.own_labels = first, later, labels
        self.student_mean = student_mean  # of its log2_exp
        self.found_first: Known = {}
        self.found_later: list[Tensor] = []

    def _first(self, asked: Asked, find: Callable[[], Tensor]) -> Tensor:
        found = find() if self.first is None else self.first[asked]
        self.found_first[asked] = found
        return found

    def _later(self, find: Callable[[], Tensor]) -> Tensor:
        found = find() if self.later is None else self.later[len(self.found_later)]
        self.found_later.append(found)
        return found

    def spare(self) -> Tensor:
        return self.new()

    def total(self, terms: Tensor) -> Tensor:
        return self._later(lambda: total(terms))

    def total_product(self, x: Tensor, side: Softmax) -> Tensor:
        return self._later(lambda: total(x.mul_(side.exp)))

    def total_log2_ratio(self, side: Softmax, products: Callable[[], Tensor]) -> Tensor:
        return self._first(("log2_ratio", self._name(side)), lambda: total(products()))

    def total_growth(self, side: Softmax, order: float, terms: Tensor) -> Tensor:
        return self._first(("growth", self._name(side), order), lambda: total(terms))

    def blend(self, log2_exp: Tensor, a: float) -> tuple[Tensor, Tensor, Tensor]:
        def largest() -> Tensor:
            none = log2_exp.new_zeros(len(log2_exp), 1)
            return log2_exp.amax(-1, keepdim=True) if log2_exp.size(1) else none

        shift = self._first(("blend", a, "shift"), largest)
        sum_exp = self._first(("blend", a, "sum_exp"), lambda: total(torch.exp2(log2_exp - shift)))
        return log2_exp.sub_(shift).exp2_(), shift, sum_exp

    def mean_log2_exp(self, side: Softmax) -> Tensor:
        assert self.student_mean is not None
        return self.student_mean

    def label_logs(self) -> tuple[Tensor, Tensor]:
        assert self.own_labels is not None
        dtype = self.student.exp.dtype
        return self.own_labels.lp.to(dtype), self.own_labels.lq.to(dtype)

    def add_at_labels(self, rows: Tensor, values: Tensor) -> None:
        assert self.own_labels is not None
        if rows.size(1):
            own = torch.where(self.own_labels.own, values, 0.0)
            rows.scatter_add_(-1, self.own_labels.columns[:, None], own[:, None].to(rows.dtype))

    def _name(self, side: Softmax) -> str:
        return TEACHER if side is self.teacher else STUDENT


class Labels(NamedTuple):
    """The labels of rows, as one owner sees them, [R]."""

    own: Tensor  # bool: whether the column is here
    columns: Tensor  # here, any where it is elsewhere
    lp: Tensor  # log-probabilities of the label, by all owners; of divergences that look at them
    lq: Tensor


@cache
def asked(
    kind: type[Divergence], a: float, b: float, dtype: torch.dtype
) -> tuple[tuple[Asked, ...], int]:
    """What a divergence asks for: its sums of the first sweep, and how many need another."""
    row = torch.zeros(1, 1, dtype=dtype, device="cpu")
    none = row.new_zeros(1, 0)
    labels = Labels(row[0] > 0, none.long(), row[0] - 1, row[0] - 1)
    sides = (empty(row, row + 1), empty(row, row + 1))
    pair = Shard(sides, 1.0, lambda: none.clone(), row, labels=labels)
    kind.value_and_descent(pair, a, b)
    return tuple(pair.found_first), len(pair.found_later)


def empty(shift: Tensor, sum_exp: Tensor) -> Softmax:
    """The softmax of no columns; shift and sum_exp [R, 1]."""
    return Softmax(shift, shift.new_zeros(len(shift), 0), shift.new_zeros(len(shift), 0), sum_exp)


# --- names of fields --------------------------------------------------------------------------


def is_shift(name: Any) -> bool:
    return isinstance(name, tuple) and name[-1] in ("shift", "top")


def statistics_names(sweeps: Columns) -> list[Any]:
    problem = sweeps.problem
    names: list[Any] = []
    for side in sweeps.sides:
        names += [(side, "shift"), (side, "sum_exp"), *[(side, "log2_exp")] * sweeps.means]
    if problem.labels is not None:
        names += ["unit", "label", *["sum"] * bool(problem.label_smoothing)]
    names += [(side, "top") for side in sweeps.topped]
    if sweeps.metrics:
        names.append("agreement")
    if sweeps.tempered and sweeps.entropy:
        names.append("log2_exp_square")
    if problem.teacher is not None:
        names += ["excess", "mean", "square", "cross", "spread", *["apart"] * bool(sweeps.later)]
        names += sweeps.first
        if sweeps.kind.label_aware:
            names.append("teacher_label")
    return names


# --- what the gradient needs ---

# As many sums as a divergence may ask for, of which a tracer, who does not know its parameters,
# leaves room.
ROOM = 4


def state_rows(problem: Problem, entropy: bool) -> int:
    """How many rows `state` has, of a problem whose tensors and numbers may have no values."""
    return 1 + len(kept_names(problem, entropy)) + ROOM


def kept_names(problem: Problem, entropy: bool) -> list[Any]:
    tempered = is_tempered(problem)
    kept: list[Any] = [(STUDENT, "shift"), (STUDENT, "sum_exp")]
    if entropy or tempered:
        kept.append((STUDENT, "log2_exp"))
    if problem.labels is not None:
        kept.append("unit")
    if tempered and entropy:
        kept.append("entropy_slope")
    if problem.teacher is not None:
        kept += [(TEACHER, "shift"), (TEACHER, "sum_exp"), "gap", "mean", "kd", "close"]
        kept += ["kd_slope"] * tempered
        kept += ["lp", "lq"] * Divergence.of_name(problem.divergence).label_aware
    return kept


def is_tempered(problem: Problem) -> bool:
    """Whether the derivatives to T may be asked for, which are sums of all columns as well."""
    standardized = problem.standardize or problem.moments is not None
    return problem.temperature_trains or standardized


# --- the join of all owners' statistics -------------------------------------------------------


def joined(sweeps: Columns, pieces: Known) -> Known:
    """The statistics of the rows, [N], from those of each owner, [size, N]."""
    known: Known = {}
    scales = [scale[:, 0] if isinstance(scale, Tensor) else scale for scale in sweeps.exact.scales]
    scale = dict(zip(SIDES, scales, strict=True))
    lower, weight = {}, {}  # of an owner's shift to the highest, in nats, and its exponential
    for side in sweeps.sides:
        shifts, sums_exp = pieces[side, "shift"], pieces[side, "sum_exp"]
        known[side, "shift"] = shift = sweeps.shift_of_all(shifts, scale[side], pieces["exact"])
        lower[side] = (shifts - shift) * scale[side]
        weight[side] = lower[side].exp()
        known[side, "sum_exp"] = sum_exp = (weight[side] * sums_exp).sum(0)
        if sweeps.means:
            log2_exps = pieces[side, "log2_exp"] + sums_exp * (lower[side] / LN2)
            known[side, "log2_exp"] = _weighted(weight[side], log2_exps).sum(0) / sum_exp
    own = weight[STUDENT][sweeps.merge.rank]
    known["weight"] = own
    known["share"] = own * pieces[STUDENT, "sum_exp"][sweeps.merge.rank] / known[STUDENT, "sum_exp"]
    sweep, problem = lower[STUDENT], sweeps.problem
    if "log2_exp_square" in pieces:
        bits, sums_exp = sweep / LN2, pieces[STUDENT, "sum_exp"]
        squares = pieces["log2_exp_square"] + bits * (
            2 * pieces[STUDENT, "log2_exp"] + bits * sums_exp
        )
        mean = known[STUDENT, "log2_exp"]
        squares = _weighted(weight[STUDENT], squares).sum(0) / known[STUDENT, "sum_exp"]
        known["entropy_slope"] = LN2**2 * (mean * mean - squares)
    if problem.labels is not None:
        to_top = pieces[STUDENT, "shift"] - known[STUDENT, "shift"]
        known["unit"] = (to_top.exp() * pieces["unit"]).sum(0)
        known["label"] = pieces["label"].sum(0)
    if "sum" in pieces:
        known["sum"] = pieces["sum"].sum(0)
    for side in sweeps.topped:
        known[side, "top"] = pieces[side, "top"].amax(0)
    if sweeps.metrics:
        best = [pieces[side, "top"] == known[side, "top"] for side in sweeps.topped]
        both = best[0] & best[-1] & (pieces["agreement"] > 0)
        known["agreement"] = both.any(0).double()
    if problem.teacher is not None:
        _join_sides(sweeps, pieces, known, lower, weight)
    if "teacher_label" in pieces:
        for side, name, field in ((TEACHER, "lp", "teacher_label"), (STUDENT, "lq", "label")):
            log2_exp = (pieces[field].sum(0) - known[side, "shift"]) * scale[side]
            known[name] = log2_exp - known[side, "sum_exp"].log()
    return known


def _join_sides(sweeps: Columns, pieces: Known, known: Known, lower: Known, weight: Known) -> None:
    """Adds what is of both sides: with d the log-ratio of their exp, measured from both shifts."""
    apart = lower[TEACHER] - lower[STUDENT]  # what d of an owner lacks
    sum_exp, own = known[STUDENT, "sum_exp"], weight[STUDENT]
    sums_exp = pieces[STUDENT, "sum_exp"]
    known["gap"] = _gap(pieces, known, weight, apart)

    mean = pieces["mean"] + sums_exp * apart
    square = pieces["square"] + apart * (2 * pieces["mean"] + sums_exp * apart)
    bits = lower[STUDENT] / LN2
    log2_exp = pieces[STUDENT, "log2_exp"] if sweeps.means else torch.zeros_like(mean)
    cross = pieces["cross"] + bits * mean + apart * log2_exp
    mean, square, cross = (_weighted(own, x).sum(0) / sum_exp for x in (mean, square, cross))
    known["mean"], known["variance"] = mean, square - mean * mean
    known["covariance"] = cross - mean * known.get((STUDENT, "log2_exp"), 0.0)
    if "apart" in pieces:
        shares = weight[TEACHER] * pieces[TEACHER, "sum_exp"] / known[TEACHER, "sum_exp"]
        between, within = (shares - own * sums_exp / sum_exp).abs(), 2 * shares * pieces["apart"]
        known["apart"] = torch.maximum(between, within - between).sum(0) / 2  # at least

    nothing = (own == 0) & (weight[TEACHER] == 0)
    spread = torch.where(nothing, 0.0, pieces["spread"] + apart.abs())
    known["spread"] = spread.amax(0) + mean.abs()
    _join_asked(sweeps.first, pieces, known, lower, weight)


def _gap(pieces: Known, known: Known, weight: Known, apart: Tensor) -> Tensor:
    """log of the student's sum_exp over the teacher's, by their difference where they are alike."""
    own, sum_exp = weight[STUDENT], known[STUDENT, "sum_exp"]
    sums_exp = pieces[STUDENT, "sum_exp"]
    excess = own * (pieces["excess"] * apart.exp() + sums_exp * apart.expm1())
    plain = weight[TEACHER] * pieces[TEACHER, "sum_exp"] - own * sums_exp
    excess = torch.where(apart.abs() < NEAR, excess, plain).sum(0)
    ratio = sum_exp / known[TEACHER, "sum_exp"]
    alike = (ratio - 1).abs() < ALIKE
    return torch.where(alike, -(excess / sum_exp).log1p(), ratio.log())


def _join_asked(
    names: Iterable[Asked], pieces: Known, known: Known, lower: Known, weight: Known
) -> None:
    """Adds the sums of the first sweep that a divergence asks for."""
    apart = lower[TEACHER] - lower[STUDENT]
    for name in names:
        kind, *what = name
        if kind == "log2_ratio":
            side = what[0]
            log2_ratios = pieces[name] + pieces[side, "sum_exp"] * (apart / LN2)
            known[name] = _weighted(weight[side], log2_ratios).sum(0)
        elif kind == "growth":
            side, order = what
            move, sums_exp = order * apart, pieces[side, "sum_exp"]
            growth = pieces[name] * move.exp() + sums_exp * move.expm1()
            growth = _weighted(weight[side], growth).sum(0)
            known[name] = with_gap(growth, known[side, "sum_exp"], order, known["gap"])
        elif what[1] == "shift":
            a, sums_exp = what[0], pieces["blend", what[0], "sum_exp"]
            masked = (pieces[STUDENT, "shift"] == MASKED) & (pieces[TEACHER, "shift"] == MASKED)
            moved = (a * lower[TEACHER] + (1 - a) * lower[STUDENT]) / LN2
            shifts = torch.where(masked, MASKED, pieces[name] + moved)
            known[name] = shift = shifts.amax(0)
            known["blend", a, "sum_exp"] = _weighted((shifts - shift).exp2(), sums_exp).sum(0)


def with_gap(growth: Tensor, sum_exp: Tensor, order: float, gap: Tensor) -> Tensor:
    """A growth of `d`, of one with `log2_ratio` in its place."""
    return sum_exp * (order * gap + (growth / sum_exp).log1p()).expm1()


def _weighted(weight: Tensor, x: Tensor) -> Tensor:
    return torch.where(weight == 0, 0.0, weight * x)
