"""The naive path: table 1's textbook values in fp64, differentiated by autograd; not optimised."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .divergences import Divergence
from .divergences.pair import plogr
from .forms import Head
from .problem import EPS, FLAT, Problem


def losses(
    problem: Problem, entropy: bool, metrics: bool, standardize: bool
) -> list[Tensor | None]:
    """The rows of `values` (see problem.py), each [N] or None, differentiable."""
    if Divergence.of_name(problem.divergence).rows == "bernoulli":
        return _bernoulli(problem, entropy, metrics)
    z, y = _logits(problem)
    counts = ~((z == -math.inf).all(-1) | (y == -math.inf).all(-1))
    if problem.counted is not None:
        counts = counts & problem.counted
    z = torch.where(counts[:, None], z, 0.0)
    y = torch.where(counts[:, None], y, 0.0)

    student_temperature, teacher_temperature = _temperatures(problem)
    scores = [_standardized(logits) if standardize else logits for logits in (z, y)]
    lq = _log_softmax(scores[0], student_temperature)
    lp = _log_softmax(scores[1], teacher_temperature)

    labels = None
    if problem.labels is not None and not problem.soft:
        labels = torch.where(counts, problem.labels, 0).long()
    rows: list[Tensor | None] = [
        _divergence(problem, lp, lq, labels),
        None,
        -plogr(lq, lq).sum(-1) if entropy or metrics else None,
        -plogr(lp, lp).sum(-1) if metrics else None,
        _agreement(z, y) if metrics else None,
    ]
    if labels is not None:
        rows[1] = F.cross_entropy(
            z, labels, reduction="none", label_smoothing=problem.label_smoothing
        )
    if problem.labels is not None and problem.soft:
        rows[1] = _soft_cross_entropy(z, problem.labels, problem.label_smoothing)
    rows = [None if row is None else torch.where(counts, row, 0.0) for row in rows]
    return _rounded(problem, rows)


def _soft_cross_entropy(z: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    target = (1 - smoothing) * labels.double()
    target = target + smoothing * labels.double().mean(-1, keepdim=True)
    return -_product(target, torch.log_softmax(z, -1)).sum(-1)


def _logits(problem: Problem) -> list[Tensor]:
    """The logits of student and teacher in fp64; without a teacher, the student's twice."""
    teacher = problem.student if problem.teacher is None else problem.teacher
    return [
        _of_head(side, problem) if isinstance(side, Head)
        else side[..., : problem.vocab_size].flatten(0, 1).double()
        for side in (problem.student, teacher)
    ]  # fmt: skip


def _of_head(head: Head, problem: Problem) -> Tensor:
    hidden, weight = head.hidden.double(), head.weight[: problem.vocab_size].double()
    if problem.counted is not None:  # what does not count may hold NaN
        hidden = torch.where(problem.counted[:, None], hidden, 0.0)
    logits = hidden @ weight.mT
    if head.bias is not None:
        logits = logits + head.bias[: problem.vocab_size].double()
    logits = logits * head.scale
    return head.softcap * torch.tanh(logits / head.softcap) if head.softcap else logits


def _temperatures(problem: Problem) -> list[Tensor]:
    student, teacher = problem.student_temperature, problem.teacher_temperature
    return [t.double() for t in (student, student if teacher is None else teacher)]


def _rounded(problem: Problem, rows: list[Tensor | None]) -> list[Tensor | None]:
    return [None if row is None else row.to(problem.dtype) for row in rows]


def _divergence(problem: Problem, lp: Tensor, lq: Tensor, labels: Tensor | None) -> Tensor:
    """Each row's divergence. Where it is infinite, a slope without a value is 0; where NaN, NaN."""
    if problem.teacher is None:
        return torch.zeros_like(lq[:, 0])
    kind, a, b = Divergence.of_name(problem.divergence), problem.a, problem.b

    def defined(slope: Tensor | None) -> Tensor | None:
        if slope is None:
            return None
        dead = (value.detach().abs() > most) & ~(slope.abs() < most).all(-1)
        slope = torch.where(dead[:, None], 0.0, slope)
        return torch.where(value.detach().isnan()[:, None], math.nan, slope)

    for side in (lp, lq):
        if side.requires_grad:
            side.register_hook(defined)
    value, most = kind.of_rows(lp, lq, a, b, labels), torch.finfo(problem.dtype).max
    return value


