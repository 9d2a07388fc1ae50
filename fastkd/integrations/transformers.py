"""Distillation in the Trainer of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer

from fastkd.functional import distillation_loss


class DistillationTrainer(Trainer):
    """Trains a student against a teacher that sees the same tokens.

    The Trainer counts the tokens of all batches of an optimizer step, over all processes; with
    that count as divisor, accumulation and processes change nothing in the gradient.

    Args:
        loss: the arguments of `distillation_loss` at a step of a run of so many steps; so a
            schedule goes on where a resumed run does.
        vocab_size: columns from here on are padding.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *,
        teacher: Any,
        loss: Callable[[int, int], dict[str, Any]],
        vocab_size: int,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.model_accepts_loss_kwargs = True  # so that the tokens are counted
        # accelerate's own autocast would copy the student's logits to fp32.
        self.accelerator.native_amp = False
        self.loss, self.vocab_size = loss, vocab_size
        self.step_loss: dict[int, Tensor] = {}  # the latest step's, summed over its batches
        self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        student, teacher, labels = self.logits(model, inputs)
        loss = distillation_loss(
            student,
            teacher,
            labels,
            vocab_size=self.vocab_size,
            num_items=num_items_in_batch,
            # Nobody reads the student's logits again; a float16 gradient waits for the loss scale.
            inplace=student.dtype != torch.float16,
            **self.loss(self.state.global_step, self.state.max_steps),
        )
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # DistributedDataParallel divides by the processes, which the count has done.
            loss = loss * self.accelerator.num_processes
        step = self.state.global_step
        self.step_loss = {step: self.step_loss.get(step, 0.0) + loss.detach()}
        return (loss, {}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs the loss of this step: a mean since the last row would change where a run stops."""
        if "loss" in logs:
            (loss,) = self.step_loss.values()
            logs["loss"] = self.accelerator.reduce(loss, "mean").item()
        super().log(logs, start_time)

    def logits(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Of student and teacher [B, T, V], and the tokens [B, T] that they predict.

        The last place of a sequence predicts none, -100. To slice it off would cost a copy of the
        logits' gradient.
        """
        ids = inputs["input_ids"]
        with torch.no_grad():
            teacher = self.teacher(input_ids=ids, use_cache=False).logits
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.args.bf16):
            student = model(input_ids=ids, use_cache=False).logits
        return student, teacher, F.pad(inputs["labels"][:, 1:], (0, 1), value=-100)

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Per token of held-out text: loss in nats, KL to the teacher in nats, top-1 agreement."""
        model = self.accelerator.unwrap_model(self.model)
        training = model.training
        model.eval()
        rows = []
        for inputs in self.get_eval_dataloader(eval_dataset):
            student, teacher, labels = self.logits(model, self._prepare_inputs(inputs))
            _, found = distillation_loss(
                student, teacher, labels, vocab_size=self.vocab_size, return_metrics=True
            )
            sums = [part.sum(-1) for part in (found.ce, found.kd, found.agreement)]
            counts = (labels != -100).sum(-1)
            # Sequences that only fill up the last batch of a process are dropped here.
            rows.append(self.accelerator.gather_for_metrics(torch.stack([*sums, counts], -1)))
        model.train(training)
        total = torch.cat(rows).double().sum(0)
        names = ("validation_loss", "kl_to_teacher", "agreement")
        values = dict(zip(names, (total[:3] / total[3]).tolist(), strict=True))
        found = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        self.log(found)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found
