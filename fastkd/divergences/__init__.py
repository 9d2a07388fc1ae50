"""Table 1: every divergence in PyTorch, as a textbook value and as a fast value with its gradient.

p = teacher and q = student probabilities, lp and lq their logs, d = lp - lq. A divergence is
outer(sum over the vocabulary of value(lp, lq)). Table 2, `kernels/divergences.py`, is the twin for
the device.
"""

from .base import LOG_MIXTURE, NONE, REVERSE_KL, SLOPE_SUM, Divergence
from .bernoulli import Bernoulli
from .kullback_leibler import ForwardKL, Jeffreys, ReverseKL
from .mixtures import JSD, TVD, SkewKL, SkewReverseKL
from .orders import AlphaDivergence, Renyi
from .pair import ALIKE, FATHOM, LN2, MASKED, SEARCHED, Pair, Pull, Softmax, plogr, total

# Those of a softmax that fastkd brings, by name: what is compiled, budgeted and benchmarked.
BUILT_IN = {n: kind for n, kind in Divergence._classes.items() if kind.rows == "logits"}

__all__ = [
    "ALIKE",
    "BUILT_IN",
    "FATHOM",
    "JSD",
    "LN2",
    "LOG_MIXTURE",
    "MASKED",
    "NONE",
    "REVERSE_KL",
    "SEARCHED",
    "SLOPE_SUM",
    "TVD",
    "AlphaDivergence",
    "Bernoulli",
    "Divergence",
    "ForwardKL",
    "Jeffreys",
    "Pair",
    "Pull",
    "Renyi",
    "ReverseKL",
    "SkewKL",
    "SkewReverseKL",
    "Softmax",
    "plogr",
    "total",
]
