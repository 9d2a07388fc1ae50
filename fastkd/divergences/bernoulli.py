"""The divergence of multi-label heads."""

from __future__ import annotations

from dataclasses import dataclass

from .kullback_leibler import Jeffreys


@dataclass(frozen=True)
class Bernoulli(Jeffreys):
    r"""Kullback-Leibler divergence of multi-label heads, whose classes have a sigmoid each.

    With p = sigmoid(teacher / T_t), q = sigmoid(student / T_s) for each of the V classes and
    KL(p || q) = p log(p / q) + (1 - p) log((1 - p) / (1 - q)), the divergence of a row is

        sum over the classes of forward * KL(p || q) + reverse * KL(q || p).

    `distillation_loss` then takes multi-hot labels [..., V] in [0, 1], its cross-entropy is the
    sum over classes of F.binary_cross_entropy_with_logits, its entropies are the sums of those of
    the classes, and the metric `agreement` is the share of classes on the same side of 1/2. A
    logit of -inf or +inf is a certain no or yes. Rows are left out by `weight`. There is no
    `standardize`, which a sigmoid would not forgive, and no `label_smoothing`: smooth the labels.

    Args:
        forward: weight >= 0 of KL(p || q).
        reverse: weight >= 0 of KL(q || p); not both 0.

    Source: Yang et al. 2023 (multi-label logit distillation), arXiv 2308.06453, decompose the
    multi-label loss in this way.

    Example:
        >>> import torch, fastkd
        >>> student, teacher = torch.randn(8, 20, requires_grad=True), torch.randn(8, 20)
        >>> labels = torch.randint(2, (8, 20))
        >>> loss = fastkd.distillation_loss(
        ...     student, teacher, labels, divergence=fastkd.Bernoulli(), alpha=0.5)
        >>> loss.backward()
    """

    forward: float = 1.0
    reverse: float = 0.0

    name = "bernoulli"
    by_name = False
    rows = "bernoulli"
