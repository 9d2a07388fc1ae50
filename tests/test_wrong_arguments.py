"""Arguments of a wrong kind: fastkd itself says what was expected, in one line, for every one."""

from __future__ import annotations

import math
import traceback
from pathlib import Path

import numpy
import pytest
import torch

import fastkd
from fastkd import LinearHead, Sampled, TopK, cross_tokenizer, temperature

ROOT = str(Path(fastkd.__file__).parent)
# What no argument may be.
NEVER = {
    "an object": object(),
    "text": "meen",
    "a dictionary": {"": 0},
    "a complex number": 1j,
    "a number beyond 64 bits": 10**400,
    "an array": numpy.ones(3),
    "a complex tensor": torch.ones(4, 6, dtype=torch.complex64),
    "a tensor of 8 bits": torch.ones(4, 6).to(torch.float8_e4m3fn),
    "a sparse tensor": torch.eye(4, 6).to_sparse(),
}
STUDENT, TEACHER, LABELS = torch.randn(4, 6), torch.randn(4, 6), torch.tensor([0, 5, 2, 3])
IDS, LOG_PROBS = torch.tensor([[0, 1]] * 4), torch.full((4, 2), -1.0)
HIDDEN, WEIGHT = torch.randn(4, 3), torch.randn(6, 3)
Q, P = STUDENT.log_softmax(-1), TEACHER.log_softmax(-1)
SHARED = torch.tensor([[0, 1], [2, 2]])
SETTINGS = (
    "divergence", "temperature", "teacher_temperature", "scale_by_temperature", "standardize",
    "alpha", "label_smoothing", "entropy_weight", "ignore_index", "weight", "reduction",
    "num_items", "vocab_size", "teacher_grad", "gradient", "inplace", "backend", "return_metrics",
    "dim", "group", "chunk_bytes",
)  # fmt: skip
DIVERGENCES = (
    fastkd.JSD, fastkd.SkewKL, fastkd.SkewReverseKL, fastkd.AlphaDivergence, fastkd.Renyi,
    fastkd.TAID, fastkd.AKL, fastkd.DIST, fastkd.DKD, fastkd.NKD, fastkd.AlphaBeta,
    fastkd.Jeffreys, fastkd.Bernoulli,
)  # fmt: skip


def loss(*sides, **settings):
    return fastkd.distillation_loss(*(sides or (STUDENT, TEACHER, LABELS)), **settings)


