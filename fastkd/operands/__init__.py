"""What a student or a teacher may be besides a tensor of logits. Each is checked when it is made.

On the CPU values are checked too; elsewhere only what costs no synchronisation.
"""

from torch import Tensor

from .ensemble import Ensemble
from .linear_head import LinearHead
from .listed import Sampled, TopK

Student = Tensor | LinearHead
Teacher = Tensor | LinearHead | TopK | Sampled | Ensemble

__all__ = ["Ensemble", "LinearHead", "Sampled", "Student", "Teacher", "TopK"]
