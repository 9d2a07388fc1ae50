"""Losses between a teacher and a student of different tokenizers, in plain PyTorch.

    spans = align(student_offsets, teacher_offsets)             text that both split off
    student = merge(student_log_probs, student_tokens, [span.student for span in spans])
    teacher = merge(teacher_log_probs, teacher_tokens, [span.teacher for span in spans])
    shared = shared_tokens(student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab())
    loss = shared_token_loss(student, teacher, shared)          or uld_loss(student, teacher)

Row i of log-probabilities is what token i was drawn from: `logits[:-1].log_softmax(-1)` for
`tokens[1:]` and `offsets[1:]` of a causal model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .divergences import JSD, Bernoulli, Divergence
from .operands import checked

PREDICTED = ("first", "last")
REDUCTIONS = ("none", "sum", "mean")


class Span(NamedTuple):
    """Positions of tokens, of either side, that spell the same piece of text."""

    student: range
    teacher: range


def align(student: Sequence[tuple[int, int]], teacher: Sequence[tuple[int, int]]) -> list[Span]:
    """The finest pieces of one text at whose ends both tokenizations have a token's end.

    Args:
        student, teacher: (start, end) of each token in the text, in its order, as
            `tokenizer(text, return_offsets_mapping=True)` gives them. Tokens without text, such as
            those that begin a sequence, belong to no piece at the ends; tokens that share a
            character, as bytes of it do, stay together.

    Returns:
        One Span for each piece. What only one side covers, where the other was cut off, is left
        out.

    Raises:
        ValueError: offsets that go backwards.

    Example:
        >>> align([(0, 3), (3, 9), (9, 10)], [(0, 3), (3, 6), (6, 9), (9, 10)])[1]
        Span(student=range(1, 2), teacher=range(1, 3))
    """
    mine, theirs = _cuts("student", student), _cuts("teacher", teacher)
    ends = sorted(mine.keys() & theirs.keys())
    return [
        Span(range(mine[start], mine[end]), range(theirs[start], theirs[end]))
        for start, end in pairwise(ends)
    ]


def merge(
    log_probs: Tensor, tokens: Tensor, spans: Sequence[range], predicted: str = "first"
) -> Tensor:
    r"""One distribution for each span, times the probability of the span's other tokens.

    first: log p_a(v) + sum_{a < i < b} log p_i(y_i)       last: log p_{b-1}(v) + the sum before it

    for the span [a, b) and the tokens y. It sums to less than 1: see `shared_token_loss`.

    Args:
        log_probs: [T, V], row i the distribution of token i; differentiable.
        tokens: the text's tokens, [T].
        spans: positions, one side of what `align` returns, [G] of them.
        predicted: which token of a span is left open; the other tokens are as in the text.

    Returns:
        [G, V], in fp32, or fp64 where `log_probs` is.

    Raises:
        ValueError: shapes that do not fit, an empty span, an unknown choice.

    Source: GOLD (Patiño et al. 2025), which calls them "observed" and "bayesian".

    Example:
        >>> p = torch.tensor([[0.5, 0.5], [0.2, 0.8], [1.0, 0.0]])
        >>> merge(p.log(), torch.tensor([0, 1, 0]), [range(0, 2), range(2, 3)]).exp()
        tensor([[0.4000, 0.4000],
                [1.0000, 0.0000]])
    """
    checks.choice("predicted", predicted, PREDICTED)
    checked.floating("log_probs", log_probs)
    _ids("tokens", tokens)
    if log_probs.dim() != 2 or tokens.shape != log_probs.shape[:1]:
        raise ValueError(
            "log_probs must be [T, V] and tokens [T], got "
            f"{tuple(log_probs.shape)} and {tuple(tokens.shape)}"
        )
    checks.several("spans", spans)
    if not all(isinstance(span, range) for span in spans):
        raise TypeError("spans must be ranges, one side of what `align` returns")
    if any(len(span) == 0 or span.start < 0 or span.stop > len(tokens) for span in spans):
        raise ValueError(f"spans must hold positions below {len(tokens)}, at least one each")
    log_probs = _exact(log_probs)
    place = [span[0] if predicted == "first" else span[-1] for span in spans]
    open_rows = torch.tensor(place, dtype=torch.long, device=log_probs.device)
    others = [(i, group) for group, span in enumerate(spans) for i in span if i != place[group]]
    scale = log_probs.new_zeros(len(spans))
    if others:
        rows, groups = torch.tensor(others, device=log_probs.device).T
        _within("tokens", tokens[rows], log_probs.size(1))
        scale = scale.index_add(0, groups, log_probs[rows, tokens[rows].long()])
    return log_probs[open_rows] + scale[:, None]


def shared_tokens(student: Mapping[str, int], teacher: Mapping[str, int]) -> Tensor:
    """Ids of the tokens that both vocabularies have, [M, 2]: the student's and the teacher's.

    The two marks of a leading space, "Ġ" and "▁", count as one. Each id occurs once.

    Args:
        student, teacher: token to id, as `tokenizer.get_vocab()` gives them.

    Example:
        >>> shared_tokens({"a": 0, "Ġb": 1, "c": 2}, {"▁b": 7, "x": 8, "a": 9}).tolist()
        [[0, 9], [1, 7]]
    """
    for name, vocabulary in (("student", student), ("teacher", teacher)):
        if not isinstance(vocabulary, Mapping):
            raise TypeError(
                f"{name} must map tokens to ids, as tokenizer.get_vocab() does, got "
                f"{type(vocabulary).__name__}"
            )
    theirs: dict[str, int] = {}
    for token, index in sorted(teacher.items(), key=lambda item: item[1]):
        theirs.setdefault(_spelling(token), index)
    pairs = []
    for token, index in sorted(student.items(), key=lambda item: item[1]):
        other = theirs.pop(_spelling(token), None)
        if other is not None:
            pairs.append((index, other))
    return torch.tensor(pairs, dtype=torch.long).view(-1, 2)


def uld_loss(
    student: Tensor, teacher: Tensor, *, weight: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    r"""Universal logit distillation: sum_r |p_(r) - q_(r)| over the probabilities in descending
    order, the shorter vocabulary filled up with zeros.

    It needs no word of either vocabulary, and so knows nothing of what tokens mean: the gradient
    moves mass between the student's ranks, q (s - E_q[s]) with s = sign(q_j - p_rank(j)).

    Args:
        student, teacher: log-probabilities [..., V_s] and [..., V_t], of any vocabularies.
        weight: [...], of the rows; 0 leaves a row out. None: 1.
        reduction: "none" ([...]), "sum", or "mean": divided by the sum of the weights.

    Returns:
        fp32, or fp64 where the student is.

    Raises:
        ValueError: leading shapes that differ, an unknown reduction.

    Source: Boizard et al. 2024, arXiv 2402.12030.

    Example:
        >>> student, teacher = torch.randn(4, 10), torch.randn(4, 12)
        >>> uld_loss(student.log_softmax(-1), teacher.log_softmax(-1)) > 0
        tensor(True)
    """
    _check(student, teacher, weight, reduction)
    return _reduce(_sorted_distance(_exact(student), teacher), weight, reduction)


def summed(divergence: str | Divergence | Bernoulli) -> Divergence:
    """A divergence that is a sum over tokens, which the shared ones are a part of.

    Raises:
        ValueError: for any other.

    Example:
        >>> summed("tvd")
        TVD()
    """
    terms = checks.divergence(divergence)
    if isinstance(terms, Bernoulli):
        raise ValueError("divergence must be one of distributions over tokens, got Bernoulli()")
    if terms.label_aware or type(terms).value is Divergence.value:
        raise ValueError(f"divergence must be a sum over tokens, which {terms} is not")
    return terms


def shared_token_loss(
    student: Tensor,
    teacher: Tensor,
    shared: Tensor,
    *,
    divergence: str | Divergence | None = None,
    weights: tuple[float, float] | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""A divergence on the tokens that both vocabularies have, and `uld_loss` on the others:

    w_1 sum_{v shared} phi(p_v, q_v) + w_2 sum_r |p_(r) - q_(r)| over the rest

    with phi the terms of the divergence. Probabilities are taken as they are, not normalised
    again: their sum over the shared tokens is less than 1, and KL divergences, which weigh only
    ratios, may be negative then; JSD and TVD are not. The teacher gets no gradient.

    Args:
        student, teacher: log-probabilities [..., V_s] and [..., V_t], or what `merge` returns.
        shared: ids [M, 2] that mean the same, as from `shared_tokens`.
        divergence: a name or an object, as in `distillation_loss`; None: JSD(0.5).
        weights: (w_1, w_2); None: the share M / V_t of the teacher's vocabulary, and the rest.
        weight, reduction: as in `uld_loss`.

    Returns:
        fp32, or fp64 where the student is.

    Raises:
        ValueError: shapes that do not fit, an unknown reduction or divergence.

    Source: GOLD (Patiño et al. 2025), the trainer of that name in TRL.

    Example:
        >>> student = torch.randn(4, 3).log_softmax(-1).requires_grad_()
        >>> teacher = torch.randn(4, 5).log_softmax(-1)
        >>> shared_token_loss(student, teacher, torch.tensor([[0, 4], [2, 1]])).backward()
    """
    _check(student, teacher, weight, reduction)
    terms = JSD(0.5) if divergence is None else summed(divergence)
    _ids("shared", shared)
    if shared.dim() != 2 or shared.size(1) != 2 or shared.dtype != torch.long:
        raise ValueError(
            f"shared must be pairs of ids, int64 [M, 2], got {shared.dtype} {tuple(shared.shape)}"
        )
    for i, side in enumerate((student, teacher)):
        _within("shared", shared[:, i], side.size(-1))
    if weights is not None:
        weights = _pair(weights)
    student, teacher = _exact(student), teacher.detach()
    mine, theirs = shared.to(student.device).unbind(1)
    lq, lp = student[..., mine], teacher[..., theirs].to(student.dtype)
    value = terms.outer(terms.value(lp, lq, *terms.parameters).sum(-1), *terms.parameters)
    rest = _sorted_distance(_without(student, mine), _without(teacher, theirs))
    if weights is None:
        share = len(shared) / teacher.size(-1)
        weights = share, 1 - share
    return _reduce(weights[0] * value + weights[1] * rest, weight, reduction)


