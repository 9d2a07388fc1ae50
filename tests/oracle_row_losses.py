"""Row losses by their plain formulas, a part of `oracle.py`: from log p and log q, [N, V]."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def taid(lp: Tensor, lq: Tensor, t: float) -> Tensor:
    """KL to softmax of the interpolated logits, which is a constant to the student."""
    m = ((1 - t) * lq.detach() + t * lp if t < 1 else lp).log_softmax(-1)
    return times(m.exp(), m - lq).sum(-1)


def todi(lp: Tensor, lq: Tensor) -> Tensor:
    d = lp - lq
    w = d.detach().nan_to_num(nan=0.0).sigmoid()
    return (times(w * lp.exp(), d) - times((1 - w) * lq.exp(), d)).sum(-1)


def akl(lp: Tensor, lq: Tensor, mu: float) -> Tensor:
    """The head by sorting."""
    p, q = lp.exp(), lq.exp()
    ordered, order = p.detach().sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    head = torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, before < mu)
    gap = (p - q).detach().abs()
    total = gap.sum(-1)
    share = torch.where(total == 0, 0.5, torch.where(head, gap, 0.0).sum(-1) / total)
    forward = times(p, lp - lq).sum(-1)
    return share * forward + (1 - share) * times(q, lq - lp).sum(-1)


def dist(lp: Tensor, lq: Tensor, beta: float) -> Tensor:
    p, q = (x.exp() - x.exp().mean(-1, keepdim=True) for x in (lp, lq))
    return beta * (1 - F.cosine_similarity(p, q, dim=-1))


def alpha_beta(lp: Tensor, lq: Tensor, alpha: float, beta: float) -> Tensor:
    a, b, s = alpha, beta, alpha + beta
    if a == 0 and b == 0:
        return 0.5 * (lp - lq).square().sum(-1)
    if s == 0:
        r = a * (lp - lq)
        return (r.exp() - 1 - r).sum(-1) / a**2
    p, q = (torch.where(x == -math.inf, 0.0, (s * x).exp()) for x in (lp, lq))
    if b == 0:
        return (times(p, a * (lp - lq)) - p + q).sum(-1) / a**2
    if a == 0:
        return (times(q, b * (lq - lp)) - q + p).sum(-1) / b**2
    mixed = (a * lp + b * lq).exp()
    return -(mixed - a / s * p - b / s * q).sum(-1) / (a * b)


def dkd(lp: Tensor, lq: Tensor, labels: Tensor, alpha: float, beta: float) -> Tensor:
    (p, p_rest, p_others), (q, q_rest, q_others) = (_apart(x, labels) for x in (lp, lq))
    target = times(p.exp(), p - q) + times(p_rest.exp(), p_rest - q_rest)
    others = times(p_others.exp(), p_others - q_others).sum(-1)
    return _weighted(alpha, target) + _weighted(beta, others)


def nkd(lp: Tensor, lq: Tensor, labels: Tensor, gamma: float) -> Tensor:
    (p, _, p_others), (q, _, q_others) = (_apart(x, labels) for x in (lp, lq))
    return -times(p.exp(), q) - _weighted(gamma, times(p_others.exp(), q_others).sum(-1))


def _weighted(weight: float, term: Tensor) -> Tensor:
    """Without a weight it is left out, were it infinite."""
    return weight * term if weight else torch.zeros_like(term)


def _apart(logs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The label's, all others' together, and each of the others' among themselves."""
    columns = logs.size(-1)
    label = F.one_hot(labels, columns).bool()
    others = logs[~label].view(-1, columns - 1)
    return logs[label], others.logsumexp(-1), others.log_softmax(-1)


def times(p: Tensor, log: Tensor) -> Tensor:
    """p * log, and 0 where p is."""
    return torch.where(p == 0, 0.0, p * torch.where(p == 0, 0.0, log))


DIVERGENCES = {
    "taid": taid, "todi": todi, "akl": akl, "dist": dist, "alpha_beta": alpha_beta,
}  # fmt: skip
LABEL_AWARE = {"dkd": dkd, "nkd": nkd}
POWER = {"dist": 0}  # of the temperature, where it is not 2
