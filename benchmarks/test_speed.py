"""A small fixed subset for pytest-benchmark: `pytest benchmarks`, gated like everything else."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cases import DTYPES, case_of
from benchmarks.check import Contender, Problem, gate
from benchmarks.measure import synchronizer
from benchmarks.operators import OPERATORS

pytest.importorskip("pytest_benchmark", reason="pip install pytest-benchmark")

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
LARGE, SMALL = ("llama3-2048", "imagenet-65536") if CUDA else ("64x32000", "imagenet-4096")


@pytest.mark.parametrize("provider", ["eager", "fastkd"])
@pytest.mark.parametrize(
    ("operator", "divergence", "case", "dtype"),
    [
        ("logits", "forward_kl", LARGE, "fp32"),
        ("logits", "forward_kl", LARGE, "bf16"),
        ("logits", "forward_kl", SMALL, "fp32"),
        ("logits", "jsd", LARGE, "fp32"),
        ("kl_div", "target", LARGE, "fp32"),
    ],
)
def test_speed(benchmark, operator, divergence, case, dtype, provider):
    chosen = OPERATORS[operator]
    problem = Problem(chosen, case_of(case), divergence, DTYPES[dtype], DEVICE, temperature=2.0)
    loss = chosen.providers[provider].bind(problem.options)
    contender = Contender(provider, loss, problem)
    synchronize = synchronizer(DEVICE)
    gate(contender, synchronize)

    def full():
        contender.answer("full")
        synchronize()

    benchmark(full)
