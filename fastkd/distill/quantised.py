"""Weights of few bits: a teacher's, to save memory, and a student's, trained for them.

Linear layers but the output head, one scale per row; of int4, one per 32 entries where these divide
the row. int8 and int4 are torchao's, nf4 is bitsandbytes'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .errors import needs

TEACHERS = ("int8", "nf4")
STUDENTS = ("int8", "int4")
GROUP = 32

Filter = Callable[[nn.Module, str], bool]


def check(teacher: str, student: str) -> None:
    """Refuses what this machine has no package for, before anything is read."""
    if teacher == "nf4":
        needs("bitsandbytes", extra="")
    if teacher == "int8" or student:
        needs("torchao", extra="recipes")


def loading(kind: str, dtype: torch.dtype) -> dict[str, Any]:
    """Options of `from_pretrained` for what is quantised while it is read."""
    if kind != "nf4":
        return {}
    from transformers import BitsAndBytesConfig

    chosen = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": chosen}


def quantise(model: Any, kind: str) -> None:
    """Stores the weights in few bits."""
    needs("torchao", extra="recipes")
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_

    for granularity, layers in _layers(model, kind):
        config = (
            Int8WeightOnlyConfig()
            if kind == "int8"
            else IntxWeightOnlyConfig(getattr(torch, kind), granularity)
        )
        quantize_(model, config, filter_fn=layers)


def prepare(model: Any, kind: str) -> None:
    """Rounds the weights in the forward pass only, and lets the gradient through."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    for granularity, layers in _layers(model, kind):
        rounded = IntxFakeQuantizeConfig(getattr(torch, kind), granularity)
        quantize_(model, QATConfig(weight_config=rounded, step="prepare"), filter_fn=layers)


def _layers(model: Any, kind: str) -> Iterator[tuple[Any, Filter]]:
    """By the granularity of its scales, which layers take it."""
    from torchao.quantization import PerAxis, PerGroup

    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if type(m) is nn.Linear and m is not head]
    grouped = {m for m in linear if kind == "int4" and m.in_features % GROUP == 0}
    others = set(linear) - grouped
    yield PerGroup(GROUP), lambda module, name: module in grouped
    yield PerAxis(0), lambda module, name: module in others
