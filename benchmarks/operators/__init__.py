"""The operators: a file each, and a line here."""

from __future__ import annotations

from .base import Operands, Operator
from .cross_entropy import CrossEntropy
from .kl_div import KLDiv
from .logits import Logits

OPERATORS: dict[str, Operator] = {op.name: op for op in (Logits(), KLDiv(), CrossEntropy())}

__all__ = ["OPERATORS", "Operands", "Operator"]
