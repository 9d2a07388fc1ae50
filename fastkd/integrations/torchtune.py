"""The distillation losses of torchtune 0.6, by fastkd: name one as `_component_` of `kd_loss`.

torchtune is not maintained any more, and not needed for these. Its forward KL is the soft
cross-entropy: these values are lower by the teacher's entropy, and the gradients are the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fastkd.divergences import Divergence, ForwardKL, Jeffreys, ReverseKL
from fastkd.functional import distillation_loss


class _Loss(nn.Module):
    """Student and teacher logits [N, V], labels [N]: the mean over rows not ignored, or the sum."""

    divergence: Divergence

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, normalize: bool = True
    ) -> Tensor:
        return distillation_loss(
            student_logits.flatten(0, -2),
            teacher_logits.flatten(0, -2),
            labels.flatten(),
            divergence=self.divergence,
            ignore_index=self.ignore_index,
            reduction="mean" if normalize else "sum",
        )


class ForwardKLLoss(_Loss):
    """KL(teacher || student).

    Example:
        >>> import torch
        >>> from fastkd.integrations.torchtune import ForwardKLLoss
        >>> logits, labels = torch.randn(2, 6, 10), torch.randint(10, (6,))
        >>> ForwardKLLoss()(logits[0], logits[1], labels).shape
        torch.Size([])
    """

    divergence = ForwardKL()


class ReverseKLLoss(_Loss):
    """KL(student || teacher)."""

    divergence = ReverseKL()


class SymmetricKLLoss(_Loss):
    """sym_kd_ratio KL(teacher || student) + (1 - sym_kd_ratio) KL(student || teacher)."""

    def __init__(self, sym_kd_ratio: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__(ignore_index)
        if not 0 <= sym_kd_ratio <= 1:
            raise ValueError(f"sym_kd_ratio must be in [0, 1], got {sym_kd_ratio}")
        self.divergence = Jeffreys(sym_kd_ratio, 1 - sym_kd_ratio)


class _Chunked(nn.Module):
    """Lists of logits [B, T / num_output_chunks, V], and labels [B, T]: the mean."""

    loss: _Loss

    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100) -> None:
        super().__init__()
        self.num_output_chunks, self.ignore_index = num_output_chunks, ignore_index

    def forward(
        self, student_logits: Sequence[Tensor], teacher_logits: Sequence[Tensor], labels: Tensor
    ) -> Tensor:
        parts = labels.chunk(self.num_output_chunks, dim=1)
        sums = [
            self.loss(student, teacher, part, normalize=False)
            for student, teacher, part in zip(student_logits, teacher_logits, parts, strict=True)
        ]
        return sum(sums[1:], sums[0]) / (labels != self.ignore_index).sum().clamp_min(1)


class ForwardKLWithChunkedOutputLoss(_Chunked):
    """ForwardKLLoss of chunks."""

    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100) -> None:
        super().__init__(num_output_chunks, ignore_index)
        self.loss = ForwardKLLoss(ignore_index)


class ReverseKLWithChunkedOutputLoss(_Chunked):
    """ReverseKLLoss of chunks."""

    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100) -> None:
        super().__init__(num_output_chunks, ignore_index)
        self.loss = ReverseKLLoss(ignore_index)


class SymmetricKLWithChunkedOutputLoss(_Chunked):
    """SymmetricKLLoss of chunks."""

    def __init__(
        self, num_output_chunks: int = 8, sym_kd_ratio: float = 0.5, ignore_index: int = -100
    ) -> None:
        super().__init__(num_output_chunks, ignore_index)
        self.loss = SymmetricKLLoss(sym_kd_ratio, ignore_index)
