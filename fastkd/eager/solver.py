"""The terms of a block of rows: values, softmaxes and slopes, in fp32, and again in fp64.

The formulas are plain ones in fp32. The rows where these lose digits, because the divergence is
small, or fail, because of a mask, show by their value, and are done again in fp64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, reduce
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd.divergences import Divergence
from fastkd.divergences.pair import LN2, MASKED, SEARCHED, Descent, Pair, Softmax, total
from fastkd.problem import AGREEMENT, CE, ENTROPY, KD, TEACHER_ENTROPY, Problem

from .blocks import Precision, Rows, blocks, largest, marked, of_rows, place_of, scales_of
from .near import CLOSE, ROUNDING, first_term, log_ratios, serves

# From here on a value is infinite: the largest of fp32. What stands for -inf is far beyond.
FAR = torch.finfo(torch.float32).max
# A `sum_exp` from here on, of a row far above its `shift`, is divided by in fp64: in fp32 a weight
# over it is no normal number.
MOST_SUM_EXP = 2.0**64
# A student whose other terms are less than UNCERTAIN of its largest is nearly certain: its gradient
# may be a difference of numbers that are larger by the inverse of what is missing to certainty, and
# by the divergence, above 1. So it may be where the divergence is above LARGE, or its slope this
# near to its bound.
UNCERTAIN, LARGE, NEARLY = 2.0**-9, 256.0, 1 - 2.0**-6
# Logits of a problem that are few.
FEW = 1 << 14
# The least scale, 1 / T over the width of a row, at which fp32 has room for logits over it.
LEAST_SCALE = 1e-30


class Terms(NamedTuple):
    """What a block has to offer: [R] values by their names in problem.py, and [R, V] pieces."""

    values: dict[int, Tensor]
    pair: Pair  # without a teacher, of the student twice
    descent: Descent | None  # None: no teacher
    unit: Softmax | None  # the student's at temperature 1; None: no cross-entropy
    counts: Tensor | None  # [R, 1], bool: rows with a logit on either side; None: all
    # -T times the derivatives of divergence and entropy to T, [R, 1]; None: from the gradient.
    tempering: Sequence[Tensor] | None = None
    place: Tensor | None = None  # of the gradient, where the student's `exp` are


class Solver:
    """The terms of all rows that count, block by block; of rows given twice, the second hold.

    gradient: whether they are to be good for it.
    room: [O, I, V], where the student's terms may be written: the place of the gradient.
    inplace: whether the gradient overwrites the logits.
    """

    def __init__(
        self,
        problem: Problem,
        entropy: bool,
        metrics: bool,
        gradient: bool,
        room: Tensor | None = None,
        inplace: bool = False,
    ) -> None:
        self.problem, self.entropy, self.metrics = problem, entropy, metrics
        self.room, self.inplace = room, inplace
        self.again: Tensor | None = None  # [N], bool: rows to come in fp64 when all others are done
        # Few logits are searched whole for their largest: to look at the sums would take longer.
        self.few = problem.rows * problem.vocab_size <= FEW
        self.kind = Divergence.of_name(problem.divergence)
        # Whether rows with a nearly certain student are looked for, whose gradient loses digits.
        # Where the divergence looks at the label, the value does too, of either side.
        label_aware = self.kind.label_aware
        cancels = self.kind.cancels and problem.teacher is not None
        self.guarded = (gradient or label_aware) and cancels
        least = self.kind.least_of(problem.a, problem.b)
        self.near = -torch.inf if problem.teacher is None else least
        self.far = LARGE if self.guarded else FAR
        self.most = NEARLY * self.kind.most(problem.a, problem.b) if self.guarded else torch.inf
        self.scales = scales_of(problem)
        self.plain = Precision(problem, problem.dtype, self.scales)

    @cached_property
    def exact(self) -> Precision:
        return Precision(self.problem, torch.float64, self.scales)

    def __iter__(self) -> Iterator[tuple[Rows, Terms]]:
        size = largest(self.problem)
        half = -(-size // 2)  # fp64 takes twice the memory
        double = self.problem.dtype == torch.float64
        exact = double  # where most rows of a block need fp64, the next begins with it
        for rows in blocks(self.problem.student, self.problem.counted, size):
            if not exact:
                terms = self.terms(rows, self.plain)
                doubtful = self.doubtful(terms)
                if not _most(doubtful):
                    yield from self.with_exact(rows, terms, doubtful)
                    continue
            exact = double
            for part in rows.parts(half):
                terms = self.exact_terms(part)
                yield part, terms
                exact = exact or _most(self.doubtful(terms))
        if self.again is not None:
            for rows in marked(self.problem, self.again, half):
                yield rows, self.exact_terms(rows)

    def with_exact(
        self, rows: Rows, terms: Terms, doubtful: Tensor | None
    ) -> Iterator[tuple[Rows, Terms]]:
        """The terms of a block, and those of its doubtful rows, which may come later."""
        if doubtful is None:
            yield rows, terms
        elif self.inplace:  # before the gradient goes to where the logits are
            some = rows.only(doubtful.nonzero()[:, 0])
            exact = self.exact_terms(some)
            yield rows, terms
            yield some, exact
        else:
            if self.again is None:
                self.again = doubtful.new_zeros(self.problem.rows)
            self.again[rows.flat] = doubtful
            yield rows, terms

    def doubtful(self, terms: Terms) -> Tensor | None:
        """Rows whose divergence is small or infinite, whose terms are too large, whose student is
        nearly certain, or whose figures are not finite; None: no row.
        """
        pair, value = terms.pair, terms.values[KD]
        sides = [pair.student] if pair.teacher is pair.student else [pair.student, pair.teacher]
        watched = sides[: (1 + self.kind.label_aware) * self.guarded]
        if self.few:  # no term is above 1
            sides = watched
        elif terms.unit is not None and terms.unit is not pair.student:
            sides.append(terms.unit)
        checks = [(value, self.near, self.far)]  # figures, and between which bounds they are well
        checks += [(side.sum_exp, -torch.inf, MOST_SUM_EXP) for side in sides]
        others = terms.values.keys() - {KD}
        checks += [(terms.values[kind], -torch.inf, torch.inf) for kind in others]
        if terms.descent is not None and isinstance(terms.descent.total, Tensor):
            checks.append((terms.descent.total, -self.most, self.most))
        if isinstance(pair.student_scale, Tensor):
            checks.append((pair.student_scale, LEAST_SCALE, torch.inf))
        bounds = [[bound.item() for bound in figure.aminmax()] for figure, *_ in checks]
        certain = [
            _certain(side, bounds[i], value, bounds[0][1])
            for i, side in enumerate(watched, start=1)
        ]
        lost = [
            ~((figure > low) & (figure < high)).view(-1)
            for (figure, low, high), (least, most) in zip(checks, bounds, strict=True)
            if not (low < least and most < high)
        ]
        lost += [mask for mask in certain if mask is not None and mask.any()]
        return reduce(torch.logical_or, lost) if lost else None

    def terms(self, rows: Rows, precision: Precision) -> Terms:
        """The terms of these rows by the formulas."""
        problem, store = self.problem, precision.store
        store.start(rows.size)
        logits = precision.logits(rows)
        log2_exps = precision.log2_exps(logits)
        z, y = logits[0], logits[-1]
        scales = [of_rows(scale, rows) for scale in precision.scales]
        if problem.teacher is None and not (self.entropy or self.metrics):
            scales = [1.0]  # only the cross-entropy is wanted
        values, unit = {}, None
        if self.metrics:
            agree = (z == z.amax(-1, keepdim=True)) & (y == y.amax(-1, keepdim=True))
            values[AGREEMENT] = agree.any(-1).to(z.dtype)
        at_one = isinstance(scales[0], float) and scales[0] == 1
        if problem.labels is not None and not at_one:
            unit = Softmax.of(z, 1.0, store.new(), store.new(), self.few)

        room = None if self.room is None else place_of(self.room, rows, store.dtype)
        exp = store.new() if room is None else room
        q = Softmax.of(z, scales[0], log2_exps[0], exp, self.few or self.entropy)
        p = q
        if problem.teacher is not None:
            p = Softmax.of(y, scales[-1], log2_exps[1], store.new(), self.few)
        labels = None if problem.labels is None else problem.labels[rows.flat]
        pair = Pair(q, p, scales[0], store.new, labels)
        if labels is not None:
            unit = q if unit is None else unit
            values[CE] = _cross_entropy(unit, labels, problem.label_smoothing)
        if self.entropy or self.metrics:
            values[ENTROPY] = _entropy(pair, q)
        if self.metrics:
            values[TEACHER_ENTROPY] = _entropy(pair, p)
        if problem.teacher is None:
            values[KD] = torch.zeros_like(q.sum_exp[:, 0])
            return Terms(values, pair, None, unit, None, place=room)
        value, descent = self.kind.value_and_descent(pair, problem.a, problem.b)
        values[KD] = value[:, 0]
        return Terms(values, pair, descent, unit, None, place=room)

    def exact_terms(self, rows: Rows) -> Terms:
        """The terms in fp64, without traces of the number that stands for -inf."""
        values, pair, descent, unit, *_ = self.terms(rows, self.exact)
        counts = ((pair.student.shift != MASKED) & (pair.teacher.shift != MASKED))[:, 0]
        values = {
            kind: torch.where(value > FAR, torch.inf, value).where(counts, 0.0)
            for kind, value in values.items()
        }
        if descent is not None:
            close = values[KD].abs() < CLOSE
            if close.any():
                descent = self.close(rows, close, values[KD], pair, descent)
            descent = mended(descent, values[KD], ~counts)
        return Terms(values, pair, descent, unit, None if counts.all() else counts[:, None])

    def close(
        self, rows: Rows, close: Tensor, values: Tensor, pair: Pair, descent: Descent
    ) -> Descent:
        """Puts in the first term of rows that differ little: at high temperatures, say."""
        values.masked_fill_(values.abs() < ROUNDING, 0.0)
        some = close.nonzero()[:, 0]
        d = log_ratios(self.exact, rows, pair, some)
        q, sum_exp = pair.student.exp[some], pair.student.sum_exp[some]
        d -= total(d * q) / sum_exp
        curvature = self.kind.curvature(self.problem.a, self.problem.b)
        near = serves(d.abs().amax(-1), curvature)
        variance = (total(d * d * q) / sum_exp)[:, 0]
        values[some[near]] = (curvature or 0.0) / 2 * variance[near]
        return first_term(descent, some[near], d[near], pair.student, curvature)


def mended(descent: Descent, values: Tensor, dead: Tensor) -> Descent:
    """What plain formulas do not give: no descent of dead rows, [R], nor of infinite ones."""
    infinite = values.abs() > FAR
    if infinite.any():
        dead = dead | infinite & ~finite(descent)[:, 0]
    if values.isnan().any():  # and so is all of the gradient, which shows it
        shown = torch.where(values.isnan(), values, 1)[:, None]
        descent = descent._replace(factor=descent.factor * shown)
    if not dead.any():
        return descent
    factor, sums = (
        torch.where(dead[:, None], 0.0, part).to(descent.terms.dtype)
        for part in (descent.factor, descent.total)
    )
    return Descent(torch.where(dead[:, None], 0.0, descent.terms), factor, sums)


def finite(descent: Descent) -> Tensor:
    """Whether the slopes of a row are, [R, 1]; with a slope, their sum is infinite."""
    here = descent.terms.device
    factor, sums = (torch.as_tensor(x, device=here) for x in (descent.factor, descent.total))
    return factor.abs() + sums.abs() < FAR


def _cross_entropy(unit: Softmax, labels: Tensor, smoothing: float) -> Tensor:
    loss = unit.log_sum - (1 - smoothing) * LN2 * unit.log2_exp.gather(-1, labels[:, None])
    if smoothing:
        loss -= smoothing * LN2 * unit.log2_exp.mean(-1, keepdim=True)
    return loss[:, 0]


def _entropy(pair: Pair, side: Softmax) -> Tensor:
    return (side.log_sum - LN2 * pair.mean_log2_exp(side))[:, 0]


def _certain(side: Softmax, bounds: Sequence[float], value: Tensor, worst: float) -> Tensor | None:
    """Rows of a side whose largest term is nearly all of their sum; None: none can be.

    bounds: of these sums; value: the rows' divergence, [R], and the worst of it.
    """
    least, most = bounds
    uncertain = UNCERTAIN * min(max(1.0, worst), LARGE)
    # Neither the term of `shift`, which is 1, nor any of the others is nearly all of the sum.
    if least >= 1 + uncertain and most * uncertain <= 1:
        return None
    some = side.exp[:, : max(side.exp.size(1) // 16, SEARCHED)]
    low, high = (bound.item() for bound in (total(some) / side.sum_exp).aminmax())
    if low >= uncertain and high * (1 + uncertain) <= 1:  # these, and all others, are too much
        return None
    largest = (some if low >= uncertain else side.exp).amax(-1)  # or one may be all but these
    return largest * (1 + UNCERTAIN * value.clamp(1, LARGE)) > side.sum_exp[:, 0]


def _most(doubtful: Tensor | None) -> bool:
    return doubtful is not None and 2 * doubtful.count_nonzero().item() > len(doubtful)
