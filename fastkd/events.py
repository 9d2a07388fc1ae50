"""Teachers of which some entries are known: the listed ones, and all others as one event.

A divergence of K + 1 events is the same sum as one of V, over probabilities that are listed or
added up. With phi its terms, g = d phi / d log q and G the sum of g over the events,

    dD/dz_v = (g_v - q_v G) / T                        where v is listed
    dD/dz_v = q_v (g_rest / q_rest - G) / T            elsewhere

so the student's row is read for its sum over what is not listed, and written once. The terms are
the textbook's, in fp64: there are few. Cross-entropy and entropy are the backend's, of a problem
without a teacher.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import chunks, sharding, tracing
from .divergences import Divergence
from .divergences.pair import LN2, fp32_bits, plogr
from .eager.blocks import largest, slices
from .listing import NOTHING
from .problem import AGREEMENT, KD, TEACHER_ENTROPY, Coefficients, Problem, shared


class Listed(NamedTuple):
    """A backend's functions (see problem.py) for problems whose teacher is Events."""

    backend: Any

    def phases(self, problem: Problem, entropy: bool, metrics: bool) -> sharding.Forward:
        shares = yield from _shares(problem)
        if problem.labels is None and not entropy and not metrics:
            values = problem.student_temperature.new_zeros(1, problem.rows)
            state = values.new_empty(0, problem.rows)
        else:
            alone = problem._replace(teacher=None)
            values, state = yield from self.backend.phases(alone, entropy, metrics)
        for rows, part in _chunks(problem):
            _Terms.of(part, _of_rows(shares, rows)).write(values, rows)
        return values, state if shares is None else torch.cat([shares, state])

    def backward(
        self,
        problem: Problem,
        state: Tensor,
        upstream: Coefficients,
        gradient: bool,
        temperature: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        shares, base, temperature_grad = None, None, None
        if problem.merge:
            count = problem.teacher.indices.size(1) + SHARES
            shares, state = state[:count], state[count:]
        if upstream.ce is not None or upstream.entropy is not None:
            base, temperature_grad = self.backend.backward(
                problem._replace(teacher=None), state, upstream, gradient, temperature
            )
        out = _new_gradient(problem) if gradient and base is None else base
        temperature_grad = (
            upstream.kd.new_zeros(problem.rows)
            if temperature and temperature_grad is None
            else temperature_grad
        )
        for rows, part in _chunks(problem):
            room = _room(problem, out, rows, base)
            terms = _Terms.of(part, _of_rows(shares, rows), room)
            found, hot = terms.gradient(part, upstream.kd[rows], temperature)
            if out is not None:
                _write(problem, out, rows, found, base)
            if temperature_grad is not None:
                temperature_grad[rows] += hot
        return out, temperature_grad

    def fused(
        self, problem: Problem, coefficients: Coefficients, metrics: bool, out: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        shares = sharding.run(problem.merge, _shares(problem))
        coefficients = coefficients.rows(problem)
        base, loss = None, torch.zeros_like(coefficients.kd)
        values = loss.new_zeros(1, problem.rows)
        if metrics or coefficients.ce is not None or coefficients.entropy is not None:
            alone = problem._replace(teacher=None)
            loss, figures, base = self.backend.fused(alone, coefficients, metrics, None)
            values = values if figures is None else figures
        if out is None:
            out = _new_gradient(problem) if base is None else base
        for rows, part in _chunks(problem):
            room = _room(problem, out, rows, base)
            terms = _Terms.of(part, _of_rows(shares, rows), room)
            terms.write(values, rows)
            found, _ = terms.gradient(part, coefficients.kd[rows], False)
            _write(problem, out, rows, found, base)
        kd = Coefficients(coefficients.kd, None, None).weigh(values)
        return loss + kd, values if metrics else None, out


# --- rows over several owners -----------------------------------------------------------------

SHARES = 3  # what owners share besides the K listed logits, each of which one of them has


def _shares(problem: Problem) -> sharding.Phases[Tensor | None]:
    """The shares of all owners, [K + 3, N]: listed logits, and of the other entries the largest,
    the sum of e = exp((z - largest) / T), and that of (z - largest) e. None: there is one owner.
    """
    if not problem.merge:
        return None
    count = problem.teacher.indices.size(1)
    own = problem.student.new_zeros(count + SHARES, problem.rows, dtype=torch.float64)
    own[: count + 1] = -math.inf
    for rows, part in _chunks(problem) if problem.vocab_size else ():  # an owner may have no column
        z = part.student_temperature.new_empty(part.rows, part.vocab_size)
        logits = _own_logits(part, slice(None), *_places(part), z)
        T = part.student_temperature[:, None]
        own[:count, rows] = logits.t().double()
        largest = z.amax(-1, keepdim=True)
        z.sub_(torch.where(largest == -math.inf, 0.0, largest))
        exps = (z / T).exp_()
        own[count, rows] = largest[:, 0].double()
        own[count + 1, rows] = exps.sum(-1).double()
        own[count + 2, rows] = torch.where(exps > 0, exps * z, 0.0).sum(-1).double()
    pieces = yield own
    largest = pieces[:, count].amax(0)
    lower = torch.where(pieces[:, count] == -math.inf, 0.0, pieces[:, count] - largest)
    weight = (lower / problem.student_temperature.double()).exp()
    sums, products = pieces[:, count + 1], pieces[:, count + 2]
    joined = largest, (weight * sums).sum(0), (weight * (products + lower * sums)).sum(0)
    return torch.cat([pieces[:, :count].amax(0), torch.stack(joined)])


def _of_rows(shares: Tensor | None, rows: slice) -> Tensor | None:
    return None if shares is None else shares[:, rows].t()


def _places(part: Problem) -> tuple[Tensor, Tensor]:
    """The columns of the listed entries, [R, K], and whether each is there; what is listed nowhere,
    or by another owner, points at the first column.
    """
    index = part.teacher.indices - sharding.of(part.merge).first_column
    own = (part.teacher.indices != NOTHING) & (index >= 0) & (index < part.vocab_size)
    return torch.where(own, index, 0), own


def _own_logits(part: Problem, rows: slice, index: Tensor, own: Tensor, z: Tensor) -> Tensor:
    """Writes this owner's logits of some rows, -inf where listed; gives the listed ones."""
    z.copy_(part.student[0, rows, : part.vocab_size])
    if part.counted is not None:  # what does not count may hold NaN
        z.masked_fill_(~part.counted[rows, None], 0.0)
    index, own = index[rows], own[rows]
    listed = z.gather(-1, index).masked_fill_(~own, -math.inf)
    z.scatter_add_(-1, index, _only(own, -math.inf, z.dtype))  # which adds 0 where it only points
    return listed


def _only(mask: Tensor, value: Any, dtype: torch.dtype) -> Tensor:
    """The value where the mask is, else 0."""
    return torch.where(mask, value, 0.0).to(dtype)


# --- chunks of rows --------------------------------------------------------------------------


def _chunks(problem: Problem) -> Iterator[tuple[slice, Problem]]:
    for rows in slices(problem.rows, chunks.rows_within(problem, 1)):
        yield rows, problem.part(rows)


def _new_gradient(problem: Problem) -> Tensor:
    return torch.empty_like(problem.student, memory_format=torch.contiguous_format)


def _room(problem: Problem, out: Tensor | None, rows: slice, base: Tensor | None) -> Tensor | None:
    """Where the gradient of some rows can be made: in its place, be it over their logits."""
    if out is None or base is not None or out.dtype != problem.dtype:
        return None
    return out.view(problem.student.shape)[0, rows, : problem.vocab_size]


def _write(problem: Problem, out: Tensor, rows: slice, found: Tensor, base: Tensor | None) -> None:
    """Writes the gradient of some rows, maybe over their logits; base: that of the other terms."""
    shape = problem.student.shape
    if base is not None:
        found += base.view(shape)[0, rows, : problem.vocab_size]
    place = out.view(shape)[0, rows]
    if place.data_ptr() != found.data_ptr():
        place[:, : problem.vocab_size] = found
    place[:, problem.vocab_size :] = 0


# --- the events of a chunk -------------------------------------------------------------------


class _Terms(NamedTuple):
    """The divergence of R rows, and what its gradient needs; events are in fp64."""

    value: Tensor  # [R]
    slope: Tensor  # g, [R, K + 1]; 0 where nothing is listed
    lp: Tensor  # log-probabilities of the events, [R, K + 1]
    lq: Tensor
    listed: Tensor  # columns, [R, K]
    own: Tensor  # whether they are such, bool, [R, K]
    logits: Tensor  # of the student, [R, K]
    best: Tensor  # whether a listed logit is the student's largest, [R, K]
    rest: Tensor  # exp((z - shift) / T) of what is not listed, else 0: [R, V]
    shift: Tensor  # [R, 1]
    total: Tensor  # the sum of `rest`, [R, 1], fp64
    moved: Tensor | None  # the sum of (z - shift) * rest, [R]; None: `rest` is that of all owners
    counted: Tensor | None  # [R, 1]

    @staticmethod
    def of(part: Problem, shares: Tensor | None, room: Tensor | None = None) -> _Terms:
        """shares: of all owners of these rows, [R, K + 3]; None: there is one. room: where the
        gradient is to be made.
        """
        events = part.teacher
        counted = None if part.counted is None else part.counted[:, None]
        z = part.student_temperature.new_empty(part.rows, part.vocab_size) if room is None else room
        index, own = _places(part)
        bits = _bits(part, alone=shares is None)
        if shares is None:
            logits, highest, total = _rest(part, index, own, bits, None, z)
        else:
            logits, highest = (x.to(z.dtype) for x in (shares[:, :-SHARES], shares[:, -3:-2]))
            if part.vocab_size:
                _rest(part, index, own, bits, highest, z)
            total = shares[:, -2:-1]
        best = logits >= torch.maximum(highest, logits.amax(-1, keepdim=True))
        best = best & (events.indices != NOTHING)
        shift = _finite(highest)
        rate, lift = _rate_and_lift(shift, part.student_temperature, bits)

        scores = torch.cat([logits.double() * rate, lift + total.log()], -1)
        dead = (scores == -math.inf).all(-1, keepdim=True)  # masked throughout: the row counts 0
        lq = torch.where(dead, -math.inf, scores - scores.logsumexp(-1, keepdim=True))
        lp = events.log_probs.double()
        out = events.indices == NOTHING
        if events.rest is None:
            lp, out = F.pad(lp, (0, 1)), F.pad(out, (0, 1), value=True)
        else:
            lp = torch.cat([lp, events.rest.double()[:, None]], -1)
            out = F.pad(out, (0, 1))
        out = out | dead
        if counted is not None:
            out = out | ~counted
        value, slope = _value_and_slope(part, lp, lq, out)
        unlisted = None if shares is None else shares[:, -1]
        return _Terms(
            value, slope, lp, lq, index, own, logits, best, z, shift, total, unlisted, counted
        )

    def write(self, values: Tensor, rows: slice) -> None:
        """The figures of these rows, as far as they are wanted."""
        values[KD, rows] = self.value.to(values.dtype)
        if len(values) > TEACHER_ENTROPY:
            entropy = -plogr(self.lp, self.lp).sum(-1)
            top = self.lp[:, :-1] == self.lp[:, :-1].amax(-1, keepdim=True)
            agree = (top & self.best).any(-1)
            for kind, figure in ((TEACHER_ENTROPY, entropy), (AGREEMENT, agree)):
                figure = figure.to(values.dtype)
                if self.counted is not None:
                    figure = torch.where(self.counted[:, 0], figure, 0.0)
                values[kind, rows] = figure

    def gradient(self, part: Problem, kd: Tensor, temperature: bool) -> tuple[Tensor, Tensor]:
        """Gradients of the logits, [R, V], for upstream ones [R], and of each row's temperature."""
        T = part.student_temperature[:, None].double()
        kd = torch.where(self.value.isinf() & ~self.slope.isfinite().all(-1), 0.0, kd)[:, None]
        slope = torch.where(kd == 0, 0.0, self.slope)
        q, total = self.lq.exp(), slope.sum(-1, keepdim=True)
        events = torch.where(kd == 0, 0.0, kd * (slope - q * total) / T)  # [R, K + 1]
        hot = part.student_temperature
        scale = torch.where(self.total == 0, 0.0, events[:, -1:] / self.total).to(hot.dtype)
        temperature_grad = kd.new_zeros(0)
        if temperature:
            temperature_grad = self._temperature(events, scale, T).to(hot.dtype)
        if not part.vocab_size:
            return self.rest, temperature_grad
        listed = _only(self.own, events[:, :-1], hot.dtype)
        return self.rest.mul_(scale).scatter_add_(-1, self.listed, listed), temperature_grad

    def _temperature(self, events: Tensor, scale: Tensor, T: Tensor) -> Tensor:
        """-1 / T sum z dD/dz, with the logits measured from `shift`, as the gradient's sum is 0."""
        if self.moved is None:
            depth = self.rest.log() * T.to(self.rest.dtype)  # z - shift
            unlisted = torch.where(self.rest > 0, self.rest * scale * depth, 0.0).sum(-1)
        else:
            unlisted = scale[:, 0] * self.moved
        apart = (self.logits - self.shift).double()
        moved = (events[:, :-1] != 0) & (apart > -math.inf)  # a masked logit does not
        listed = torch.where(moved, events[:, :-1] * apart, 0.0).sum(-1)
        return -(unlisted.double() + listed) / T[:, 0]


def _rest(
    part: Problem, index: Tensor, own: Tensor, bits: float | None, known: Tensor | None, z: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Writes exp((z - shift) / T) of what is not listed, 0 where it is, some rows at a time, whose
    passes a CPU's cache holds. Gives the listed logits, [R, K], and of the rest the largest, the
    shift but for -inf, and the sum of what is written, [R, 1].

    known: the largest of all owners.
    """
    logits = z.new_empty(index.shape)
    highest = z.new_empty(part.rows, 1) if known is None else known
    sums, T = z.new_empty(part.rows, 1), part.student_temperature[:, None]
    for rows in slices(part.rows, largest(part) if z.is_cpu else max(part.rows, 1)):
        some = z[rows]
        logits[rows] = _own_logits(part, rows, index, own, some)
        if known is None:
            highest[rows] = some.amax(-1, keepdim=True)
        shift = _finite(highest[rows])
        if bits is None:
            some.sub_(shift).div_(T[rows]).exp_()
        else:
            torch.add(shift * -bits, some, alpha=bits, out=some).exp2_()
        sums[rows] = some.sum(-1, keepdim=True)
    return logits, highest, sums.double()


def _finite(highest: Tensor) -> Tensor:
    return torch.where(highest == -math.inf, 0.0, highest)


def _bits(part: Problem, alone: bool) -> float | None:
    """1 / (T log 2) where exponentials are made by exp2, which on a CPU takes a quarter of the time
    of exp, and where a product with a sum rounds once: what the shift is rounded to is the same for
    all of a row. alone: no other owner makes such.
    """
    T = part.student_temperature
    if not (alone and T.is_cpu and T.dtype == torch.float32 and shared(T)):
        return None
    return fp32_bits(1 / T[0].item())


def _rate_and_lift(shift: Tensor, T: Tensor, bits: float | None) -> tuple[Any, Tensor]:
    """The 1 / T of the exponentials, in fp64, for other scores; what their logarithms lack."""
    if bits is None:
        return 1 / T[:, None].double(), shift / T[:, None].double()
    return bits * LN2, (shift * -bits).double() * -LN2


def _value_and_slope(part: Problem, lp: Tensor, lq: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence's value, [R], and its slope, [R, K + 1]; `out`: what is no event."""
    kind, a, b = Divergence.of_name(part.divergence), part.a, part.b
    none = out.all(-1)
    lp = torch.where(out, -math.inf, lp).masked_fill(none[:, None], 0.0)
    with tracing.autograd():  # which saves no tensor from inference mode
        lp, leaf, out, none = (x.detach().clone() for x in (lp, lq, out, none))
        lq = torch.where(out, -math.inf, leaf.requires_grad_())
        lq = lq.masked_fill(none[:, None], 0.0)
        rows = torch.where(none, 0.0, kind.of_rows(lp, lq, a, b))
        (slope,) = torch.autograd.grad(rows.sum(), leaf)
    rows = rows.detach()
    return rows, torch.where(out, 0.0, slope)
