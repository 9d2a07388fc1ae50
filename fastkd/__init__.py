"""fastkd: knowledge-distillation losses over large vocabularies, fused."""

from .divergences import (
    JSD,
    TVD,
    AlphaDivergence,
    Divergence,
    ForwardKL,
    Jeffreys,
    Renyi,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
)
from .functional import Metrics, distillation_loss
from .modules import DistillationLoss

__version__ = "0.1.0"

__all__ = [
    "JSD",
    "TVD",
    "AlphaDivergence",
    "DistillationLoss",
    "Divergence",
    "ForwardKL",
    "Jeffreys",
    "Metrics",
    "Renyi",
    "ReverseKL",
    "SkewKL",
    "SkewReverseKL",
    "distillation_loss",
]
