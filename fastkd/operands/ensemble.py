"""Several teachers of one student."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastkd import checks

from . import checked
from .linear_head import LinearHead
from .listed import Sampled, TopK

COMBINATIONS = ("probs", "logits")


@dataclass(frozen=True, eq=False)
class Ensemble:
    r"""Several teachers of one student, each of them any of the others' kinds.

    probs:  p = sum_m w_m p_m, the mixture: its student gradient is that of sum_m w_m KL(p_m || q).
    logits: p = softmax(sum_m w_m z_m), the geometric mean, as in FedDF: one teacher that is sure
            can veto. The teachers must have logits: tensors or `LinearHead`s.

    Every p_m is at the teachers' temperature, softmax(z_m / T_t), and with `standardize` of the
    z-scores of its own logits; a mean of logits is one teacher, whose temperature and z-scores come
    after the mean, and whose temperature may train. For teachers of different scales divide their
    logits first. The mixture exists for a chunk of rows at a time.

    Weights are divided by their sum. A teacher whose weight in a row is 0 is not read there, so
    one-hot weights by row are a routing. A teacher that masks all of a row has no say in it. There
    is no gradient to teachers or weights.

    Args:
        teachers: one or more, of equal leading shapes, classes last; a `TopK` with the tail
            "renormalize" or "label", since the mass of a bucket lies nowhere in particular.
        weights: one for each teacher, numbers or tensors of the rows' shape; None: equal.
        combine: "probs" or "logits".

    Raises:
        TypeError, ValueError: with what was expected and what came.

    Source: Lin et al. 2020 (FedDF), arXiv 2006.07242.

    Example:
        >>> import torch
        >>> maths, code = torch.randn(2, 4, 100), torch.randn(2, 4, 100)
        >>> is_code = torch.tensor([[0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
        >>> import fastkd
        >>> teacher = Ensemble([maths, code], weights=[1 - is_code, is_code])
        >>> fastkd.distillation_loss(torch.randn(2, 4, 100), teacher, temperature=2.0).shape
        torch.Size([])
    """

    teachers: Sequence[Tensor | LinearHead | TopK | Sampled]
    weights: Sequence[float | Tensor] | None = None
    combine: str = "probs"

    def __post_init__(self) -> None:
        checks.choice("Ensemble: combine", self.combine, COMBINATIONS)
        checks.several("Ensemble: teachers", self.teachers)
        if isinstance(self.teachers, Tensor) or not len(self.teachers):
            raise TypeError("Ensemble: teachers must be a list of one or more teachers")
        dense = (Tensor, LinearHead)
        for teacher in self.teachers:
            if not isinstance(teacher, (*dense, TopK, Sampled)):
                raise TypeError(
                    "Ensemble: teachers must be logits, LinearHead, TopK or Sampled, got "
                    f"{type(teacher).__name__}"
                )
            if isinstance(teacher, Tensor):
                checked.floating("Ensemble: a teacher", teacher)
                if not teacher.dim():
                    raise ValueError("Ensemble: a teacher must have shape [..., V], got ()")
            if self.combine == "logits" and not isinstance(teacher, dense):
                raise ValueError(
                    f"Ensemble: combine='logits' needs logits of every teacher, and a "
                    f"{type(teacher).__name__} has none: pass combine='probs'"
                )
        for teacher in self.teachers:
            if teacher.shape[:-1] != self.rows:
                raise ValueError(
                    "Ensemble: teachers must have equal leading shapes, got "
                    f"{tuple(self.rows)} and {tuple(teacher.shape[:-1])}"
                )
        if self.weights is not None:
            self._check_weights(self.weights)

    def _check_weights(self, weights: Sequence[float | Tensor]) -> None:
        checks.several("Ensemble: weights", weights)
        if len(weights) != len(self.teachers):
            raise ValueError(
                f"Ensemble: weights must be one for each of {len(self.teachers)} teachers, got "
                f"{len(weights)}"
            )
        total: Any = 0.0
        for weight in weights:
            if isinstance(weight, Tensor):
                checked.floating("Ensemble: a weight", weight)
                if weight.dim() and weight.shape != self.rows:
                    raise ValueError(
                        f"Ensemble: a weight must be a number or one for each row, "
                        f"{tuple(self.rows)}, got {tuple(weight.shape)}"
                    )
                right = (weight >= 0) & (weight < math.inf)
                wrong = checks.may_read(weight) and not right.all()
                total = total + weight.detach() if checks.may_read(weight) else math.inf
            else:
                weight = checks.finite("Ensemble: a weight", weight)
                wrong = weight < 0
                total = total + weight
            if wrong:
                found = weight[~right][0].item() if isinstance(weight, Tensor) else weight
                raise ValueError(f"Ensemble: weights must be finite and >= 0, got {found}")
        if not (total > 0 if isinstance(total, float) else bool((total > 0).all())):
            raise ValueError("Ensemble: weights must not all be 0, in any row")

    @property
    def rows(self) -> torch.Size:
        """The leading shape of all teachers."""
        return self.teachers[0].shape[:-1]
