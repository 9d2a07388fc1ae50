"""Distilling the user's models: Hugging Face causal language models, on the user's text."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastkd.cache import CacheError
from fastkd.integrations.served import ServerError

from . import card, config, report, settings, storage
from .default_job import Stop
from .devices import enough_memory
from .errors import Interrupted, RunError, Usage, hush_torchao, needs, one_line
from .job import Job, precision
from .methods import FIGURES

if TYPE_CHECKING:
    from transformers import TrainerState

    from fastkd.integrations.transformers import DistillationTrainer

    from .watch import Watch

STUDENT, BEST, TOKENS = "student", "best", "tokens"


def run(chosen: settings.UserModels, folder: Path, *, resume: bool = False) -> dict[str, Any]:
    """Distils and saves; the figures. Under torchrun every process runs this.

    Raises Interrupted, with a checkpoint in `folder`, on Ctrl-C.
    """
    with _none_is_missed(folder):
        return _run(chosen, folder, resume)


def _run(chosen: settings.UserModels, folder: Path, resume: bool) -> dict[str, Any]:
    first = os.environ.get("RANK", "0") == "0"
    if first:
        teachers = ", ".join(chosen.teacher) or chosen.teacher_cache
        report.say(f"reading teacher {teachers} and student {chosen.student}")
    hush_torchao()
    needs("transformers", "datasets", "accelerate", "rich", "matplotlib")
    _check_trackers(chosen.report_to)
    from .watch import Watch

    before = _began_with(folder / storage.INPUTS)
    config.check_same(chosen, before.get("settings", {}))
    checkpoint = storage.last_checkpoint(folder) if resume else None
    state = _state(checkpoint)
    over = state is not None and state.global_step >= state.max_steps
    for path in (folder / STUDENT, folder / BEST):
        if first and path.exists() and not over:
            raise RunError(f"{path} is there, and not from this run: move it away")
    with _nothing_left_if_it_fails(folder, first and not resume):
        if first and not resume:
            storage.write(folder / storage.CONFIG, config.text(chosen))
        with report.bars() as bars:
            bar = bars.add_task("text", total=None, visible=first, text="")
            job = Job(chosen, folder / TOKENS, lambda count: bars.update(bar, completed=count))
        trainer = job.trainer(
            chosen,
            folder,
            checkpoint=checkpoint if over else None,
            save_strategy="steps",
            eval_strategy="steps",
            eval_on_start=checkpoint is None,
        )
    known = job.known_teacher(trainer.model)  # by all: each may have a shard
    if before.get("teacher", known) != known:
        raise RunError("the teacher is another than when this run began: start again")
    if first and not before:
        inputs = {"teacher": known, "settings": config.values(chosen)}
        storage.write(folder / storage.INPUTS, json.dumps(inputs))
    if state is not None and over:  # it was killed while the result was saved
        trainer.state = state
    else:
        with Stop() as stop, report.bars() as bars:
            watch = Watch(trainer, folder, lambda: stop.asked, bars)
            trainer.add_callback(watch)
            if first:
                report.say(_announcement(job, chosen, trainer, folder))
            _train(trainer, watch, folder, checkpoint)
        if watch.stopped:
            raise Interrupted(f"stopped; go on with: fastkd distill --resume {folder}")
    figures = _figures(trainer, job, chosen)
    _save(trainer, job, chosen, figures, folder)
    return figures


def _check_trackers(names: Sequence[str]) -> None:
    from transformers.integrations import get_reporting_integration_callbacks

    try:
        get_reporting_integration_callbacks(list(names))
    except ValueError as error:
        raise Usage(f"report_to: {one_line(error)}") from None
    needs(*names, extra="")


@contextlib.contextmanager
def _nothing_left_if_it_fails(folder: Path, new: bool) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if new:
            shutil.rmtree(folder / TOKENS, ignore_errors=True)
            (folder / storage.CONFIG).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _none_is_missed(folder: Path) -> Iterator[None]:
    """A process that was killed ends the others, each by one line."""
    try:
        yield
    except Exception as error:
        if isinstance(error, RunError) or not _another_ended(error):
            raise
        began = (folder / storage.CONFIG).exists()
        way = f"go on with: fastkd distill --resume {folder}" if began else "start it again"
        raise RunError(f"another process of this run ended; {way}") from None


def _another_ended(error: Exception) -> bool:
    """Whether a collective failed: NCCL has a kind of error for it, and gloo a RuntimeError."""
    import torch.distributed as dist

    kinds = getattr(dist, "DistError", ()), getattr(dist, "DistBackendError", ())
    return isinstance(error, kinds) or "gloo" in str(error)


def _announcement(
    job: Job, chosen: settings.UserModels, trainer: DistillationTrainer, folder: Path
) -> str:
    """What is about to happen, and what was left out."""
    size = f"{_size(trainer.model):,} parameters"
    if chosen.lora:
        size += f", {_size(trainer.model, trained=True):,} of them trained"
    sizes = " and ".join(f"{_size(teacher):,}" for teacher in job.teachers)
    known = f"teacher of {sizes} parameters" if sizes else "the student as it was for a teacher"
    if job.cache is not None:
        known = f"teacher known by its {job.cache.manifest.layout.kind}"
    length, passes = chosen.sequence_length, f"{chosen.epochs:g} passes"
    how = "apart" if job.separate else "not kept apart, which one of the models cannot do"
    if chosen.cross_tokenizer:
        how = "each in sequences of its own, as both tokenizers have it"
    lines = [
        f"{len(job.training):,} sequences of {length} tokens to train on, {len(job.held_out):,} "
        f"held out, from {job.counts.documents:,} documents, {how}",
        *job.counts.remarks(length),
        f"{known}, student of {size}, in {job.dtype} on "
        f"{trainer.args.device.type}; {f'{chosen.steps:,} steps' if chosen.steps else passes}, "
        f"into {folder}/".replace("torch.", ""),
    ]
    if chosen.on_policy:
        lines.append(
            f"in {chosen.on_policy:.0%} of the steps the student writes what it learns from"
        )
    return "\n".join(lines)


def _size(model: Any, trained: bool = False) -> int:
    return sum(w.numel() for w in model.parameters() if w.requires_grad or not trained)


# --- training and stopping -------------------------------------------------------------------


def _began_with(path: Path) -> dict[str, Any]:
    """The teacher and the settings of a run that goes on."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is broken and cannot be read: {one_line(error)}") from None
    return found