CALLS = {
    "student": lambda x: loss(x, TEACHER),
    "teacher": lambda x: loss(STUDENT, x),
    "labels": lambda x: loss(STUDENT, TEACHER, x, alpha=0.5),
    "multi-hot labels": lambda x: loss(STUDENT, TEACHER, x, divergence=fastkd.Bernoulli()),
    **{name: lambda x, name=name: loss(**{name: x}) for name in SETTINGS},
    **{kind.__name__: kind for kind in DIVERGENCES},
    "TopK.indices": lambda x: TopK(x, LOG_PROBS),
    "TopK.log_probs": lambda x: TopK(IDS, x),
    "TopK.tail": lambda x: TopK(IDS, LOG_PROBS, x),
    "TopK.tail_log_prob": lambda x: TopK(IDS, LOG_PROBS, "bucket", x),
    "TopK.from_logits": lambda x: TopK.from_logits(x, 2),
    "TopK.from_logits, k": lambda x: TopK.from_logits(TEACHER, x),
    "TopK.at": lambda x: TopK.at(x, IDS),
    "TopK.at, indices": lambda x: TopK.at(TEACHER, x),
    "TopK.from_student": lambda x: TopK.from_student(x, TEACHER, 2),
    "TopK.from_server": lambda x: TopK.from_server([x, x]),
    "TopK.pad": TopK.pad,
    "TopK.pad, a part": lambda x: TopK.pad([x]),
    "Sampled.indices": lambda x: Sampled(x, torch.ones(4, 2)),
    "Sampled.counts": lambda x: Sampled(IDS, x),
    "Sampled.from_logits": lambda x: Sampled.from_logits(x, 3),
    "LinearHead.hidden": lambda x: LinearHead(x, WEIGHT),
    "LinearHead.weight": lambda x: LinearHead(HIDDEN, x),
    "LinearHead.bias": lambda x: LinearHead(HIDDEN, WEIGHT, x),
    "LinearHead.logit_scale": lambda x: LinearHead(HIDDEN, WEIGHT, None, x),
    "LinearHead.logit_softcap": lambda x: LinearHead(HIDDEN, WEIGHT, None, None, x),
    "Ensemble.teachers": fastkd.Ensemble,
    "Ensemble.teachers, one": lambda x: fastkd.Ensemble([TEACHER, x]),
    "Ensemble.weights": lambda x: fastkd.Ensemble([TEACHER, TEACHER], x),
    "Ensemble.weights, one": lambda x: fastkd.Ensemble([TEACHER, TEACHER], [1.0, x]),
    "Ensemble.combine": lambda x: fastkd.Ensemble([TEACHER], None, x),
    "kl_div": lambda x: fastkd.kl_div(x, P),
    "kl_div, target": lambda x: fastkd.kl_div(Q, x),
    "kl_div, reduction": lambda x: fastkd.kl_div(Q, P, reduction=x),
    "kl_div, log_target": lambda x: fastkd.kl_div(Q, P, reduction="sum", log_target=x),
    "uld_loss": lambda x: cross_tokenizer.uld_loss(x, P),
    "uld_loss, teacher": lambda x: cross_tokenizer.uld_loss(Q, x),
    "uld_loss, weight": lambda x: cross_tokenizer.uld_loss(Q, P, weight=x),
    "shared_token_loss": lambda x: cross_tokenizer.shared_token_loss(x, P, SHARED),
    "shared_token_loss, shared": lambda x: cross_tokenizer.shared_token_loss(Q, P, x),
    "shared_token_loss, weights": lambda x: cross_tokenizer.shared_token_loss(
        Q, P, SHARED, weights=x
    ),
    "merge": lambda x: cross_tokenizer.merge(x, LABELS, [range(2)]),
    "merge, tokens": lambda x: cross_tokenizer.merge(Q, x, [range(2)]),
    "merge, spans": lambda x: cross_tokenizer.merge(Q, LABELS, x),
    "align": lambda x: cross_tokenizer.align(x, [(0, 1)]),
    "dtkd, temperature": lambda x: temperature.dtkd(Q.exp(), P.exp(), x),
    "by_entropy, low": lambda x: temperature.by_entropy(Q, P, x),
    "LearnableTemperature, initial": lambda x: temperature.LearnableTemperature(initial=x),
    "LearnableTemperature, classes": lambda x: temperature.LearnableTemperature(classes=x),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_no_argument_may_be_is_refused_by_its_name(name):
    for what, value in NEVER.items():
        with pytest.raises((TypeError, ValueError, NotImplementedError, RuntimeError)) as caught:
            CALLS[name](value)
        last = traceback.extract_tb(caught.value.__traceback__)[-1]
        said = f"{what}: {caught.value} ({last.filename}:{last.lineno})"
        assert last.filename.startswith(ROOT), said
        assert last.line.startswith("raise"), said
        assert "\n" not in str(caught.value), said


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_parameters_of_a_divergence_are_its_own_numbers(kind):
    """NumPy's are taken; True and NaN are none."""
    found = kind(numpy.float32(0.25))
    assert found == kind(0.25)
    assert all(type(value) in (int, float) for value in vars(found).values())
    assert fastkd.distillation_loss(STUDENT, TEACHER, None if kind is fastkd.Bernoulli else LABELS,
                                    divergence=found).isfinite()  # fmt: skip
    for wrong in (True, math.nan, math.inf, torch.tensor(0.25)):
        with pytest.raises((TypeError, ValueError), match=kind.__name__):
            kind(wrong)


@pytest.mark.parametrize(
    "divergence", [fastkd.DKD(), fastkd.NKD(), fastkd.TAID(), fastkd.AKL(), fastkd.DIST()], ids=str
)
def test_shared_tokens_need_a_sum_over_tokens(divergence):
    with pytest.raises(ValueError, match="sum over tokens"):
        cross_tokenizer.shared_token_loss(Q, P, SHARED, divergence=divergence)


def test_ids_beyond_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match=r"shared must hold ids in \[0, 6\), got 9"):
        cross_tokenizer.shared_token_loss(Q, P, torch.tensor([[0, 9]]))
    with pytest.raises(ValueError, match=r"tokens must hold ids in \[0, 6\), got 6"):
        cross_tokenizer.merge(Q, torch.tensor([0, 6, 1, 2]), [range(3)])
    with pytest.raises(ValueError, match="6 columns"):
        temperature.LearnableTemperature(classes=5)(0, STUDENT, TEACHER)
