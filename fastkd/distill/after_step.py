"""What the job does around the steps of the Trainer: its bar, its end, its batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

if TYPE_CHECKING:
    from rich.progress import Progress

    from fastkd.integrations.transformers import DistillationTrainer


class AfterStep(TrainerCallback):
    """Moves the bar; ends with a checkpoint once that is asked, all processes in the same step."""

    def __init__(
        self, trainer: DistillationTrainer, asked: Callable[[], bool], bars: Progress
    ) -> None:
        self.trainer, self.asked, self.bars = trainer, asked, bars
        self.began = self.stopped = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        shown = state.is_world_process_zero
        self.bar = self.bars.add_task("student", total=state.max_steps, visible=shown, text="")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began = True
        self.bars.update(self.bar, completed=state.global_step)
        asked = self.asked()
        if args.world_size > 1:
            flag = torch.tensor(int(asked), device=args.device)
            asked = self.trainer.accelerator.reduce(flag, "sum").item() > 0
        if asked:
            self.stopped = control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.bars.update(self.bar, text=f"loss {float(logs['loss']):.4g}")


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids.clone()}