def _state(checkpoint: Path | None) -> TrainerState | None:
    from transformers import TrainerState

    if checkpoint is None:
        return None
    try:
        return TrainerState.load_from_json(str(checkpoint / storage.TRAINER_STATE))
    except Exception as error:
        raise _broken(checkpoint, error) from None


def _train(
    trainer: DistillationTrainer, watch: Watch, folder: Path, checkpoint: Path | None
) -> None:
    """Trains; what a machine or a file has wrong becomes one line."""
    storage.drop_halves(folder)
    try:
        with enough_memory():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except RunError:
        raise
    except (CacheError, ServerError) as error:
        raise RunError(str(error)) from None
    except Exception as error:
        if _another_ended(error):
            raise
        if checkpoint and not watch.began:  # each part of it fails in its own way
            raise _broken(checkpoint, error) from None
        if "overflow" in str(error):  # of the rate, in the optimizer
            raise watch.diverged(f"the optimizer fails: {one_line(error)}") from None
        if storage.drop_halves(folder):
            why = storage.reason(error, folder)
            raise RunError(f"cannot write a checkpoint to {folder}: {why}") from None
        raise
    finally:
        storage.drop_halves(folder)


def _broken(checkpoint: Path, error: Exception) -> RunError:
    return RunError(
        f"{checkpoint} is broken and cannot be read ({one_line(error)}): delete it, and "
        "--resume goes on from the one before, or from the beginning"
    )


def _figures(trainer: DistillationTrainer, job: Job, chosen: settings.UserModels) -> dict[str, Any]:
    """What metrics.json and the model card say."""
    evaluated = [entry for entry in trainer.state.log_history if "eval_agreement" in entry]
    return {
        "before": plain(evaluated[0]),
        "after": plain(evaluated[-1]),
        "teacher": ", ".join(chosen.teacher or job.cited),
        "settings": asdict(chosen),
        "vocab_size": job.vocab_size,
        "data": asdict(job.counts),
        "machine": report.machine(trainer.args.device),
    }


def plain(values: dict[str, float]) -> dict[str, float]:
    return {name: values[f"eval_{name}"] for name in FIGURES}


# --- what came of it -------------------------------------------------------------------------


def _save(
    trainer: Any, job: Job, chosen: settings.UserModels, figures: dict[str, Any], folder: Path
) -> None:
    """The student with its tokenizer, whole or not at all; then the figures.

    Every process calls it: where the weights are sharded, each has a part of them.
    """
    wanted = chosen.save_precision
    dtype = job.came_in if wanted == "auto" else precision(wanted, job.device)
    _convert(trainer.model, dtype)
    text = card.text(figures)

    def student(temporary: Path) -> None:
        trainer.save_model(str(temporary))
        if trainer.is_world_process_zero():
            _complete(temporary, job, text)

    _replace(folder / STUDENT, student, trainer.is_world_process_zero())
    if not trainer.is_world_process_zero():
        return
    state = trainer.state
    best = folder / f"checkpoint-{state.best_global_step}"
    if best.exists() and state.best_global_step != state.global_step:

        def earlier(temporary: Path) -> None:
            model, _ = job.student(chosen, best)
            _convert(model, dtype)
            model.save_pretrained(temporary)
            _complete(temporary, job, text)

        _replace(folder / BEST, earlier, True)
    rows = report.rows(folder / "metrics.csv")
    storage.write(folder / "curves.png", report.curves(rows))
    storage.write(folder / storage.METRICS, storage.json_text(figures))
    for path in (*folder.glob("checkpoint-*"), folder / TOKENS):
        shutil.rmtree(path, ignore_errors=True)
    (folder / storage.INPUTS).unlink(missing_ok=True)
    report.show_user_models(figures, folder / STUDENT)


def _convert(model: Any, dtype: torch.dtype) -> None:
    """What was trained, and all else unless it stays where it came from, as beside adapters."""
    if not hasattr(model, "disable_adapter"):
        model.to(dtype)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(dtype)


def _complete(folder: Path, job: Job, text: str) -> None:
    (folder / "training_args.bin").unlink(missing_ok=True)
    job.tokens.save_pretrained(folder)
    (folder / "README.md").write_text(text, encoding="utf-8")


def _replace(folder: Path, save: Any, first: bool) -> None:
    """A saved model under its name, once all of it is written."""
    temporary = folder.with_name(f".{folder.name}")
    try:
        save(temporary)
        if first:
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary, folder)
    except Exception as error:  # a full disk is an OSError here, and a SafetensorError there
        why = storage.reason(error, folder)
        raise RunError(f"cannot write {folder}: {why}") from None
    finally:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
