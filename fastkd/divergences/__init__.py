"""Table 1: every divergence in PyTorch, as a textbook value and as a fast value with its gradient.

p = teacher and q = student probabilities, lp and lq their logs, d = lp - lq. A divergence is
outer(sum over the vocabulary of value(lp, lq)). Table 2, `kernels/divergences.py`, is the twin for
the device.
"""

from .adaptive import AKL, TAID, ToDi
from .alpha_beta import AlphaBeta
from .base import Divergence
from .bernoulli import Bernoulli
from .correlation import DIST
from .kullback_leibler import ForwardKL, Jeffreys, ReverseKL
from .label_aware import DKD, NKD
from .mixtures import JSD, TVD, SkewKL, SkewReverseKL
from .orders import AlphaDivergence, Renyi

# Row losses of the literature: tested and budgeted by themselves, not benchmarked.
ROW_LOSSES = (AKL, DIST, DKD, NKD, TAID, AlphaBeta, ToDi)
# The others of a softmax that fastkd brings, by name: what is compiled and benchmarked.
# The first is the default.
BUILT_IN = {ForwardKL.name: ForwardKL} | {
    n: kind
    for n, kind in Divergence._classes.items()
    if kind.rows == "logits" and kind not in ROW_LOSSES
}

__all__ = [
    "AKL",
    "BUILT_IN",
    "DIST",
    "DKD",
    "JSD",
    "NKD",
    "ROW_LOSSES",
    "TAID",
    "TVD",
    "AlphaBeta",
    "AlphaDivergence",
    "Bernoulli",
    "Divergence",
    "ForwardKL",
    "Jeffreys",
    "Renyi",
    "ReverseKL",
    "SkewKL",
    "SkewReverseKL",
    "ToDi",
]
