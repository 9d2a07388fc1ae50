"""Distilling the user's models: Hugging Face causal language models, on the user's text."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import models, report, settings, storage, texts
from .default_job import Stop, pick
from .errors import Interrupted, RunError, hush_torchao, needs, one_line
from .methods import FASTKD

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from fastkd.integrations.transformers import DistillationTrainer

    from .after_step import AfterStep

STUDENT = "student"


def run(chosen: settings.UserModels, folder: Path, *, resume: bool = False) -> dict[str, Any]:
    """Distils and saves; the figures. Under torchrun every process runs this.

    Raises Interrupted, with a checkpoint in `folder`, on Ctrl-C.
    """
    hush_torchao()
    needs("transformers", "datasets", "accelerate", "rich", "matplotlib")
    from .after_step import AfterStep

    job = Job(chosen)
    trainer = job.trainer(chosen, folder, save_strategy="steps", eval_strategy="steps")
    if trainer.is_world_process_zero() and not resume:
        storage.write(folder / storage.CONFIG, settings.toml(chosen))
    before = trainer.evaluate()
    with Stop() as stop, report.bars() as bars:
        watch = AfterStep(trainer, lambda: stop.asked, bars)
        trainer.add_callback(watch)
        _train(trainer, watch, folder, _last_checkpoint(folder) if resume else None)
    if watch.stopped:
        raise Interrupted(f"stopped; go on with: fastkd distill --resume {folder}")
    figures = {
        "before": plain(before),
        "after": plain(trainer.evaluate()),
        "settings": asdict(chosen),
        "vocab_size": job.vocab_size,
        "machine": report.machine(trainer.args.device),
    }
    _save(trainer, job.tokens, figures, folder)
    return figures


class Job:
    """Teacher, tokens and text, from which any number of students may learn."""

    def __init__(self, chosen: settings.UserModels) -> None:
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.device = pick(chosen.device)
        self.dtype = precision(chosen.precision, self.device)
        self.tokens = models.common_tokenizer(chosen.teacher, chosen.student)
        self.teacher = models.load(chosen.teacher, self.dtype)
        self.vocab_size = models.vocabulary(self.tokens, chosen.vocab_size, self.teacher)
        self.training, self.held_out = texts.sequences(
            chosen.data,
            chosen.text,
            self.tokens,
            chosen.sequence_length,
            chosen.held_out,
            chosen.seed,
        )

    def trainer(
        self, chosen: settings.UserModels, folder: Path, **arguments: Any
    ) -> DistillationTrainer:
        """Of a student as it was before any training."""
        from transformers import PrinterCallback

        from fastkd.integrations.transformers import DistillationTrainer

        from .after_step import collate

        student = models.student(chosen.student, chosen.seed)
        models.check_width("student", student, self.vocab_size)
        if chosen.checkpointing:
            student.train()
            # transformers 5.23 renamed it.
            old, new = "gradient_checkpointing_enable", "activation_checkpointing_enable"
            getattr(student, new if hasattr(student, new) else old)()
        trainer = DistillationTrainer(
            teacher=self.teacher,
            loss=chosen.loss,
            vocab_size=self.vocab_size,
            model=student,
            args=_arguments(chosen, folder, self.device, self.dtype, **arguments),
            train_dataset=self.training,
            eval_dataset=self.held_out,
            data_collator=collate,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer


def precision(wanted: str, device: torch.device) -> torch.dtype:
    """bf16 where it is asked for, or where the device computes in it."""
    able = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    bf16 = wanted == "bf16" or (wanted == "auto" and able)
    return torch.bfloat16 if bf16 else torch.float32


def _arguments(
    chosen: settings.UserModels,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    **others: Any,
) -> TrainingArguments:
    from transformers import TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=chosen.steps or -1,
        num_train_epochs=chosen.epochs,
        per_device_train_batch_size=chosen.batch_size,
        per_device_eval_batch_size=chosen.batch_size,
        gradient_accumulation_steps=chosen.accumulation,
        learning_rate=chosen.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        logging_steps=chosen.log_every,
        logging_first_step=True,
        eval_steps=chosen.evaluate_every,
        save_steps=chosen.evaluate_every,
        save_total_limit=1,
        seed=chosen.seed,
        bf16=dtype == torch.bfloat16,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        **others,
    )
    if "WORLD_SIZE" not in os.environ:
        arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs are for torchrun
    return arguments


def _train(
    trainer: DistillationTrainer, watch: AfterStep, folder: Path, checkpoint: str | None
) -> None:
    """Trains; what a machine or a file has wrong becomes one line."""
    try:
        with enough_memory():
            trainer.train(resume_from_checkpoint=checkpoint)
    except RunError:
        raise
    except Exception as error:
        if checkpoint and not watch.began:  # each part of it fails in its own way
            raise RunError(
                f"{checkpoint} is broken and cannot be read ({one_line(error)}): delete it, and "
                "--resume starts from the beginning"
            ) from None
        if whole(folder) != set(folder.glob("checkpoint-*")):
            raise RunError(f"cannot write a checkpoint to {folder}: {one_line(error)}") from None
        raise
    finally:
        for part in set(folder.glob("checkpoint-*")) - whole(folder):
            shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def enough_memory() -> Iterator[None]:
    """A GPU without memory left is the user's to mend."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise RunError(
            "the GPU's memory is full: lower --batch-size and raise --accumulation, or say "
            "--checkpointing"
        ) from None


