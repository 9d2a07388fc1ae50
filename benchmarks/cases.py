"""What is measured: shapes by model name, and the suites made of them."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch

from fastkd.divergences import BUILT_IN

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PASSES = ("forward", "backward", "full", "replay")


class Case(NamedTuple):
    """N rows of V logits, of which a share is ignored."""

    name: str
    rows: int
    vocab: int
    ignored: float = 0.0


VOCABULARIES = {
    "llama2": 32000,
    "gpt2": 50257,  # odd: rows are not aligned
    "llama3": 128256,
    "qwen3": 151936,
    "gemma3": 262144,
    "imagenet": 1000,
    "cifar100": 100,
    "cifar10": 10,
}
ROWS = {
    "llama2": (8192, 256),
    "gpt2": (8192,),
    "llama3": (8192, 2048, 64),
    "qwen3": (4096, 512),
    "gemma3": (4096,),
    "imagenet": (65536, 4096),
    "cifar100": (65536,),
    "cifar10": (65536,),
}
MASKED = Case("llama3-8192-masked", 8192, 128256, ignored=0.3)
CASES = {
    case.name: case
    for case in (
        *(Case(f"{m}-{n}", n, VOCABULARIES[m]) for m, rows in ROWS.items() for n in rows),
        MASKED,
    )
}


def case_of(text: str) -> Case:
    """A case by its name, or any shape as `NxV`."""
    if text in CASES:
        return CASES[text]
    if shape := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text):
        return Case(text, int(shape[1]), int(shape[2]))
    raise ValueError(
        f"unknown case {text!r}: one of {', '.join(CASES)}, or a shape such as 64x1000"
    )


class Selection(NamedTuple):
    """Every combination of these is measured; a row of a table each."""

    operator: str
    divergences: tuple[str, ...]
    cases: tuple[str, ...]
    dtypes: tuple[str, ...]
    passes: tuple[str, ...]
    providers: tuple[str, ...]


OTHERS = ("forward_kl+ce", *(name for name in BUILT_IN if name != "forward_kl"))

# --- the CPU's table ---------------------------------------------------------------------------

CPU_CASES = ("llama2-256", "llama3-64", "imagenet-4096", "cifar10-65536")
CPU_PROVIDERS = ("eager", "compile", "fastkd")
CPU = (
    Selection("logits", ("forward_kl",), CPU_CASES, ("fp32", "bf16"), ("full",), CPU_PROVIDERS),
    Selection("logits", OTHERS, CPU_CASES[:1], ("fp32",), ("full",), ("eager", "fastkd")),
    Selection(
        "logits", ("forward_kl",), CPU_CASES[:1], ("fp32",), ("forward", "backward"), CPU_PROVIDERS
    ),
    Selection(
        "kl_div", ("target", "log_target"), CPU_CASES[:1], ("fp32",), ("full",), CPU_PROVIDERS
    ),
)

# --- the GPU's table: the dearest questions first, since time may run out ----------------------

OURS = ("fastkd-triton-forward", "fastkd-triton-backward")
PEERS = ("liger", "trl", "speculators")
QUICK = ("eager", *PEERS, *OURS)
COMPILED = ("compile", "compile-max-autotune")
LARGE = ("qwen3-4096", "gemma3-4096", "llama2-8192")
HEADLINE = (
    Selection(
        "logits", ("forward_kl",), ("llama3-8192", *LARGE), ("bf16",), ("full",),
        ("eager", "liger", *OURS),
    ),  # and last what takes longest to begin
    Selection(
        "logits", ("forward_kl",), ("llama3-8192", *LARGE), ("bf16",), ("full",), ("compile",)
    ),
)  # fmt: skip
DIVERGENCES = (
    Selection(
        "logits", ("jsd", "reverse_kl", "forward_kl+ce", "tvd"), ("llama3-8192",), ("bf16",),
        ("full",), ("eager", "liger", OURS[0]),
    ),
)  # fmt: skip
GPU = (
    *HEADLINE,
    *DIVERGENCES,
    Selection(
        "logits", ("forward_kl",),
        ("imagenet-65536", "cifar100-65536", "cifar10-65536", "llama3-64", "qwen3-512"),
        ("bf16",), ("replay", "full"), ("eager", "liger", *OURS),
    ),
    Selection("logits", ("forward_kl",), ("llama3-8192",), ("bf16",), PASSES[:2], QUICK),
    Selection("logits", ("forward_kl", "jsd"), ("llama3-8192",), ("bf16",), ("full",), QUICK),
    Selection("logits", OTHERS, ("llama3-8192",), ("bf16",), ("full",), ("eager", *OURS)),
    Selection(
        "logits", ("forward_kl",), ("llama3-2048", "gpt2-8192", MASKED.name), ("bf16",),
        ("full",), QUICK,
    ),
    Selection("logits", ("forward_kl",), ("llama3-8192",), ("fp32",), ("full",), QUICK),
    Selection(  # fp16 gradients are formed after the loss's scale is known
        "logits", ("forward_kl",), ("llama3-8192",), ("fp16",), ("full",),
        ("eager", *PEERS, "fastkd"),
    ),
    Selection(  # what kernels of this kind reach
        "cross_entropy", ("label",), ("llama3-8192",), ("bf16",), ("full",),
        ("eager", "compile", "liger", "quack", "fastkd"),
    ),
    Selection(
        "kl_div", ("target", "log_target"), ("llama3-8192",), ("bf16", "fp32"), ("full",),
        ("eager", "liger", "fastkd"),
    ),
    Selection(
        "logits", ("forward_kl", "jsd"), ("llama3-8192",), ("bf16",), ("full",), COMPILED[1:]
    ),
    Selection("logits", ("jsd",), LARGE, ("bf16",), ("full",), (*QUICK, "compile")),
    Selection(
        "linear", ("forward_kl",), ("llama3-8192",), ("bf16",), ("full",),
        ("eager", "chunked", "fastkd"),
    ),
    Selection(
        "topk", ("forward_kl",), ("llama3-8192",), ("bf16",), ("full",),
        ("eager", "subtracted", "fastkd"),
    ),
)  # fmt: skip

# Every operator, pass and kind of provider once, on a shape that the interpreter can do.
REHEARSAL = (
    Selection(
        "logits", ("forward_kl",), ("6x40",), ("bf16",), PASSES[:3], (*QUICK, "orda", *COMPILED)
    ),
    Selection("cross_entropy", ("label",), ("6x40",), ("fp32",), ("full",), ("quack", "fastkd")),
    Selection("logits", ("jsd", "forward_kl+ce"), ("6x40",), ("fp32",), ("full",), CPU_PROVIDERS),
    Selection("kl_div", ("target",), ("6x40",), ("fp32",), ("full",), CPU_PROVIDERS),
    Selection("linear", ("forward_kl",), ("6x40",), ("fp32",), ("full",), ("chunked", "fastkd")),
    Selection("topk", ("forward_kl",), ("6x80",), ("fp32",), ("full",), ("subtracted", "fastkd")),
)
