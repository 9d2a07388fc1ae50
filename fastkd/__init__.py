"""fastkd: knowledge-distillation losses over large vocabularies, fused."""

from .cache import TeacherCache
from .divergences import (
    JSD,
    TVD,
    AlphaDivergence,
    Bernoulli,
    Divergence,
    ForwardKL,
    Jeffreys,
    Renyi,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
)
from .elementwise import kl_div
from .functional import Metrics, distillation_loss
from .modules import DistillationLoss, KLDivLoss
from .operands import Ensemble, LinearHead, Sampled, TopK

__version__ = "0.1.0"

__all__ = [
    "JSD",
    "TVD",
    "AlphaDivergence",
    "Bernoulli",
    "DistillationLoss",
    "Divergence",
    "Ensemble",
    "ForwardKL",
    "Jeffreys",
    "KLDivLoss",
    "LinearHead",
    "Metrics",
    "Renyi",
    "ReverseKL",
    "Sampled",
    "SkewKL",
    "SkewReverseKL",
    "TeacherCache",
    "TopK",
    "distillation_loss",
    "kl_div",
]
