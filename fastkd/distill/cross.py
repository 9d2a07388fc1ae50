"""A student's training against a teacher whose tokenizer is another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import cross_tokenizer as losses
from fastkd.functional import Metrics
from fastkd.integrations.models import targets
from fastkd.integrations.transformers import DistillationTrainer

from .aligned import IDS, SPANS, THEIRS


class CrossTokenizerTrainer(DistillationTrainer):
    """Trains against a teacher that reads the same text in tokens of its own.

    Every span counts as often as the student has tokens in it; the sum is divided by the tokens
    that count, as the cross-entropy with the labels is.

    Args:
        shared: ids of the tokens that both have, as of `fastkd.cross_tokenizer.shared_tokens`.
        vocab_size, teacher_vocab_size: columns from here on are padding, of each side.
        distance: uld or gold.
        arguments: those of `DistillationTrainer`.
    """

    def __init__(
        self,
        *,
        shared: Tensor,
        vocab_size: int,
        teacher_vocab_size: int,
        distance: str,
        **arguments: Any,
    ) -> None:
        super().__init__(heads=False, vocab_size=vocab_size, **arguments)
        self.shared, self.distance = shared.to(self.args.device), distance
        self.teacher_vocab_size = teacher_vocab_size
        mine, theirs = self.shared.unbind(1)
        # The teacher's id of each of the student's tokens, -1 where it has none.
        self.meant = self.shared.new_full((vocab_size,), -1).index_put((mine,), theirs)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        settings = self.loss(self.state.global_step, self.state.max_steps)
        labels = targets(inputs, self.shift)
        outputs = self.student_outputs(model, self._of_student(inputs))
        metrics = self._figures(outputs.logits, inputs, labels, settings)
        alpha, scale = settings["alpha"], 1.0
        if settings["scale_by_temperature"]:
            scale = settings["temperature"] * settings["teacher_temperature"]
        items = num_items_in_batch
        if items is None:
            items = (labels != -100).sum().clamp_min(1)
        assert metrics.ce is not None
        loss = (alpha * scale * metrics.kd.sum() + (1 - alpha) * metrics.ce.sum()) / items
        divided = self._divided(num_items_in_batch)
        detached = Metrics(*(rows.detach() for rows in metrics if rows is not None))
        self._keep(loss, detached, labels, num_items_in_batch, divided)
        loss = loss * divided
        return (loss, outputs) if return_outputs else loss

    def _sums(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        labels = targets(inputs, self.shift)
        logits = self.student_outputs(model, self._of_student(inputs)).logits
        plain = {**self.loss(0, 1), "temperature": 1.0, "teacher_temperature": 1.0}
        found = self._figures(logits, inputs, labels, plain)
        assert found.ce is not None
        return torch.stack([found.ce, found.kd, found.agreement, (labels != -100).sum(-1)], -1)

    @staticmethod
    def _of_student(inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {IDS: inputs[IDS]}

    def _figures(
        self, logits: Tensor, inputs: Mapping[str, Any], labels: Tensor, settings: Mapping[str, Any]
    ) -> Metrics:
        """The metrics of each sequence, [B]: sums over its tokens, in a span or out of one."""
        theirs = self.teacher_logits({IDS: inputs[THEIRS]})
        assert isinstance(theirs, Tensor)  # without heads
        theirs = theirs[..., : self.teacher_vocab_size]
        student = logits[..., : self.vocab_size].float()
        ce = F.cross_entropy(student.flatten(0, 1), labels.flatten(), reduction="none")
        # Row i is what token i was drawn from.
        before = (student / settings["temperature"]).log_softmax(-1).roll(1, 1)
        known = (theirs.float() / settings["teacher_temperature"]).log_softmax(-1).roll(1, 1)
        rows = [
            self._distances(before[i], inputs[IDS][i], known[i], inputs[THEIRS][i], spans, settings)
            for i, spans in enumerate(inputs[SPANS].tolist())
        ]
        kd, mine, of_teacher, agreement = map(torch.stack, zip(*rows, strict=True))
        return Metrics(kd, ce.view_as(labels).sum(-1), mine, of_teacher, agreement)

    def _distances(
        self,
        student: Tensor,
        student_ids: Tensor,
        teacher: Tensor,
        teacher_ids: Tensor,
        spans: list[list[int]],
        settings: Mapping[str, Any],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The distance of one sequence, both entropies, and agreement, each summed."""
        mine = [range(start, stop) for start, stop, _, _ in spans if stop]
        theirs = [range(start, stop) for _, _, start, stop in spans if stop]
        weight = torch.tensor([len(span) for span in mine], device=student.device).float()
        q = losses.merge(student, student_ids, mine)
        p = losses.merge(teacher, teacher_ids, theirs)
        if self.distance == "gold":
            kd = losses.shared_token_loss(
                q, p, self.shared, divergence=settings["divergence"], weight=weight, reduction="sum"
            )
        else:
            kd = losses.uld_loss(q, p, weight=weight, reduction="sum")
        q, p = student[[span.start for span in mine]], teacher[[span.start for span in theirs]]
        agreement = (weight * (self.meant[q.argmax(-1)] == p.argmax(-1))).sum()
        return kd, (weight * _entropy(q)).sum(), (weight * _entropy(p)).sum(), agreement


def _entropy(log_probs: Tensor) -> Tensor:
    return torch.special.entr(log_probs.exp()).sum(-1)
