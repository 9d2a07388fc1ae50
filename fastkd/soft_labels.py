"""Float labels: the cross-entropy with a distribution t, by that with its likeliest class k.

With S = sum t and CE_k the cross-entropy with k,

    -sum t_v log q_v = S CE_k + sum t_v (z_k - z_v)
    its gradient     = S (q - e_k) + (S e_k - t)

so a backend computes the first terms as those of a class, with S among its coefficients, and what
the labels are besides is one sum over their row.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .problem import CE, Coefficients, Problem

BUFFERS = 3  # that a chunk takes: logits in the dtype of the arithmetic, labels, and a product


class SoftLabels(NamedTuple):
    """A backend's functions (see problem.py) for a chunk of rows whose labels are [R, V]."""

    backend: Any

    def forward(self, problem: Problem, entropy: bool, metrics: bool) -> tuple[Tensor, Tensor]:
        labels = _Labels.of(problem)
        values, state = self.backend.forward(labels.problem, entropy, metrics)
        labels.complete(values[CE])
        return values, state

    def backward(
        self,
        problem: Problem,
        state: Tensor,
        upstream: Coefficients,
        gradient: bool,
        temperature: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        labels = _Labels.of(problem)
        found, heat = self.backend.backward(
            labels.problem, state, labels.scaled(upstream), gradient, temperature
        )
        if found is not None and upstream.ce is not None:
            labels.add_gradient(found, upstream.ce)
        return found, heat

    def fused(
        self, problem: Problem, coefficients: Coefficients, metrics: bool, out: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        labels, ce = _Labels.of(problem), coefficients.ce
        loss, values, found = self.backend.fused(
            labels.problem, labels.scaled(coefficients), metrics, out
        )
        if values is not None:
            labels.complete(values[CE])
        if ce is not None:
            loss = loss + torch.where(ce == 0, 0.0, ce * labels.rest)
            labels.add_gradient(found, ce)
        return loss, values, found


class _Labels(NamedTuple):
    """What a chunk's labels add to the cross-entropy with their likeliest classes."""

    problem: Problem  # with these classes
    labels: Tensor  # without what smoothing gives away; 0 in rows that are not read, [R, V]
    mass: Tensor  # S, [R]
    rest: Tensor  # the sum of labels * (z_k - z), [R]

    @staticmethod
    def of(problem: Problem) -> _Labels:
        assert problem.labels is not None
        z = problem.student[0, :, : problem.vocab_size]
        labels = problem.labels.to(problem.dtype)
        classes = labels.argmax(-1)
        labels = torch.where(_read(problem)[:, None], labels, 0.0)
        mass = labels.sum(-1)
        labels = labels.mul_(1 - problem.label_smoothing)
        best = z.gather(-1, classes[:, None]).to(labels.dtype)
        rest = torch.where(labels == 0, 0.0, labels * (best - z)).sum(-1)
        rest = torch.where(best[:, 0] == -math.inf, 0.0, rest)  # CE_k is infinite, and says it all
        return _Labels(problem._replace(labels=classes), labels, mass, rest)

    def scaled(self, coefficients: Coefficients) -> Coefficients:
        ce = coefficients.ce
        return coefficients._replace(ce=None if ce is None else ce * self.mass)

    def complete(self, values: Tensor) -> None:
        """Makes the cross-entropy with the classes that with the labels."""
        values.copy_(torch.where(self.mass == 0, 0.0, values * self.mass) + self.rest)

    def add_gradient(self, out: Tensor, ce: Tensor) -> None:
        rows = out.view(len(self.labels), -1)
        classes = self.problem.labels
        assert classes is not None
        ce = torch.where(self.mass == 0, 0.0, ce)[:, None]
        rows[:, : self.labels.size(1)].addcmul_(self.labels, ce, value=-1)
        rows.scatter_add_(-1, classes[:, None], ce * self.labels.sum(-1, keepdim=True))


def _read(problem: Problem) -> Tensor:
    """Rows that count, and have logits on either side, bool [R]."""
    rows = torch.ones(problem.rows, dtype=torch.bool, device=problem.student_temperature.device)
    if problem.counted is not None:
        rows = rows & problem.counted
    for side in (problem.student, problem.teacher):
        if isinstance(side, Tensor):
            rows = rows & (side[0, :, : problem.vocab_size].amax(-1) != -math.inf)
    return rows
