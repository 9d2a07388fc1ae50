"""Weights of few bits: a teacher's, to save memory, and a student's, trained for them.

Linear layers but the output head, one scale per row; of int4, one per 32 entries where these divide
the row. int8 and int4 are torchao's; llm_int8, whose inputs are rounded too but for columns of
outliers, and nf4 are bitsandbytes'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .errors import known, needs

TEACHERS = {"int8": "torchao", "llm_int8": "bitsandbytes", "nf4": "bitsandbytes"}
STUDENTS = ("int8", "int4")
GROUP = 32

Filter = Callable[[nn.Module, str], bool]


def check(teacher: str, student: str) -> None:
    """Refuses what this machine has no package for, before anything is read."""
    packages = {TEACHERS.get(teacher), "torchao" if student else None}
    if "bitsandbytes" in packages:
        needs("bitsandbytes", extra="")
    if "torchao" in packages:
        needs("torchao", extra="recipes")


def loading(kind: str, dtype: torch.dtype) -> dict[str, Any]:
    """Options of `from_pretrained` for what is quantised while it is read."""
    if TEACHERS.get(kind) != "bitsandbytes":
        return {}
    from transformers import BitsAndBytesConfig

    options: dict[str, Any] = {"load_in_8bit": True}
    if kind == "nf4":
        options = {
            "load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_compute_dtype": dtype
        }  # fmt: skip
    return {"quantization_config": BitsAndBytesConfig(**options)}


def quantise(model: Any, kind: str) -> None:
    """Stores the weights in few bits, of int8 or int4."""
    known("quantise", kind, STUDENTS)
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
    """Each granularity of scales, and which layers take it."""
    from torchao.quantization import PerAxis, PerGroup

    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if type(m) is nn.Linear and m is not head]
    grouped = {m for m in linear if kind == "int4" and m.in_features % GROUP == 0}
    others = set(linear) - grouped
    yield PerGroup(GROUP), lambda module, name: module in grouped
    yield PerAxis(0), lambda module, name: module in others
