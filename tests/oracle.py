"""What the losses are by definition: plain PyTorch in fp64, and nothing of fastkd.

Every option of `distillation_loss` and `kl_div`, written from their formulas and differentiated by
autograd. A divergence goes by its name, or by its name and parameters: `("jsd", {"beta": 0.1})`; a
test's own is a function of log p and log q, [N, V], that gives the terms of the sum.

Conventions: 0 times an infinite logarithm is 0. A row with NaN or +inf in it is NaN, with its
gradient. Where a divergence is infinite and so is its gradient to one side, that gradient is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tests import oracle_row_losses as row_losses

STD_EPS = 1e-7  # added to the standard deviation of standardised logits
# Below this distance of log p and log q a term is computed from their difference, which is small.
CLOSE = 1.0


class Metrics(NamedTuple):
    kd: Tensor
    ce: Tensor | None
    student_entropy: Tensor
    teacher_entropy: Tensor
    agreement: Tensor


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    divergence: str | tuple[str, dict[str, float]] | Callable[[Tensor, Tensor], Tensor],
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    scale_by_temperature: bool = True,
    standardize: bool = False,
    alpha: float = 1.0,
    label_smoothing: float = 0.0,
    entropy_weight: float = 0.0,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    vocab_size: int | None = None,
) -> tuple[Tensor, Metrics]:
    """The loss and the metrics of each row, fp64, differentiable."""
    name, parameters = divergence if isinstance(divergence, tuple) else (divergence, {})
    multi_label = name == "bernoulli"
    rows = student.shape[:-1]
    z, y = (x[..., :vocab_size].double().reshape(rows.numel(), -1) for x in (student, teacher))
    t_s = _per_row(temperature, z)
    t_t = t_s if teacher_temperature is None else _per_row(teacher_temperature, z)

    counted = torch.ones(len(z), dtype=torch.bool, device=z.device)
    soft = labels is not None and labels.is_floating_point() and not multi_label
    if labels is not None and not multi_label and not soft:
        labels = labels.flatten().long()
        counted = labels != ignore_index
    weights = counted.double()
    if weight is not None:
        counted = counted & (weight.flatten() != 0)
        weights = torch.where(counted, weight.flatten().double(), 0.0)

    read = counted
    if not multi_label:  # a row of -inf alone is no distribution: it counts, as 0
        read = counted & (z != -math.inf).any(-1) & (y != -math.inf).any(-1)
    z, y = (torch.where(read[:, None], x, 0.0) for x in (z, y))
    broken = z.isnan() | y.isnan()
    if not multi_label:
        broken = broken | (z == math.inf) | (y == math.inf)
    broken = broken.any(-1)

    # The divergence has a graph of its own, where its gradients are looked after.
    infinite = torch.zeros_like(counted)
    scores = _over(z, t_s, standardize), _over(y, t_t, standardize)
    guarded = [_finite_where(score, lambda: infinite) for score in scores]
    log_q, log_p, own_log_q, own_log_p = (
        _log_sigmoids(s) if multi_label else _log_softmax(s) for s in (*guarded, *scores)
    )
    if name in row_losses.LABEL_AWARE:
        parameters = parameters | {"labels": torch.where(read, labels, 0)}
    kd = _divergence(name, log_p, log_q, parameters)
    infinite = kd.detach() == math.inf
    student_entropy, teacher_entropy = _entropy(own_log_q), _entropy(own_log_p)
    if multi_label:
        agreement = ((z > 0) == (y > 0)).double().mean(-1)
        ce = None if labels is None else _binary_cross_entropy(z, labels.reshape(z.shape).double())
    else:
        both = (z == z.amax(-1, keepdim=True)) & (y == y.amax(-1, keepdim=True))
        agreement = both.any(-1).double()
        ce = None
        if soft:
            ce = _soft_cross_entropy(z, labels[..., :vocab_size].reshape(z.shape), label_smoothing)
        elif labels is not None:
            ce = _cross_entropy(z, torch.where(read, labels, 0), label_smoothing)

    loss = torch.zeros_like(kd)
    if alpha > 0:
        scale = torch.ones_like(kd)
        if scale_by_temperature:
            scale = (t_s * t_t) ** (POWER.get(name, 2) / 2)
            scale = torch.where(infinite, scale.detach(), scale)
        loss = loss + alpha * scale * kd
    if alpha < 1:
        loss = loss + (1 - alpha) * ce
    if entropy_weight:
        loss = loss + entropy_weight * student_entropy
    fault = torch.where(broken[:, None], z + y, 0.0).sum(-1)
    loss = loss + fault * torch.where(broken, math.nan, 0.0)
    loss = weights * torch.where(read, loss, 0.0)

    metrics = Metrics(kd, ce, student_entropy, teacher_entropy, agreement)
    shown = [m if m is None else torch.where(read, m, 0.0).detach().view(rows) for m in metrics]
    return _reduced(loss, weights, student, reduction, num_items), Metrics(*shown)


def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    """torch.nn.functional.kl_div, with 0 where the target is."""
    x, t = torch.broadcast_tensors(input.double(), target.double())
    p = t.exp() if log_target else t
    log_p = t if log_target else torch.where(p == 0, 1.0, p).log()
    x, log_p = (torch.where(p == 0, 0.0, log) for log in (x, log_p))
    values = torch.where(p == 0, 0.0, p * (log_p - x))
    if size_average is None and reduce is None:
        averaged, reduced = reduction == "mean", reduction != "none"
    else:
        averaged, reduced = size_average is not False, reduce is not False
    if reduced:
        values = values.mean() if averaged else values.sum()
    if reduction == "batchmean" and input.dim() > 0:
        values = values / input.size(0)
    return values


# --- rows ------------------------------------------------------------------------------------


def _per_row(value: float | Tensor, logits: Tensor) -> Tensor:
    value = torch.as_tensor(value, dtype=torch.float64, device=logits.device)
    return value.flatten() if value.dim() else value.expand(len(logits))


def _over(logits: Tensor, temperature: Tensor, standardize: bool) -> Tensor:
    """Logits, or their z-scores, over the temperature. What is infinite stays, without a say in
    temperature or deviation. A softmax does not see a common shift, but the rounding does.
    """
    finite = logits.isfinite()
    x = torch.where(finite, logits, 0.0)
    width = temperature[:, None]
    if standardize:
        count = finite.sum(-1, keepdim=True)
        x = torch.where(finite, x - x.sum(-1, keepdim=True) / count, 0.0)
        flat = _largest(logits) == -_largest(-logits)
        variance = x.square().sum(-1, keepdim=True) / (count - 1).clamp_min(1)
        std = torch.where(flat, 1.0, variance).sqrt()
        x = torch.where(flat, x * 0, x)
        width = width * (std + STD_EPS)
    return torch.where(finite, x / width, logits / width.detach())


def _largest(logits: Tensor) -> Tensor:
    return torch.where(logits.isfinite(), logits, -math.inf).amax(-1, keepdim=True).detach()


def _log_softmax(s: Tensor) -> Tensor:
    """Relative to the largest, so that a probability near 1 has its logarithm in all digits."""
    first = s.argmax(-1, keepdim=True)
    e = s - s.gather(-1, first)
    others = e.exp().scatter(-1, first, 0.0)
    return e - others.sum(-1, keepdim=True).log1p()


def _log_sigmoids(s: Tensor) -> Tensor:
    """log of yes and no: [N, 2 V]."""
    return torch.cat([F.logsigmoid(s), F.logsigmoid(-s)], -1)


def _finite_where(score: Tensor, rows: Callable[[], Tensor]) -> Tensor:
    """The score; its gradient is made 0 in those of the rows where it is not finite."""
    if not score.requires_grad:
        return score
    score = score.clone()

    def zero(gradient: Tensor) -> Tensor:
        lost = rows() & ~gradient.isfinite().all(-1)
        return torch.where(lost[:, None], 0.0, gradient)

    score.register_hook(zero)
    return score


def _reduced(
    loss: Tensor,
    weights: Tensor,
    student: Tensor,
    reduction: str,
    num_items: float | Tensor | None,
) -> Tensor:
    if reduction == "none":
        return loss.view(student.shape[:-1])
    if reduction == "batchmean":
        return loss.sum() / max(student.size(0), 1)
    if reduction == "mean":
        divisor = torch.as_tensor(weights.sum() if num_items is None else num_items)
        return loss.sum() / torch.where(divisor == 0, 1.0, divisor.double())
    return loss.sum()


# --- what a row is made of -------------------------------------------------------------------


def _entropy(log_p: Tensor) -> Tensor:
    return -_times(log_p.exp(), log_p).sum(-1)


def _cross_entropy(z: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    log_q = _log_softmax(z)
    loss = torch.zeros_like(z[:, 0])
    if smoothing < 1:
        loss = loss - (1 - smoothing) * log_q.gather(-1, labels[:, None])[:, 0]
    if smoothing > 0:
        loss = loss - smoothing * log_q.mean(-1)
    return loss


def _soft_cross_entropy(z: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """With a distribution, of which smoothing spreads a share over all classes."""
    labels = labels.double()
    target = (1 - smoothing) * labels + smoothing * labels.mean(-1, keepdim=True)
    return -_times(target, _log_softmax(z)).sum(-1)


def _binary_cross_entropy(z: Tensor, labels: Tensor) -> Tensor:
    return -(_times(labels, F.logsigmoid(z)) + _times(1 - labels, F.logsigmoid(-z))).sum(-1)


def _times(p: Tensor, log: Tensor) -> Tensor:
    """p * log, and 0 where p is."""
    return torch.where(p == 0, 0.0, p * torch.where(p == 0, 0.0, log))


# --- divergences: from log p and log q of rows, [N, V], to [N] --------------------------------


def _divergence(name: Any, lp: Tensor, lq: Tensor, parameters: dict[str, float]) -> Tensor:
    if callable(name):
        return name(lp, lq, **parameters).sum(-1)
    return DIVERGENCES[name](lp, lq, **parameters)


def forward_kl(lp: Tensor, lq: Tensor) -> Tensor:
    """KL(p || q) = sum p log(p / q)."""
    return _kl(lp, lq, lp - lq)


def reverse_kl(lp: Tensor, lq: Tensor) -> Tensor:
    return forward_kl(lq, lp)


def jeffreys(lp: Tensor, lq: Tensor, forward: float = 1.0, reverse: float = 1.0) -> Tensor:
    value = torch.zeros_like(lp[:, 0])
    if forward:
        value = value + forward * forward_kl(lp, lq)
    if reverse:
        value = value + reverse * reverse_kl(lp, lq)
    return value


def bernoulli(lp: Tensor, lq: Tensor, forward: float = 1.0, reverse: float = 0.0) -> Tensor:
    """Of yes and no of every class."""
    return jeffreys(lp, lq, forward, reverse)


def jsd(lp: Tensor, lq: Tensor, beta: float) -> Tensor:
    return beta * skew_kl(lp, lq, beta) + (1 - beta) * skew_kl(lq, lp, 1 - beta)


def skew_kl(lp: Tensor, lq: Tensor, alpha: float) -> Tensor:
    """KL(p || m) with m = alpha p + (1 - alpha) q."""
    if alpha == 0:
        return forward_kl(lp, lq)
    empty = (lp == -math.inf) & (lq == -math.inf)
    x, y = (torch.where(empty, 0.0, log) for log in (lp, lq))
    lm = torch.logaddexp(x + math.log(alpha), y + math.log1p(-alpha))
    d = x - y
    close = d.abs() < CLOSE
    near = -((1 - alpha) * torch.where(close, -d, 0.0).expm1()).log1p()
    return _kl(lp, torch.where(empty, -math.inf, lm), torch.where(close, near, x - lm))


def skew_reverse_kl(lp: Tensor, lq: Tensor, alpha: float) -> Tensor:
    return skew_kl(lq, lp, alpha)


def tvd(lp: Tensor, lq: Tensor) -> Tensor:
    d = lp - lq
    close = d.abs() < CLOSE
    p, q = lp.exp(), lq.exp()
    return 0.5 * torch.where(close, q * torch.where(close, d, 0.0).expm1(), p - q).abs().sum(-1)


def alpha_divergence(lp: Tensor, lq: Tensor, alpha: float) -> Tensor:
    """(sum p^a q^(1-a) - 1) / (a (a - 1)), each term less a p + (1 - a) q, which sum to 1."""
    a, d = alpha, lp - lq
    close = d.abs() < CLOSE
    near = torch.where(close, d, 0.0)
    near = lq.exp() * (_expm1_less_x(a * near) - a * _expm1_less_x(near))
    far = _log_power(lp, lq, a).exp() - a * lp.exp() - (1 - a) * lq.exp()
    return torch.where(close, near, far).sum(-1) / (a * (a - 1))


def renyi(lp: Tensor, lq: Tensor, alpha: float) -> Tensor:
    """log(sum p^a q^(1-a)) / (a - 1), and where the sum is about 1 from what is left of it."""
    a = alpha
    with torch.no_grad():
        rest = a * (a - 1) * alpha_divergence(lp, lq, a)
        near = rest.abs() < 0.5
    rest = (
        a
        * (a - 1)
        * alpha_divergence(*(torch.where(near[:, None], log, 0.0) for log in (lp, lq)), a)
    )
    return torch.where(near, rest.log1p(), _log_power(lp, lq, a).logsumexp(-1)) / (a - 1)


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jeffreys": jeffreys,
    "jsd": jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "tvd": tvd,
    "alpha": alpha_divergence,
    "renyi": renyi,
    "bernoulli": bernoulli,
    **row_losses.DIVERGENCES,
    **row_losses.LABEL_AWARE,
}
POWER = {"tvd": 1, **row_losses.POWER}  # of the temperature, where it is not 2


def _kl(lp: Tensor, lm: Tensor, log_ratio: Tensor) -> Tensor:
    """sum p log(p / m), each term with m - p, which sums to 0, so that none is negative."""
    close = log_ratio.abs() < CLOSE
    p, m = lp.exp(), lm.exp()
    near = p * _expm1_less_x(-torch.where(close, log_ratio, 0.0))
    return torch.where(close, near, m - p + _times(p, log_ratio)).sum(-1)


def _expm1_less_x(x: Tensor) -> Tensor:
    """e^x - 1 - x, by its series near 0."""
    near = x.abs() < 0.5
    small = torch.where(near, x, 0.0)
    series = torch.ones_like(x)
    for n in range(16, 2, -1):
        series = 1 + small / n * series
    return torch.where(near, small**2 / 2 * series, torch.where(near, 0.0, x).expm1() - x)


def _log_power(lp: Tensor, lq: Tensor, a: float) -> Tensor:
    """log(p^a q^(1-a)); -inf where both are 0."""
    empty = (lp == -math.inf) & (lq == -math.inf)
    lp, lq = (torch.where(empty, 0.0, log) for log in (lp, lq))
    return torch.where(empty, -math.inf, a * lp + (1 - a) * lq)
