"""What the launchers have in common: how the rows of operands lie in memory, and buffers for them.

The dictionaries are arguments of a kernel by name.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastkd.problem import Problem


def rows_in_memory(*counts: int, **operands: Tensor | None) -> dict[str, Any]:
    """The operands [O, I, columns], the entries between the rows of each, and what divides these.

    Operands after the first may be [N, columns]. counts: numbers of columns that a kernel has to
    know for multiples of ALIGN too.
    """
    shape = next(x for x in operands.values() if x is not None).shape[:2]
    for name, x in operands.items():
        if x is not None and x.dim() == 2:
            operands[name] = x.unflatten(0, shape)
    present = [x for x in operands.values() if x is not None]
    strides = {name: _strides(x) for name, x in operands.items()}
    outers, inners = zip(*strides.values(), strict=True)
    places = [x.data_ptr() // x.element_size() for x in present]
    outer_size, inner = (max(size, 1) for size in shape)
    one_stride = outer_size == 1 or outers == tuple(inner * stride for stride in inners)
    found: dict[str, Any] = dict(operands)
    for name, (outer_stride, inner_stride) in strides.items():
        found |= {f"{name}_outer": outer_stride, f"{name}_inner": inner_stride}
    align = math.gcd(16, *places, *outers, *inners, *counts)
    return found | {"inner": None if one_stride else inner, "ALIGN": align}


def _strides(x: Tensor | None) -> tuple[int, int]:
    if x is None:
        return 0, 0
    return 0 if x.size(0) == 1 else x.stride(0), x.stride(1)


def beginnings(rows: dict[str, Any], vector: int) -> dict[str, Any]:
    """The same operands, each from the multiple of `vector` before it on, and SHIFTED of `sweep`.

    Unless its storage begins later, which one that PyTorch allocated does not.
    """
    found: dict[str, Any] = {"SHIFTED": 0}
    places = {}
    for bit, name in ((1, "student"), (2, "teacher"), (4, "gradient")):
        x, first = rows[name], 0
        if x is not None:
            first = x.data_ptr() // x.element_size() % vector
            first *= first <= x.storage_offset()
            strides = rows[f"{name}_outer"], rows[f"{name}_inner"]
            places[bit] = (first, *(stride % vector for stride in strides))
        if first:
            x = x.as_strided(x.size(), x.stride(), x.storage_offset() - first)
        found |= {name: x, f"{name}_first": first}
    if rows["ALIGN"] % vector:
        sides = [place for bit, place in places.items() if bit < 4]
        lead = max(sides, key=list(places.values()).count)
        found["SHIFTED"] = sum(bit for bit, place in places.items() if place == lead)
    return found


def per_row(**numbers: Tensor | None) -> dict[str, Any]:
    """Tensors [N], of any stride, and their strides."""
    strides = {f"{name}_stride": 0 if x is None else x.stride(0) for name, x in numbers.items()}
    return dict(numbers) | strides


def new_rows(problem: Problem, count: int) -> Tensor:
    """fp32 [count, N]; rows that do not count are not written, hence begin as 0."""
    new = torch.empty if problem.counted is None else torch.zeros
    return new((count, problem.rows), dtype=torch.float32, device=problem.student.device)


def new_gradient(problem: Problem) -> Tensor:
    """[N, width], of the student's logits."""
    student = problem.student
    shape = (problem.rows, student.size(-1))
    return torch.empty(shape, dtype=student.dtype, device=student.device)