def _log_softmax(logits: Tensor, temperature: Tensor) -> Tensor:
    return torch.log_softmax(_over(logits, logits, temperature[:, None]), -1)


def _standardized(logits: Tensor) -> Tensor:
    """(logits - mean) / (std + eps) of the entries that are not -inf."""
    kept = logits != -math.inf
    count = kept.sum(-1, keepdim=True)
    mean = torch.where(kept, logits, 0.0).sum(-1, keepdim=True) / count.clamp_min(1)
    centred = torch.where(kept, logits - mean, 0.0)
    least = torch.where(kept, logits, math.inf).amin(-1, keepdim=True)
    spread = logits.amax(-1, keepdim=True) > least  # sqrt has no derivative at 0
    size = torch.where(spread, centred.detach().abs().amax(-1, keepdim=True), 1.0)
    square = (centred / size).square().sum(-1, keepdim=True)  # which neither overflows nor vanishes
    std = size * torch.where(spread, square / (count - 1).clamp_min(1), 1.0).sqrt()
    return _over(logits, centred, torch.where(spread, std + EPS, FLAT))


def _over(logits: Tensor, values: Tensor, divisor: Tensor) -> Tensor:
    """values / divisor; infinite where the logits are, without a derivative to the divisor."""
    kept = logits.isfinite()
    quotient = torch.where(kept, values, 0.0) / divisor
    return torch.where(kept, quotient, logits / divisor.detach())


def _agreement(z: Tensor, y: Tensor) -> Tensor:
    shared = (z == z.amax(-1, keepdim=True)) & (y == y.amax(-1, keepdim=True))
    return shared.any(-1).to(z.dtype)


def _bernoulli(problem: Problem, entropy: bool, metrics: bool) -> list[Tensor | None]:
    """The same for multi-label heads."""
    z, y = _logits(problem)
    if problem.counted is not None:
        z, y = (torch.where(problem.counted[:, None], x, 0.0) for x in (z, y))
    student_temperature, teacher_temperature = _temperatures(problem)
    q = _over(z, z, student_temperature[:, None])
    p = _over(y, y, teacher_temperature[:, None])
    value, student_entropy, teacher_entropy = (torch.zeros_like(z) for _ in range(3))
    for sign in (1, -1):  # yes and no
        lq, lp = F.logsigmoid(sign * q), F.logsigmoid(sign * p)
        if problem.a and problem.teacher is not None:
            value = value + problem.a * plogr(lp, lp - lq)
        if problem.b and problem.teacher is not None:
            value = value + problem.b * plogr(lq, lq - lp)
        student_entropy = student_entropy - plogr(lq, lq)
        teacher_entropy = teacher_entropy - plogr(lp, lp)
    hard = None
    if problem.labels is not None:
        labels = problem.labels.to(z.dtype)
        hard = -(_product(labels, F.logsigmoid(z)) + _product(1 - labels, F.logsigmoid(-z)))
    rows = [
        value,
        hard,
        student_entropy if entropy or metrics else None,
        teacher_entropy if metrics else None,
        ((z > 0) == (y > 0)).to(z.dtype) / z.size(-1) if metrics else None,
    ]
    counted = torch.ones_like(z[:, 0]) if problem.counted is None else problem.counted
    rows = [row if row is None else torch.where(counted != 0, row.sum(-1), 0.0) for row in rows]
    return _rounded(problem, rows)


def _product(weight: Tensor, log: Tensor) -> Tensor:
    return torch.where(weight == 0, 0.0, weight * torch.where(weight == 0, 0.0, log))
