"""The gate: no figure for an answer that is wrong, remembered, or not there when the clock stops.

The inputs are changed in place before every call, timed ones included, between two states whose
answers are both known. What a call returned is compared with the answer to the state it saw.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .cases import Case
from .operators import Operands, Operator
from .providers import Loss
from .truth import UPSTREAM, Errors, Truth, leaves, relative, truth_of


class Refused(Exception):
    """The answer is wrong, or was not computed when it was asked for."""


class Answer(NamedTuple):
    loss: Tensor
    gradients: tuple[Tensor, ...]  # one per leaf; none where only the loss was asked for


# --- inputs and those who answer --------------------------------------------------------------


class Problem:
    """Operands in one of two states, and the answers to both."""

    def __init__(
        self,
        operator: Operator,
        case: Case,
        divergence: str,
        dtype: torch.dtype,
        device: torch.device,
        temperature: float,
    ) -> None:
        def draw() -> Operands:
            generator = torch.Generator(device).manual_seed(0)
            return operator.operands(case, divergence, dtype, generator)

        self._draw = draw
        self.operator = operator
        self.options = operator.options(divergence, temperature)
        self.operands = draw()
        self.leaves = leaves(self.operands)
        self.upstream = UPSTREAM.get(dtype)
        self.device = device
        self.state = 0
        self._truths: list[Truth] = []
        for _ in range(2):
            self._truths.append(truth_of(operator, self.operands, self.options))
            self.change()

    @property
    def truth(self) -> Truth:
        """The answer to the operands as they are now."""
        return self._truths[self.state]

    def fingerprint(self) -> list[float]:
        """Other numbers where a call has written over its operands."""
        return [x.detach().sum(dtype=torch.float64).item() for x in self.operands if x is not None]

    def restore(self) -> None:
        """Draws the operands anew."""
        with torch.no_grad():
            for x, fresh in zip(self.operands, self._draw(), strict=True):
                if x is not None and fresh is not None:
                    x.copy_(fresh)
        if self.state == 1:
            self.state = 0
            self.change()

    def change(self) -> None:
        with torch.no_grad():
            self.operator.change(self.operands)
        self.state = 1 - self.state


class Contender:
    """A provider bound to a problem."""

    def __init__(self, name: str, loss: Loss, problem: Problem) -> None:
        self.name, self.problem, self._loss = name, problem, loss

    def prepare(self, part: str) -> Tensor | None:
        """What a backward needs beforehand, untimed."""
        return self.loss() if part == "backward" else None

    def answer(self, part: str, prepared: Tensor | None = None) -> Answer:
        """One pass: the loss alone, the gradient of a loss that is there, or both."""
        if part == "forward":
            with torch.no_grad():
                return Answer(self.loss(), ())
        loss = self.loss() if prepared is None else prepared
        scale = self.problem.upstream
        upstream = None if scale is None else torch.full_like(loss, scale)
        gradients = torch.autograd.grad(loss, self.problem.leaves, upstream)
        return Answer(loss, tuple(_plain(g, "gradient") for g in gradients))

    def loss(self) -> Tensor:
        return _plain(self._loss(*self.problem.operands), "loss")


def _plain(tensor: Tensor, what: str) -> Tensor:
    if type(tensor) is not Tensor:
        raise Refused(
            f"refused: its {what} is a {type(tensor).__name__}, not a plain tensor: "
            "work may be put off until it is read"
        )
    return tensor


# --- verdicts --------------------------------------------------------------------------------


class Sample(NamedTuple):
    """What every timed call is judged by: read before the clock stops."""

    truth: Truth
    loss: Tensor
    entries: tuple[Tensor, ...]


def touch(answer: Answer, problem: Problem) -> Sample:
    truth = problem.truth
    pairs = zip(answer.gradients, truth.positions, strict=bool(answer.gradients))
    return Sample(truth, answer.loss.detach().clone(), tuple(g.take(at) for g, at in pairs))


def verify(sample: Sample, problem: Problem) -> None:
    """Raises where a timed call had not got its answer right."""
    truth, scale = sample.truth, problem.upstream or 1.0
    pairs = list(zip(sample.entries, truth.sample, strict=bool(sample.entries)))
    errors = Errors(
        abs(sample.loss.item() - truth.loss) / abs(truth.loss),
        max((relative(entries / scale, right) for entries, right in pairs), default=0.0),
    )
    if not _passes(errors, Errors(*(2 * allowed for allowed in truth.allowed))):
        raise Refused(
            f"refused: a timed call had loss off by {errors.loss:.1e} and gradient by "
            f"{errors.gradient:.1e} when the clock stopped: work put off, or an old answer"
        )


def gate(contender: Contender, synchronize: Callable[[], None]) -> Errors:
    """The errors of two calls, the inputs changed in between; Refused where they are too large."""
    problem, worst, last = contender.problem, Errors(0.0, 0.0), None
    for _ in range(2):
        problem.change()
        before = problem.fingerprint()
        try:
            answer = contender.answer("full")
            synchronize()
        finally:
            if overwritten := problem.fingerprint() != before:
                problem.restore()
        if overwritten:
            raise Refused("refused: it wrote over its inputs")
        errors = _judge(answer, problem, last)
        worst = Errors(*map(max, zip(worst, errors, strict=True)))
        last = Answer(answer.loss.detach().clone(), ())
    return worst


def _judge(answer: Answer, problem: Problem, last: Answer | None) -> Errors:
    truth, scale = problem.truth, problem.upstream or 1.0
    if answer.loss.dim():
        raise Refused(f"refused: its loss has shape {tuple(answer.loss.shape)}, expected a number")
    for gradient, leaf in zip(answer.gradients, problem.leaves, strict=True):
        if gradient.shape != leaf.shape or gradient.dtype != leaf.dtype:
            raise Refused(
                f"refused: its gradient is {gradient.dtype} {tuple(gradient.shape)}, "
                f"expected {leaf.dtype} {tuple(leaf.shape)}"
            )
        if not gradient.sum(dtype=torch.float32).isfinite():
            raise Refused("refused: its gradient is not finite everywhere")
    got = [gradient[truth.rows].double() / scale for gradient in answer.gradients]
    errors = Errors(
        abs(answer.loss.item() - truth.loss) / abs(truth.loss),
        max(relative(g, t) for g, t in zip(got, truth.gradients, strict=True)),
    )
    if _passes(errors, truth.allowed):
        return errors
    reason = ""
    if last is not None and torch.equal(answer.loss, last.loss):
        reason = ": the inputs changed and the loss did not: an old answer"
    elif not any(bool(g.any()) for g in got):
        reason = ": the gradient is all zeros"
    raise WrongAnswer(errors, truth.allowed, reason)


class WrongAnswer(Refused):
    """Refused, with the errors to print in place of a time."""

    def __init__(self, errors: Errors, allowed: Errors, reason: str) -> None:
        self.errors = errors
        off = [
            f"{what} off by {error:.1e} (allowed {limit:.1e})"
            for what, error, limit in zip(Errors._fields, errors, allowed, strict=True)
            if not error <= limit
        ]
        super().__init__(f"refused: {', '.join(off)}{reason}")


def _passes(errors: Errors, allowed: Errors) -> bool:
    return all(error <= limit for error, limit in zip(errors, allowed, strict=True))
