"""Float labels: the cross-entropy with a distribution t, by that with its likeliest class k.

With S = sum t and CE_k the cross-entropy with k,

    -sum t_v log q_v = S CE_k + sum t_v (z_k - z_v)
    its gradient     = S (q - e_k) + (S e_k - t)

so a backend computes the first terms as those of a class, with S among its coefficients, and what
the labels are besides is one sum over their row. Where the columns have several owners, one gather
more tells all of them S, k and that sum.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import sharding
from .problem import CE, Coefficients, Problem

BUFFERS = 3  # that a chunk takes: logits in the dtype of the arithmetic, labels, and a product
KEPT = 2  # rows of `state` where there are several owners: k and S


class SoftLabels(NamedTuple):
    """A backend's functions (see problem.py) for a chunk of rows whose labels are [R, V]."""

    backend: Any

    def phases(self, problem: Problem, entropy: bool, metrics: bool) -> sharding.Forward:
        labels = yield from _of(problem)
        values, state = yield from self.backend.phases(labels.problem, entropy, metrics)
        labels.complete(values[CE])
        if problem.merge:
            state = torch.cat([labels.kept().to(state.dtype), state])
        return values, state

    def backward(
        self,
        problem: Problem,
        state: Tensor,
        upstream: Coefficients,
        gradient: bool,
        temperature: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        if problem.merge:
            labels, state = _of_state(problem, state[:KEPT]), state[KEPT:]
        else:
            labels = _alone(problem)
        found, temperature_grad = self.backend.backward(
            labels.problem, state, labels.scaled(upstream), gradient, temperature
        )
        if found is not None and upstream.ce is not None:
            labels.add_gradient(found, upstream.ce)
        return found, temperature_grad

    def fused(
        self, problem: Problem, coefficients: Coefficients, metrics: bool, out: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        labels = sharding.run(problem.merge, _of(problem))
        coefficients = coefficients.rows(problem)
        ce = coefficients.ce
        loss, values, found = self.backend.fused(
            labels.problem, labels.scaled(coefficients), metrics, out
        )
        if values is not None:
            labels.complete(values[CE])
        if ce is not None:
            loss = loss + torch.where(ce == 0, 0.0, ce * labels.rest).to(loss.dtype)
            labels.add_gradient(found, ce)
        return loss, values, found


class _Labels(NamedTuple):
    """What a chunk's labels add to the cross-entropy with their likeliest classes."""

    problem: Problem  # with these classes
    labels: Tensor  # of these columns, as `_given` has them, [R, V]
    mass: Tensor  # S, [R]
    rest: Tensor  # the sum of labels * (z_k - z), [R]

    def scaled(self, coefficients: Coefficients) -> Coefficients:
        ce = coefficients.ce
        return coefficients._replace(ce=None if ce is None else ce * self.mass)

    def complete(self, values: Tensor) -> None:
        """Makes the cross-entropy with the classes that with the labels."""
        values.copy_(torch.where(self.mass == 0, 0.0, values * self.mass) + self.rest)

    def kept(self) -> Tensor:
        """What the gradient needs of all owners, where there are several, [KEPT, R]."""
        assert self.problem.labels is not None
        return torch.stack([self.problem.labels.double(), self.mass.double()])

    def add_gradient(self, out: Tensor, ce: Tensor) -> None:
        problem, rows = self.problem, out.view(len(self.labels), out.size(-1))
        assert problem.labels is not None
        if not self.labels.size(1):
            return
        ce = torch.where(self.mass == 0, 0.0, ce)[:, None]
        rows[:, : self.labels.size(1)].addcmul_(self.labels, ce, value=-1)
        total = (1 - problem.label_smoothing) * self.mass
        columns = problem.labels - sharding.of(problem.merge).first_column
        own = (columns >= 0) & (columns < self.labels.size(1))
        total = torch.where(own, total, 0.0)[:, None].to(rows.dtype)
        rows.scatter_add_(-1, torch.where(own, columns, 0)[:, None], ce * total)


def _given(problem: Problem, read: Tensor) -> tuple[Tensor, Tensor]:
    """Labels [R, V] without what smoothing gives away, and S, [R]; 0 in rows that are not read."""
    assert problem.labels is not None
    labels = torch.where(read[:, None], problem.labels.to(problem.dtype), 0.0)
    mass = labels.sum(-1)
    return labels.mul_(1 - problem.label_smoothing), mass


def _rest(labels: Tensor, z: Tensor, best: Tensor) -> Tensor:
    """The sum of labels * (best - z), [R]; best is [R, 1]."""
    return torch.where(labels == 0, 0.0, labels * (best - z)).sum(-1)


def _of(problem: Problem) -> sharding.Phases[_Labels]:
    """The labels of these rows; where there are several owners, by a gather."""
    return (yield from _shared(problem)) if problem.merge else _alone(problem)


def _alone(problem: Problem) -> _Labels:
    """The labels as the owner of all columns has them."""
    assert problem.labels is not None
    z = problem.student[0, :, : problem.vocab_size]
    classes = problem.labels.argmax(-1)
    labels, mass = _given(problem, _counted(problem) & _here(problem).all(0))
    best = z.gather(-1, classes[:, None]).to(labels.dtype)
    rest = torch.where(best[:, 0] == -math.inf, 0.0, _rest(labels, z, best))  # CE_k says it all
    return _Labels(problem._replace(labels=classes), labels, mass, rest)


def _shared(problem: Problem) -> sharding.Phases[_Labels]:
    """The labels as one of several owners has them, who measures its logits from their largest."""
    assert problem.labels is not None
    counted, here = _counted(problem), _here(problem)
    labels, mass = _given(problem, counted)
    own = mass.new_zeros(5, problem.rows, dtype=torch.float64)
    likeliest, classes, logit, largest, rest = own
    if problem.vocab_size:
        z = problem.student[0, :, : problem.vocab_size]
        found = problem.labels.max(-1)
        likeliest.copy_(found.values)
        classes.copy_(found.indices + sharding.of(problem.merge).first_column)
        logit.copy_(z.gather(-1, found.indices[:, None])[:, 0])
        largest.copy_(z.amax(-1).masked_fill(~here[0], 0.0))
        rest.copy_(_rest(labels, z, largest[:, None].to(labels.dtype)))
    likeliest[mass == 0] = -1.0
    pieces = yield torch.cat([own, mass[None].double(), here.double()])
    likeliest, classes, logit, largest, rest, masses, *sides = pieces.unbind(1)
    read = counted & torch.stack([side.any(0) for side in sides]).all(0)
    owner = likeliest.argmax(0, keepdim=True)
    k, best = (x.gather(0, owner)[0] for x in (classes, logit))
    shares = (1 - problem.label_smoothing) * masses
    apart = torch.where(masses == 0, 0.0, shares * (best - largest) + rest).sum(0)
    apart = torch.where(read & (best != -math.inf), apart, 0.0)  # else CE_k says it all
    total = torch.where(read, masses.sum(0), 0.0).to(mass.dtype)
    labels = torch.where(read[:, None], labels, 0.0)
    return _Labels(problem._replace(labels=k.long()), labels, total, apart)


def _of_state(problem: Problem, kept: Tensor) -> _Labels:
    """As `_shared`, of what its forward kept; without the rest, which no gradient needs."""
    classes, mass = kept[0].long(), kept[1].to(problem.dtype)
    labels, _ = _given(problem, mass != 0)
    return _Labels(problem._replace(labels=classes), labels, mass, torch.zeros_like(mass))


def _counted(problem: Problem) -> Tensor:
    if problem.counted is not None:
        return problem.counted
    return torch.ones(problem.rows, dtype=torch.bool, device=problem.student_temperature.device)


def _here(problem: Problem) -> Tensor:
    """Which rows of each side that has logits have one among these columns, bool [sides, R]."""
    sides = [x for x in (problem.student, problem.teacher) if isinstance(x, Tensor)]
    columns = problem.vocab_size
    if not columns:
        return torch.zeros(len(sides), problem.rows, dtype=torch.bool, device=sides[0].device)
    return torch.stack([side[0, :, :columns].amax(-1) != -math.inf for side in sides])