def _cuts(side: str, offsets: Sequence[tuple[int, int]]) -> dict[int, int]:
    """Places in the text between tokens: to how many tokens come before."""
    checks.several(f"the {side}'s offsets", offsets)
    if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in offsets):
        raise TypeError(f"the {side}'s offsets must be pairs (start, end), one for each token")
    tokens = [(i, start, end) for i, (start, end) in enumerate(offsets) if end > start]
    cuts = {start: i for i, start, _ in tokens[:1]}
    last = 0
    for place, (i, start, end) in enumerate(tokens):
        following = tokens[place + 1][1] if place + 1 < len(tokens) else end
        if start < last or following < start:
            raise ValueError(f"the {side}'s offsets must be in the order of the text: {offsets}")
        if following >= end:
            cuts[end], last = i + 1, end
    return cuts


def _spelling(token: str) -> str:
    return token.replace("▁", "Ġ")


def _exact(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _sorted_distance(student: Tensor, teacher: Tensor) -> Tensor:
    q = student.exp().sort(-1, descending=True).values
    p = teacher.detach().to(q.dtype).exp().sort(-1, descending=True).values
    width = max(p.size(-1), q.size(-1))
    p, q = (F.pad(side, (0, width - side.size(-1))) for side in (p, q))
    return (p - q).abs().sum(-1)


def _without(log_probs: Tensor, columns: Tensor) -> Tensor:
    kept = torch.ones(log_probs.size(-1), dtype=torch.bool, device=log_probs.device)
    kept[columns.to(kept.device)] = False
    return log_probs[..., kept]


def _check(student: Tensor, teacher: Tensor, weight: Tensor | None, reduction: str) -> None:
    checks.choice("reduction", reduction, REDUCTIONS)
    for name, side in (("student", student), ("teacher", teacher)):
        checked.logits(name, side)
    checks.beside("teacher", teacher, student)
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            "student and teacher must have equal leading shapes, got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}: align() and merge() make such"
        )
    if weight is not None:
        checks.weight(weight, student)


def _ids(name: str, ids: Any) -> None:
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64):
        what = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"{name} must be ids, a tensor in int64 or int32, got {what}")


def _within(name: str, ids: Tensor, columns: int) -> None:
    if checks.may_read(ids) and not ((ids >= 0) & (ids < columns)).all():
        wrong = ids[(ids < 0) | (ids >= columns)][0].item()
        raise ValueError(f"{name} must hold ids in [0, {columns}), got {wrong}")


def _pair(weights: Any) -> tuple[float, float]:
    checks.several("weights", weights)
    if len(weights) != 2:
        raise ValueError(f"weights must be two, of shared tokens and of others, got {len(weights)}")
    one, other = (checks.finite("weights", weight) for weight in weights)
    return one, other


def _reduce(rows: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    weight = torch.ones_like(rows) if weight is None else weight.to(rows.dtype)
    rows = torch.where(weight == 0, 0.0, rows * weight)
    if reduction == "none":
        return rows
    total = rows.sum()
    if reduction == "sum":
        return total
    divisor = weight.sum()
    return total / torch.where(divisor == 0, 1.0, divisor)
