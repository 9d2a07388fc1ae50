"""Temperatures that change: with the step, from row to row, or by learning.

    schedules            schedule(step) -> float: Constant, Linear, Cosine, Exponential, TwoStage
    adaptive             rule(student, teacher) -> a temperature per row for each: dtkd, by_entropy
    LearnableTemperature a module: the temperature, or one per row, is trained
    ttm                  the settings that give the teacher alone a temperature

High temperatures show how the teacher ranks the wrong answers, low ones which answer it gives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import checks
from .divergences.pair import plogr

# --- schedules -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """A temperature for each step: schedule(step) -> float, for any step >= 0."""

    def __call__(self, step: int) -> float:
        raise NotImplementedError


@dataclass(frozen=True)
class Constant(Schedule):
    """The same temperature at every step.

    Example:
        >>> Constant(4.0)(1000)
        4.0
    """

    value: float

    def __post_init__(self) -> None:
        _positive("Constant", "value", self.value)

    def __call__(self, step: int) -> float:
        return float(self.value)


@dataclass(frozen=True)
class Annealing(Schedule):
    """From start to end within `steps` steps, then end; both > 0, either the higher."""

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        kind = type(self).__name__
        _positive(kind, "start", self.start)
        _positive(kind, "end", self.end)
        checks.at_least(f"{kind}: steps", self.steps)

    def _progress(self, step: int) -> float:
        return min(max(step / self.steps, 0.0), 1.0)


@dataclass(frozen=True)
class Linear(Annealing):
    """Annealing in equal differences: start + (end - start) * step / steps.

    Source: Jafari et al. 2021 (Annealing-KD), arXiv 2104.07163, anneal linearly.

    Example:
        >>> [Linear(8.0, 1.0, steps=4)(step) for step in (0, 2, 4, 9)]
        [8.0, 4.5, 1.0, 1.0]
    """

    def __call__(self, step: int) -> float:
        x = self._progress(step)
        return (1 - x) * self.start + x * self.end


@dataclass(frozen=True)
class Cosine(Annealing):
    """Annealing along half a cosine: start has the weight (1 + cos(pi * step / steps)) / 2.

    Source: Loshchilov & Hutter 2016, arXiv 1608.03983, for learning rates.

    Example:
        >>> [Cosine(8.0, 1.0, steps=4)(step) for step in (0, 2, 4, 9)]
        [8.0, 4.5, 1.0, 1.0]
    """

    def __call__(self, step: int) -> float:
        x = (1 - math.cos(math.pi * self._progress(step))) / 2
        return (1 - x) * self.start + x * self.end


@dataclass(frozen=True)
class Exponential(Annealing):
    """Annealing in equal ratios: start * (end / start) ** (step / steps).

    Example:
        >>> [round(Exponential(8.0, 0.5, steps=4)(step), 6) for step in (0, 2, 4, 9)]
        [8.0, 2.0, 0.5, 0.5]
    """

    def __call__(self, step: int) -> float:
        x = self._progress(step)
        return self.start ** (1 - x) * self.end**x


@dataclass(frozen=True)
class TwoStage(Schedule):
    """`first` for the first `steps` steps, `second` from then on; both > 0.

    Example:
        >>> [TwoStage(8.0, 1.0, steps=100)(step) for step in (0, 99, 100)]
        [8.0, 8.0, 1.0]
    """

    first: float
    second: float
    steps: int

    def __post_init__(self) -> None:
        _positive("TwoStage", "first", self.first)
        _positive("TwoStage", "second", self.second)
        checks.at_least("TwoStage: steps", self.steps)

    def __call__(self, step: int) -> float:
        return float(self.first if step < self.steps else self.second)


# --- adaptive: from the logits to a temperature per row --------------------------------------


class RowTemperatures(NamedTuple):
    """A temperature per row, [...], for each side."""

    student: Tensor
    teacher: Tensor


def dtkd(
    student: Tensor, teacher: Tensor, temperature: float = 4.0, sharpness: str = "max"
) -> RowTemperatures:
    r"""Dynamic temperatures: the sharper of two rows gets the higher one.

    With m_s and m_t the sharpness of the two rows,

        T_s = 2 m_s / (m_s + m_t) * temperature,    T_t = 2 m_t / (m_s + m_t) * temperature,

    so that both are equally sharp after division, and their temperatures average `temperature`.
    A student near 0, as at the start, gets T_s near 0, where the loss is unstable by "max": the
    authors train on labels first, and keep Hinton's loss beside this one.

    Args:
        student, teacher: logits [..., V].
        temperature: the average of T_s and T_t, > 0.
        sharpness: "max", the largest logit, as in the authors' code; or "logsumexp", as in their
            paper. Both shift with the logits, and must be positive: subtract the mean of each row
            from logits that may be lower.

    Returns:
        RowTemperatures, [...] each, in fp32 (fp64 for fp64 logits), differentiable, as the authors
        have it. Pass `student.detach()` for temperatures that are constants, which is cheaper.

    Raises:
        ValueError: a row's sharpness is not positive. On a GPU its temperatures are NaN instead.

    Source: Wei & Bai 2024, arXiv 2404.12711.

    Example:
        >>> import torch, fastkd
        >>> student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 0.0]])
        >>> rows = dtkd(student, teacher, temperature=4.0)
        >>> rows.student.item(), rows.teacher.item()
        (2.0, 6.0)
        >>> loss = fastkd.distillation_loss(
        ...     student, teacher, temperature=rows.student, teacher_temperature=rows.teacher)
    """
    checks.logits(student, teacher, None)
    temperature = _positive("dtkd", "temperature", temperature)
    checks.choice("sharpness", sharpness, ("max", "logsumexp"))
    measure = torch.amax if sharpness == "max" else torch.logsumexp
    m_s, m_t = measure(_wide(student), -1), measure(_wide(teacher), -1)
    for name, m in (("student", m_s), ("teacher", m_t)):
        if checks.may_read(m) and not (m > 0).all():
            raise ValueError(
                f"dtkd: each row of {name} needs a positive {sharpness}, got {m.min().item():.4g}: "
                f"subtract the mean of each row, {name} - {name}.mean(-1, keepdim=True)"
            )
    valid = (m_s > 0) & (m_t > 0)
    share = torch.where(valid, 2 * temperature / (m_s + m_t), math.nan)
    return RowTemperatures(m_s * share, m_t * share)


def by_entropy(
    student: Tensor, teacher: Tensor, low: float = 1.0, high: float = 8.0, of: str = "teacher"
) -> RowTemperatures:
    r"""Temperatures by certainty: `high` for rows that are certain, `low` for rows that are not.

    With H the entropy of the row's softmax at temperature 1, both sides get

        T = high - (high - low) * H / log V.

    A row that is certain hides how it ranks the wrong answers: a high temperature shows it.

    Args:
        student, teacher: logits [..., V].
        low, high: T where the row is uniform and where it is certain, > 0, in either order.
        of: whose entropy counts, "teacher" or "student".

    Returns:
        RowTemperatures, the same tensor twice; else as from `dtkd`.

    Raises:
        ValueError, TypeError: logits that do not go together, `low` or `high` that is no finite
            temperature > 0, an unknown `of`.

    Source: the direction, low for hard rows and high for easy ones, is that of Xie et al. 2025
    (AdaKD), arXiv 2510.11615, who measure difficulty by a Hellinger distance; the rule is simpler.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[0.0, 0.0], [100.0, 0.0]])
        >>> by_entropy(logits, logits, low=1.0, high=8.0).student
        tensor([1., 8.])
    """
    checks.logits(student, teacher, None)
    low, high = (_positive("by_entropy", *one) for one in (("low", low), ("high", high)))
    checks.choice("of", of, ("teacher", "student"))
    log_p = _wide(teacher if of == "teacher" else student).log_softmax(-1)
    entropy = -plogr(log_p, log_p).sum(-1)
    rows = high - (high - low) * entropy / math.log(max(log_p.size(-1), 2))
    return RowTemperatures(rows, rows)


# --- learned ---------------------------------------------------------------------------------


class LearnableTemperature(nn.Module):
    r"""A trained temperature, low + (high - low) * sigmoid(theta), with its gradient reversed.

    theta ascends the loss that the student descends: the task gets harder as the student learns.
    Its gradient is multiplied by -lambda, where lambda rises from 0 to 1 along half a cosine within
    `ramp` steps. Give its parameters to the optimizer together with the student's. (For a
    temperature that descends the loss, pass a parameter of your own as `temperature`.)

    Args:
        low, high: the range, 0 < low < high. The authors' is (1, 21).
        initial: the temperature to start from, between the two.
        ramp: steps until the gradient is reversed in full; 0 for at once.
        classes: None for one temperature; V for one per row, which a small network adds to theta
            from both rows' probabilities. Its first layer is [64, 2V]: made for classifiers.

    Source: Li et al. 2022 (CTKD), arXiv 2211.16231.

    Example:
        >>> import torch, fastkd
        >>> temperature = LearnableTemperature(initial=4.0, ramp=100)
        >>> student, teacher = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
        >>> loss = fastkd.distillation_loss(student, teacher, temperature=temperature(step=50))
        >>> loss.backward()
    """

    def __init__(
        self,
        low: float = 1.0,
        high: float = 21.0,
        initial: float = 4.0,
        ramp: int = 0,
        classes: int | None = None,
    ) -> None:
        super().__init__()
        kind = "LearnableTemperature"
        low = _positive(kind, "low", low)
        initial, high = (
            checks.number(f"{kind}: {name}", x)
            for name, x in (("initial", initial), ("high", high))
        )
        if not low < initial < high < math.inf:
            raise ValueError(
                f"{kind}: expected low < initial < high < inf, got low={low!r}, "
                f"initial={initial!r}, high={high!r}: widen the range, or move initial into it"
            )
        checks.at_least(f"{kind}: ramp", ramp, 0)
        self.low, self.high, self.ramp, self.classes = low, high, ramp, classes
        self.theta = nn.Parameter(torch.tensor(math.log((initial - low) / (high - initial))))
        self.net: nn.Module | None = None
        if classes is not None:
            checks.at_least(f"{kind}: classes", classes)
            self.net = nn.Sequential(nn.Linear(2 * classes, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(
        self, step: int, student: Tensor | None = None, teacher: Tensor | None = None
    ) -> Tensor:
        """The temperature: 0-d, or with `classes` one per row of the logits, [...], in fp32.

        The logits are detached: the student gets its gradient from the loss alone.
        """
        theta = self.theta
        if self.net is not None:
            if student is None or teacher is None:
                raise TypeError(
                    "LearnableTemperature with `classes` gives a temperature per row: call it with "
                    "(step, student, teacher), the logits"
                )
            columns = checks.logits(student, teacher, None)
            if columns != self.classes:
                raise ValueError(
                    f"LearnableTemperature has classes={self.classes}, and the logits have "
                    f"{columns} columns: make it anew"
                )
            rows = [_wide(logits.detach()).softmax(-1) for logits in (teacher, student)]
            theta = theta + self.net(torch.cat(rows, -1).to(theta.dtype)).squeeze(-1)
        temperature = self.low + (self.high - self.low) * torch.sigmoid(theta)
        ramp = min(max(step, 0) / self.ramp, 1.0) if self.ramp else 1.0
        reversal = -(1 - math.cos(math.pi * ramp)) / 2
        constant = temperature.detach()
        return constant + reversal * (temperature - constant)

    def extra_repr(self) -> str:
        return f"low={self.low}, high={self.high}, ramp={self.ramp}"


# --- settings -------------------------------------------------------------------------------


def ttm(temperature: float = 4.0) -> dict[str, Any]:
    r"""Transformed teacher matching: the settings that give the teacher alone a temperature.

    KL(softmax(teacher / T) || softmax(student)), without T^2, as keyword arguments of
    `distillation_loss` and `DistillationLoss`. The student learns to be as soft as the teacher was
    made: what is often a slip is a method too.

    Args:
        temperature: the teacher's, T > 0; the authors' gamma is 1 / T.

    Raises:
        ValueError, TypeError: a temperature that is no finite number > 0.

    Source: Zheng & Yang 2024, arXiv 2402.11148.

    Example:
        >>> import torch, fastkd
        >>> loss = fastkd.distillation_loss(torch.randn(4, 10), torch.randn(4, 10), **ttm(4.0))
    """
    _positive("ttm", "temperature", temperature)
    return {
        "temperature": 1.0,
        "teacher_temperature": float(temperature),
        "scale_by_temperature": False,
    }


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _positive(owner: str, name: str, value: Any) -> Any:
    value = checks.number(f"{owner}: {name}", value)
    if not 0 < value < math.inf:
        raise ValueError(f"{owner}: {name} must be a finite temperature > 0, got {value!r}")
    return value
