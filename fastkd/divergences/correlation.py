"""Distance by correlation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastkd.scalars import own_numbers

from .base import Divergence
from .pair import total


@dataclass(frozen=True)
class DIST(Divergence):
    r"""Correlation distance of a row: beta (1 - rho(p, q)), with Pearson's rho; in [0, 2 beta].

    The relation between the classes of one row; the source has a like term over the rows of a batch
    for each class, which is not here. Where one side is uniform rho is 0, without a gradient. As
    the gradient does not fall with the temperature, scale_by_temperature leaves it as it is.

    Args:
        beta: weight > 0, finite.

    Source: Huang et al. 2022, arXiv 2205.10536.

    Example:
        >>> import torch, fastkd
        >>> z, y = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.0, 2.0]])
        >>> round(fastkd.distillation_loss(z, y, divergence=fastkd.DIST()).item(), 4)
        1.8671
    """

    beta: float = 1.0

    name = "dist"
    temperature_power = 0
    over_events = False
    has_device_function = False

    def __post_init__(self):
        own_numbers(self)
        if not 0 < self.beta < math.inf:
            raise ValueError(f"DIST: beta must be a finite weight > 0, got {self.beta!r}")

    @classmethod
    def of_rows(cls, lp, lq, a, b, labels=None):
        (p, p_flat), (q, q_flat) = _direction(lp.exp()), _direction(lq.exp())
        # 1 - rho as half the square of a difference, which keeps its digits where rho is 1.
        value = 0.5 * (p - q).square().sum(-1)
        return a * torch.where(p_flat == q_flat, value, 1.0)


def _direction(p: Tensor) -> tuple[Tensor, Tensor]:
    """p less its mean, of length 1, or 0 where it is flat; and where it is, bool [R]."""
    centred = p - p.mean(-1, keepdim=True)
    size = centred.detach().abs().amax(-1, keepdim=True)
    flat = size <= torch.finfo(p.dtype).eps * p.detach().amax(-1, keepdim=True)
    centred = torch.where(flat, 0.0, centred)
    length = torch.where(flat, 1.0, total(centred.square())).sqrt()
    return centred / length, flat[:, 0]
