"""Rows of a softmax whose columns are spread over owners: what joins, and how.

Tops and masses join as those of a log-sum-exp do. What an owner sums up is measured from its own
tops: `shift` is what these lack of the highest. Sums that the formulas take of products with
`climb`, of growths and of blends change with the tops in a known way, and need no masses; any other
sum is taken when the masses of all are known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastkd.divergences import ALIKE, LN2, MASKED, Divergence, Pair, Softmax, total

if TYPE_CHECKING:
    from .columns import Columns

SIDES = STUDENT, TEACHER = "student", "teacher"
# Pieces whose tops lie nearer are joined by their differences too.
NEAR = 1.0

Known = dict[Any, Tensor]  # what the owners know of each row, [N], by names


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
                return depth.new_zeros(len(depth), 1), depth.new_zeros(len(depth), 1)
            top = depth.amax(-1, keepdim=True)
            return top, total(torch.exp2(depth - top))

        top, mass = self._first(("blend", a), find)
        return depth.sub_(top).exp2_(), top, mass

    def mean_depth(self, side: Softmax) -> Tensor:
        assert self.student_mean is not None
        return self.student_mean

    def label_logs(self) -> tuple[Tensor, Tensor]:
        assert self.own_labels is not None
        dtype = self.student.terms.dtype
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


def _width(asked: tuple[Any, ...]) -> int:
    return 2 if asked[0] == "blend" else 1


@cache
def asked(
    kind: type[Divergence], a: float, b: float, dtype: torch.dtype
) -> tuple[tuple[tuple[Any, ...], ...], int]:
    """What a divergence asks for: its sums of the first sweep, and how many need another."""
    row = torch.zeros(1, 1, dtype=dtype)
    none = row.new_zeros(1, 0)
    labels = Labels(torch.zeros(1, dtype=torch.bool), none.long(), row[0] - 1, row[0] - 1)
    sides = (empty(row, row + 1), empty(row, row + 1))
    pair = Shard(sides, 1.0, lambda: none.clone(), row, labels=labels)
    kind.value_and_pull(pair, a, b)
    return tuple(pair.asked), len(pair.found_later)


def empty(top: Tensor, mass: Tensor) -> Softmax:
    """Of no columns; top and mass [R, 1]."""
    return Softmax(top, top.new_zeros(len(top), 0), top.new_zeros(len(top), 0), mass)


# --- names of fields --------------------------------------------------------------------------


def first_names(asked: Sequence[tuple[Any, ...]]) -> list[Any]:
    names = (("first", i) for i in range(sum(map(_width, asked))))
    tops = [part for one in asked for part in (["top", ""] if one[0] == "blend" else [""])]
    return [(*name, top) for name, top in zip(names, tops, strict=True)]


def is_top(name: Any) -> bool:
    return isinstance(name, tuple) and name[-1] == "top"


def statistics_names(sweeps: Columns) -> list[Any]:
    problem = sweeps.problem
    names: list[Any] = []
    for side in SIDES[: len(sweeps.sides)]:
        names += [(side, "top"), (side, "mass"), *[(side, "depth")] * sweeps.means]
    if problem.labels is not None:
        names += ["unit", "label", "sum"]
    if sweeps.metrics:
        names.append("agreement")
    if sweeps.tempered and sweeps.entropy:
        names.append("depth_square")
    if problem.teacher is not None:
        names += ["apart", "excess", "mean", "square", "cross", "spread"]
        names += first_names(sweeps.first)
        if sweeps.kind.label_aware:
            names.append("teacher_label")
    return names


# --- the join of all owners' statistics -------------------------------------------------------


def joined(sweeps: Columns, pieces: Known) -> Known:
    """Of the statistics of each owner, [size, N], those of the rows, [N]."""
    known: Known = {}
    scales = [scale[:, 0] if isinstance(scale, Tensor) else scale for scale in sweeps.exact_scales]
    scale = dict(zip(SIDES, (scales[0], scales[-1]), strict=True))
    shift, weight = {}, {}  # of an owner's top to the highest, in nats, and its exponential
    for side in SIDES[: len(sweeps.sides)]:
        tops, masses = pieces[side, "top"], pieces[side, "mass"]
        known[side, "top"] = top = tops.amax(0)
        shift[side] = (tops - top) * scale[side]
        weight[side] = shift[side].exp()
        known[side, "mass"] = mass = (weight[side] * masses).sum(0)
        if sweeps.means:
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


def _join_sides(sweeps: Columns, pieces: Known, known: Known, shift: Known, weight: Known) -> None:
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
    depth = pieces[STUDENT, "depth"] if sweeps.means else torch.zeros_like(mean)
    cross = pieces["cross"] + bits * mean + apart * depth
    mean, square, cross = (_weighted(own, x).sum(0) / mass for x in (mean, square, cross))
    known["mean"], known["variance"] = mean, square - mean * mean
    known["covariance"] = cross - mean * known.get((STUDENT, "depth"), 0.0)
    shares = weight[TEACHER] * pieces[TEACHER, "mass"] / known[TEACHER, "mass"]
    between, within = (shares - own * masses / mass).abs(), 2 * shares * pieces["apart"]
    known["apart"] = torch.maximum(between, within - between).sum(0) / 2  # at least

    nothing = (own == 0) & (weight[TEACHER] == 0)
    spread = torch.where(nothing, 0.0, pieces["spread"] + apart.abs())
    known["spread"] = spread.amax(0) + mean.abs()

    names = iter(first_names(sweeps.first))
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
