"""Several teachers as one: what a chunk of rows combines into the logits of a single teacher.

A mixture of probabilities is made of log-probabilities, at the teachers' temperature, in the log
domain: an entry that is small for every teacher keeps its digits. These are logits at T = 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import linear, moments, sharding
from .divergences import Divergence
from .forms import Events, Head, Mixture
from .problem import MEAN, WIDTH, WIDTH_SLOPE, Problem

BUFFERS = 3  # that a chunk takes: the mixture, one teacher, and what a function leaves behind


def logits(part: Problem, mixture: Mixture, buffers: list[Tensor], name: str) -> Tensor:
    """The mixture's logits, in the first of the buffers, [R, V]; name: the backend's."""
    out, *spare = buffers
    part = part._replace(teacher=mixture)
    if mixture.combine == "logits":
        return _mean(part, out, spare[0])
    if Divergence.of_name(part.divergence).rows == "bernoulli":
        return _mixture_of_sigmoids(part, out, *spare)
    out.fill_(-math.inf)
    for i, weight, rows, some in _read(part):
        member = some.teacher.members[i]
        if isinstance(member, Events):
            _add_listed(out, _own(member, some), weight.log(), rows)
            continue
        scores = _dense(member, spare[0][: some.rows])
        _log_softmax(scores, some, i, name)
        _add(out, rows, scores.add_(weight.log()))
    return out


def own_norms(part: Problem, buffer: Tensor, name: str) -> Tensor:
    """Each member's top in these columns, its mass measured from that, its width, [3, M, R]."""
    count = len(part.teacher.members)
    found = buffer.new_zeros(3, count, part.rows, dtype=torch.float64)
    tops, masses, widths = found[0].fill_(-math.inf), found[1], found[2].fill_(1.0)
    for i, _, rows, some in _read(part):
        member = some.teacher.members[i]
        if isinstance(member, Events):
            continue
        scores = _dense(member, buffer[: some.rows])
        width = _width(scores, some, name)
        widths[i, rows] = width[:, 0].double()
        if scores.size(1):
            top = scores.amax(-1, keepdim=True)
            tops[i, rows] = top[:, 0].double()
            masses[i, rows] = scores.sub_(_finite(top)).div_(width).exp_().sum(-1).double()
    return found


def joined_norms(pieces: Tensor, widths: Tensor) -> Tensor:
    """The norms by the tops and masses of all owners, [W, 2, M, N]: see Mixture.norms."""
    tops, masses = pieces.unbind(1)
    top = _finite(tops.amax(0))
    mass = (((tops - top) / widths).exp() * masses).sum(0)
    return torch.stack([top, widths, _finite(mass.log())], 1)


def tempered(part: Problem, sides: list[Any], name: str) -> Problem:
    """A chunk with the logits of both sides. A mixture of probabilities has its temperature, and
    its members' moments, behind it.
    """
    mixed = isinstance(part.teacher, Mixture) and part.teacher.combine == "probs"
    part = part._replace(student=sides[0], teacher=sides[1])
    known = part.moments is not None
    if part.standardize and not known:
        part = moments.standardized(part, name)
    if mixed:
        part = part._replace(teacher_temperature=torch.ones_like(part.student_temperature))
        if part.moments is not None and not known:
            for field, value in ((MEAN, 0.0), (WIDTH, 1.0), (WIDTH_SLOPE, 0.0)):
                part.moments[1, field] = value
    return part


def _read(part: Problem) -> Iterator[tuple[int, Tensor, Any, Problem]]:
    """Each member that weighs in these rows: which, its weights [R', 1], the rows, their problem.

    To know in which rows a routed member weighs waits for the device, which costs less than to
    read it in all.
    """
    mixture = part.teacher
    for i, routed in enumerate(mixture.routed):
        weight, rows, some = mixture.weights[i], slice(None), part
        if routed:
            found = weight.nonzero()[:, 0]
            if not len(found):
                continue
            if len(found) < part.rows:
                rows, some, weight = found, part.part(found), weight[found]
        yield i, weight[:, None], rows, some


def _dense(member: Any, out: Tensor) -> Tensor:
    """A member's logits, [R, V], in the buffer."""
    if isinstance(member, Head):
        return linear.logits(member, out)
    return out.copy_(member[0, :, : out.size(1)])


def _temperature(some: Problem) -> Tensor:
    """The teachers', [R, 1]."""
    found = some.teacher_temperature
    return (some.student_temperature if found is None else found)[:, None]


def _add(out: Tensor, rows: Any, logs: Tensor) -> None:
    """The logarithm of a sum, in the place of one of its terms."""
    if isinstance(rows, slice):
        torch.logaddexp(out, logs, out=out)
    else:
        out[rows] = torch.logaddexp(out[rows], logs)


def _own(events: Events, some: Problem) -> Events:
    """Those that are among this owner's columns, by their places there. A label that is to be
    ignored, or is wrong, is not.
    """
    places = events.indices - sharding.of(some.merge).first_column
    own = (events.indices >= 0) & (places >= 0) & (places < some.vocab_size)
    return events._replace(indices=torch.where(own, places, -1))


def _add_listed(out: Tensor, events: Events, log_weight: Tensor, rows: Any) -> None:
    """Adds listed entries. What lists none points at the first column, and leaves it as it is."""
    if not out.size(1):
        return
    where, logs = events.indices.clamp(min=0), events.log_probs.to(out.dtype) + log_weight
    logs = torch.where(events.indices < 0, -math.inf, logs)
    some = out[rows]
    some.scatter_reduce_(-1, where, torch.logaddexp(some.gather(-1, where), logs), "amax")
    out[rows] = some


def _mean(part: Problem, out: Tensor, spare: Tensor) -> Tensor:
    """sum w z over the members, whose weights sum to 1."""
    out.zero_()
    for i, weight, rows, some in _read(part):
        out[rows] += _dense(some.teacher.members[i], spare[: some.rows]).mul_(weight)
    return out


def _log_softmax(scores: Tensor, some: Problem, i: int, name: str) -> None:
    """log softmax(scores / T), or of their z-scores, in place; -inf in rows without an entry."""
    if some.teacher.norms is not None:
        top, width, total = some.teacher.norms[i, :, :, None].to(scores.dtype)
        scores.sub_(top).div_(width).sub_(total)
        return
    width = _width(scores, some, name)
    scores.sub_(_finite(scores.amax(-1, keepdim=True))).div_(width)
    scores.sub_(_finite(scores.logsumexp(-1, keepdim=True)))


def _width(scores: Tensor, some: Problem, name: str) -> Tensor:
    """What their distances from the top are divided by, [R, 1]."""
    width = _temperature(some)
    if not some.standardize:
        return width
    alone = some._replace(student=scores[None], teacher=None)
    found = moments.standardized(alone, name).moments
    assert found is not None
    return width * found[0, WIDTH, :, None].to(width.dtype)


def _finite(logs: Tensor) -> Tensor:
    """0 for -inf, of which nothing is to be taken away."""
    return logs.masked_fill(logs == -math.inf, 0.0)


def _mixture_of_sigmoids(part: Problem, yes: Tensor, spare: Tensor, no: Tensor) -> Tensor:
    """The logits of sum w sigmoid(z / T)."""
    yes.fill_(-math.inf)
    no.fill_(-math.inf)
    for i, weight, rows, some in _read(part):
        scores = _dense(some.teacher.members[i], spare[: some.rows]).div_(_temperature(some))
        for out, score in ((no, -scores), (yes, scores)):
            _add(out, rows, F.logsigmoid(score).add_(weight.log()))
    return yes.sub_(no)
