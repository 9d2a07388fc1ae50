"""Standardised logits: a row's mean and width, which make a temperature of its own of each row.

A softmax does not see what its logits are shifted by, so that of (z - mean) / width at temperature
T is that of z at T * width: the backends standardise by multiplying temperatures, and add to the
gradient what goes through the width.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from . import sharding
from .operators import operator
from .problem import Problem


def standardized(problem: Problem, backend: str) -> Problem:
    """The same problem with its moments, which carry no graph: the backends add their share."""
    student = problem.student.detach()
    teacher = student if problem.teacher is None else problem.teacher.detach()
    moments = _moments(
        student, teacher, problem.counted, problem.vocab_size, backend, problem.merge
    )
    return problem._replace(moments=moments)


@operator(
    "fastkd::moments",
    "(Tensor student, Tensor teacher, Tensor? counted, SymInt vocab_size, str backend, str merge) "
    "-> Tensor",
)
def _moments(
    student: Tensor,
    teacher: Tensor,
    counted: Tensor | None,
    vocab_size: int,
    backend: str,
    merge: str,
) -> Tensor:
    package = "eager" if backend == "torch" else "kernels"
    fill = import_module(f"fastkd.{package}.moments").fill
    owners = {"merge": sharding.of(merge)} if merge else {}
    out = _new(student, teacher, backend)
    return fill(out, student, teacher, counted, vocab_size, **owners)


@_moments.register_fake
def _(
    student: Tensor, teacher: Tensor, counted: Any, vocab_size: int, backend: str, merge: str
) -> Tensor:
    return _new(student, teacher, backend)


def _new(student: Tensor, teacher: Tensor, backend: str) -> Tensor:
    """Moments in fp64 on the torch backend: logits are measured with all digits from a far mean."""
    dtype = torch.float64 if backend == "torch" else torch.float32
    return student.new_empty(2, 3, student.size(0) * student.size(1), dtype=dtype)
