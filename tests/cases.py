"""Divergences with their parameters, and inputs, for every test that runs over them."""

from __future__ import annotations

import torch
from torch import Tensor

import fastkd

DIVERGENCES = [
    fastkd.ForwardKL(),
    fastkd.ReverseKL(),
    fastkd.Jeffreys(),
    fastkd.Jeffreys(forward=0.3, reverse=1.2),
    fastkd.JSD(beta=0.1),
    fastkd.JSD(beta=0.5),
    fastkd.JSD(beta=0.9),
    fastkd.SkewKL(alpha=0.0),
    fastkd.SkewKL(alpha=0.1),
    fastkd.SkewReverseKL(alpha=0.0),
    fastkd.SkewReverseKL(alpha=0.1),
    fastkd.TVD(),
    fastkd.AlphaDivergence(alpha=-0.5),
    fastkd.AlphaDivergence(alpha=0.5),
    fastkd.AlphaDivergence(alpha=2.0),
    fastkd.Renyi(alpha=0.5),
    fastkd.Renyi(alpha=2.0),
]
# Row losses, for tests of their own: the grids of those above are large.
ROW_LOSSES = [
    fastkd.DKD(alpha=1.0, beta=8.0),
    fastkd.NKD(gamma=1.5),
    fastkd.TAID(t=0.4),
    fastkd.TAID(t=1.0),
    fastkd.AlphaBeta(alpha=0.2, beta=0.7),
    fastkd.AlphaBeta(alpha=0.8, beta=-0.3),
    fastkd.AlphaBeta(alpha=0.0, beta=0.6),
    fastkd.AKL(mu=0.5),
    fastkd.ToDi(),
    fastkd.DIST(beta=2.0),
]
# One of each class, for paths where a case is dear, as Triton's interpreter.
KINDS = list({type(divergence): divergence for divergence in DIVERGENCES}.values())
# Those that masks cannot make infinite.
BOUNDED = [
    d
    for d in DIVERGENCES
    if isinstance(d, (fastkd.JSD, fastkd.TVD)) or (getattr(d, "alpha", 0) == 0.1)
]


def logits(*shape: int, noise: float = 1.0, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    """Student and teacher in fp64, the student off by `noise`."""
    teacher = torch.randn(*shape, dtype=torch.float64) * scale
    return teacher + noise * torch.randn(*shape, dtype=torch.float64), teacher
