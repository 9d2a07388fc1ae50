"""What a teacher lists, as events: each id once, and the log-mass of all others."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .forms import Events
from .operands import Sampled, TopK
from .settings import Settings

NOTHING = -1  # an index where nothing is listed


def events_of(
    teacher: TopK | Sampled, given: Settings, labels: Tensor | None, columns: int
) -> Events:
    """What a teacher lists, each id once, and the log-mass of all else, in fp64."""
    width = teacher.indices.size(-1)
    indices = teacher.indices.reshape(-1, width).long()
    if checks.may_read(indices) and (indices >= columns).any():
        raise ValueError(
            f"teacher lists id {indices.max().item()}, and the vocabulary has {columns} entries: "
            "map its ids to the student's"
        )
    if isinstance(teacher, Sampled):
        indices, counts = _added_up(indices, teacher.counts.reshape(-1, width).double())
        return _whole(indices, counts.log())
    indices = torch.where(_repeated(indices), NOTHING, indices)
    lp = teacher.log_probs.reshape(-1, width).double()
    lp = torch.where(indices == NOTHING, -math.inf, lp)
    if teacher.tail == "renormalize":
        _, warm = given.of_teacher
        if isinstance(warm, Tensor):
            warm = warm.detach().double().reshape(-1, 1) if warm.dim() else warm.detach().double()
        return _whole(indices, lp / warm)
    if teacher.tail == "drop":
        return Events(_with_mass(indices, lp), lp, None)
    if teacher.tail_log_prob is None:
        rest = _log_of_rest(lp)
    else:
        rest = teacher.tail_log_prob.flatten().double()
    everything = (indices != NOTHING).sum(-1) == columns
    rest = torch.where(everything, -math.inf, rest)  # what rounding leaves is nobody's
    if teacher.tail == "bucket":
        return _whole(indices, lp, rest)
    assert labels is not None
    label = labels.flatten().long()[:, None]
    here = indices == label
    lp = torch.cat([lp, rest[:, None]], -1)
    lp[:, -1] = torch.logaddexp(rest, torch.where(here, lp[:, :-1], -math.inf).logsumexp(-1))
    lp[:, :-1].masked_fill_(here, -math.inf)
    indices = torch.cat([torch.where(here, NOTHING, indices), label.clamp(min=NOTHING)], -1)
    return _whole(indices, lp)


def _whole(indices: Tensor, lp: Tensor, rest: Tensor | None = None) -> Events:
    """Events that add up to 1 again, as they did before they were stored in few bits; without a
    rest (None) the listed entries alone do. In rows without any mass the rest is all.
    """
    rest = torch.full_like(lp[:, 0], -math.inf) if rest is None else rest
    both = torch.cat([lp, rest[:, None]], -1)
    total = both.logsumexp(-1)
    none = total == -math.inf
    total = torch.where(none, 0.0, total)
    rest = torch.where(none, 0.0, rest - total)
    return Events(_with_mass(indices, both), lp - total[:, None], rest)


def _with_mass(indices: Tensor, lp: Tensor) -> Tensor:
    """The indices, NOTHING in rows where nothing has any mass."""
    return indices.masked_fill((lp == -math.inf).all(-1, keepdim=True), NOTHING)


def _log_of_rest(lp: Tensor) -> Tensor:
    """log(1 - sum p), -inf where rounding leaves nothing."""
    listed = lp.logsumexp(-1).clamp(max=0.0)
    return torch.where(listed > -0.7, (-listed.expm1()).log(), (-listed.exp()).log1p())


def _repeated(indices: Tensor) -> Tensor:
    """Ids that stood in their row before, bool."""
    ordered, order = indices.sort(dim=-1, stable=True)
    same = F.pad(ordered.diff(dim=-1) == 0, (1, 0))
    return torch.zeros_like(same).scatter_(-1, order, same)


def _added_up(indices: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Each id once, with the sum of its counts."""
    ordered, order = indices.sort(-1)
    place = F.pad((ordered.diff(dim=-1) != 0).cumsum(-1), (1, 0))
    counts = counts.gather(-1, order).where(ordered != NOTHING, 0.0)
    sums = torch.zeros_like(counts).scatter_add_(-1, place, counts)
    return torch.full_like(indices, NOTHING).scatter_(-1, place, ordered), sums
