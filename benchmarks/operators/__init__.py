"""The operators: a file each, and a line here."""

from __future__ import annotations

from .base import Operands, Operator
from .cross_entropy import CrossEntropy
from .kl_div import KLDiv
from .linear import Linear
from .logits import Logits
from .topk import TopK

OPERATORS: dict[str, Operator] = {
    op.name: op for op in (Logits(), KLDiv(), CrossEntropy(), Linear(), TopK())
}

__all__ = ["OPERATORS", "Operands", "Operator"]
