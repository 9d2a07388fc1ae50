"""What the eager path and the kernels are asked to compute: one type, three functions each.

`eager.py` and `kernels/logits.py` both offer

    forward(problem, entropy, metrics)            -> values, state
    backward(problem, state, upstream, gradient, temperature) -> gradient | None, temperature rows
    fused(problem, coefficients, metrics, out)    -> loss rows, values | None, gradient

with the layouts below, so that `autograd.py` does not know which of them it calls.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Rows of `values`, fp32 [1, N], [3, N] where ce or entropy is wanted, [5, N] with metrics.
KD, CE, ENTROPY, TEACHER_ENTROPY, AGREEMENT = range(5)

# Rows of `state`, fp32 [5, N], [7, N] where ce or entropy is wanted, [9, N] where the logits are
# standardised: the last two are -T times the derivatives of kd and entropy to T. max is of the raw
# logits, sum is of exp((logit - max) / T), constant is c of table 1, unit_sum the sum at T = 1.
STUDENT_MAX, STUDENT_SUM, TEACHER_MAX, TEACHER_SUM, CONSTANT, STUDENT_ENTROPY, UNIT_SUM = range(7)

# Rows of `moments`, of the n finite entries of a row: their mean; the width std + eps, by which the
# temperatures of the Problem are already multiplied; the pull 1 / ((n - 1) std width), by which
# the gradient that goes through the width is pull * (logit - mean) times dD/dT * -T.
MEAN, WIDTH, PULL = range(3)


class Coefficients(NamedTuple):
    """Per-row factors of the three terms, fp32 [N], of any stride; None: the term is absent.

    As upstream gradients of a backward, or as the weights of the terms in a fused loss.
    """

    kd: Tensor
    ce: Tensor | None
    entropy: Tensor | None

    def kinds(self, metrics: bool) -> int:
        """The rows of `values` that are needed."""
        return 5 if metrics else 1 if self.ce is None and self.entropy is None else 3

    def weigh(self, values: Tensor) -> Tensor:
        """The weighted loss rows: a term whose factor is 0 is left out, were it infinite."""
        loss = torch.zeros_like(values[KD])
        for kind, factor in enumerate(self):
            if factor is not None:
                loss += torch.where(factor == 0, 0.0, factor * values[kind])
        return loss


class Problem(NamedTuple):
    """A batch of N = O * I rows; logits keep their strides, [O, I, V] with last stride 1."""

    student: Tensor  # [O, I, >= V]
    teacher: Tensor  # [O, I, >= V]
    student_temperature: Tensor  # [N], of any stride
    teacher_temperature: Tensor | None  # [N]; None: the student's
    labels: Tensor | None  # [N], integer; None: no cross-entropy
    counted: Tensor | None  # [N], bool: the rows that count; None: all
    label_smoothing: float
    divergence: str  # a name of table 1
    a: float
    b: float
    vocab_size: int  # V: columns from here on are padding
    moments: Tensor | None = None  # [2, 3, N], student's and teacher's; None: not standardised

    @property
    def rows(self) -> int:
        """N."""
        return self.student.size(0) * self.student.size(1)

    @property
    def dtype(self) -> torch.dtype:
        """Of the arithmetic and of everything per row: fp32, or fp64 for fp64 logits."""
        return self.student_temperature.dtype