def whole(folder: Path) -> set[Path]:
    """The checkpoints that were written to the end: the state of the trainer comes last."""
    return {path.parent for path in folder.glob("checkpoint-*/trainer_state.json")}


def _last_checkpoint(folder: Path) -> str | None:
    found = sorted(whole(folder), key=lambda path: int(path.name.rpartition("-")[2]))
    return str(found[-1]) if found else None


def plain(values: dict[str, float]) -> dict[str, float]:
    return {name.removeprefix("eval_"): value for name, value in values.items()}


def _save(trainer: Any, tokens: Any, figures: dict[str, Any], folder: Path) -> None:
    """The student with its tokenizer, whole or not at all; then the figures.

    Every process calls it: where the weights are sharded, each has a part of them.
    """
    temporary = folder / f".{STUDENT}"
    try:
        trainer.save_model(str(temporary))
        if not trainer.is_world_process_zero():
            return
        (temporary / "training_args.bin").unlink(missing_ok=True)
        tokens.save_pretrained(temporary)
        shutil.rmtree(folder / STUDENT, ignore_errors=True)
        os.replace(temporary, folder / STUDENT)
    except Exception as error:  # a full disk is an OSError here, and a SafetensorError there
        raise RunError(f"cannot write {folder / STUDENT}: {one_line(error)}") from None
    finally:
        if trainer.is_world_process_zero():
            shutil.rmtree(temporary, ignore_errors=True)
    rows = _rows(trainer)
    storage.write(folder / "metrics.csv", report.table(rows))
    storage.write(folder / "curves.png", report.curves(rows))
    storage.write(folder / storage.METRICS, json.dumps(figures, indent=2) + "\n")
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)
    report.show_user_models(figures, folder / STUDENT)


def _rows(trainer: DistillationTrainer) -> list[dict[str, Any]]:
    """One row for each logged step: what was logged there, whether of training or evaluation."""
    rows: dict[int, dict[str, Any]] = {}
    for entry in trainer.state.log_history:
        step = int(entry["step"])
        row = rows.setdefault(step, {"step": step, "way": FASTKD})
        row.update(plain({k: v for k, v in entry.items() if k == "loss" or k.startswith("eval_")}))
        if "loss" in entry:
            row["temperature"] = trainer.loss(step - 1, trainer.state.max_steps)["temperature"]
    return [rows[step] for step in sorted(rows)]
