"""What the job does around the steps of the Trainer."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from fastkd.dtensors import is_distributed

from . import report, storage
from .errors import RunError
from .methods import FASTKD

if TYPE_CHECKING:
    from rich.progress import Progress

    from fastkd.integrations.transformers import DistillationTrainer

LOSS = "eval_validation_loss"


class Watch(TrainerCallback):
    """Shows and writes figures as they come; ends the run when it is asked or when it diverges.

    All processes end in the same step. A checkpoint is only written of weights that are finite.
    """

    def __init__(
        self, trainer: DistillationTrainer, folder: Path, asked: Callable[[], bool], bars: Progress
    ) -> None:
        self.trainer, self.folder, self.asked, self.bars = trainer, folder, asked, bars
        self.metrics = Metrics(folder / "metrics.csv", trainer.loss)
        self.began = self.stopped = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        shown = state.is_world_process_zero
        self.bar = self.bars.add_task(
            "student", total=state.max_steps, completed=state.global_step, visible=shown, text=""
        )
        if shown:
            self.metrics.begin(state)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.metrics.flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.metrics.flush()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.began = True
        self.bars.update(self.bar, completed=state.global_step)
        if state.global_step == state.max_steps:
            control.should_evaluate = True
        loss = self.trainer.step_figures[state.global_step - 1][0]
        sound = loss.isfinite() & _finite(model) if control.should_save else loss.isfinite()
        flags = torch.stack([torch.as_tensor(self.asked(), device=sound.device), ~sound]).float()
        if args.world_size > 1:
            flags = self.trainer.accelerator.reduce(flags, "sum")
        asked, unsound = (flags > 0).tolist()
        if unsound:
            what = "weights are not finite" if loss.isfinite() else f"loss is {loss.item()}"
            raise self.diverged(f"the {what} at step {state.global_step}")
        if asked:
            self.stopped = control.should_save = control.should_training_stop = True

    def diverged(self, what: str) -> RunError:
        saved = storage.last_checkpoint(self.folder)
        kept = f"; {saved} has the student before that" if saved else ""
        return RunError(f"{what}: lower --learning-rate{kept}")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.bars.update(self.bar, text=f"loss {float(logs['loss']):.4g}")
        if state.is_world_process_zero:
            self.metrics.add(logs, state.global_step, state.max_steps)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any
    ) -> None:
        if not math.isfinite(metrics[LOSS]):
            if not self.began:
                raise RunError(
                    f"before the first step the loss on held-out text is {metrics[LOSS]}: "
                    "the student's weights, or their logits, are not finite"
                )
            raise self.diverged(f"the loss on held-out text is {metrics[LOSS]}")
        if state.best_metric is None or metrics[LOSS] < state.best_metric:
            control.should_save = control.should_save or self.began  # the best is kept
        if state.is_world_process_zero:
            self.bars.console.print(report.evaluation(state.global_step, metrics))


def _finite(model: Any) -> torch.Tensor:
    """Whether all weights that are here are: of shards this process's."""
    local = (w.to_local() if is_distributed(w) else w for w in model.parameters())
    return torch.stack([weight.isfinite().all() for weight in local]).all()


class Metrics:
    """metrics.csv, which grows by a row for each step that was logged or evaluated."""

    def __init__(self, path: Path, loss: Callable[[int, int], Any]) -> None:
        self.path, self.loss = path, loss
        self.row: dict[str, Any] = {}

    def begin(self, state: Any) -> None:
        """The rows up to here: what a run that was killed wrote after its last save goes."""
        self.row = {}
        storage.write(self.path, report.table([]))
        for entry in state.log_history:
            self.add(entry, int(entry["step"]), state.max_steps)

    def add(self, logs: dict[str, Any], step: int, steps: int) -> None:
        """What is logged joins the row of its step."""
        if self.row.get("step", step) != step:
            self.flush()
        found = {k.removeprefix("eval_"): v for k, v in logs.items()}
        known = {k: v for k, v in found.items() if k in report.COLUMNS and k != "step"}
        if "loss" in known:
            known["temperature"] = self.loss(step - 1, steps)["temperature"]
        if known:
            self.row = {"step": step, "way": FASTKD, **self.row, **known}

    def flush(self) -> None:
        if not self.row:
            return
        try:
            with open(self.path, "a") as file:
                file.write(report.table([self.row], header=False))
        except OSError as error:
            raise RunError(f"cannot write {self.path}: {error.strerror}") from None
        self.row = {}
