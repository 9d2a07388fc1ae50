"""fastkd: knowledge-distillation losses over large vocabularies, fused."""

from . import cross_tokenizer as cross_tokenizer
from . import sharding as sharding
from . import temperature as temperature
from .cache import TeacherCache
from .divergences import (
    AKL,
    DIST,
    DKD,
    JSD,
    NKD,
    TAID,
    TVD,
    AlphaBeta,
    AlphaDivergence,
    Bernoulli,
    Divergence,
    ForwardKL,
    Jeffreys,
    Renyi,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    ToDi,
)
from .elementwise import kl_div
from .functional import Metrics, distillation_loss
from .modules import DistillationLoss, KLDivLoss
from .operands import Ensemble, LinearHead, Sampled, TopK

__version__ = "0.1.0"

__all__ = [
    "AKL",
    "DIST",
    "DKD",
    "JSD",
    "NKD",
    "TAID",
    "TVD",
    "AlphaBeta",
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
    "ToDi",
    "TopK",
    "distillation_loss",
    "kl_div",
]
