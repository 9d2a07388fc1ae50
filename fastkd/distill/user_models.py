"""Distilling the user's models: Hugging Face causal language models, on the user's text."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastkd.cache import CacheError, TeacherCache

from . import cached, card, models, report, sequences, settings, storage
from .default_job import Stop, pick
from .errors import Interrupted, RunError, Usage, hush_torchao, needs, one_line

if TYPE_CHECKING:
    from transformers import TrainerState, TrainingArguments

    from fastkd.integrations.transformers import DistillationTrainer

    from .watch import Watch

STUDENT, BEST, TOKENS, INPUTS = "student", "best", "tokens", "inputs.json"


def run(chosen: settings.UserModels, folder: Path, *, resume: bool = False) -> dict[str, Any]:
    """Distils and saves; the figures. Under torchrun every process runs this.

    Raises Interrupted, with a checkpoint in `folder`, on Ctrl-C.
    """
    first = os.environ.get("RANK", "0") == "0"
    if first:
        teacher = chosen.teacher or chosen.teacher_cache
        report.say(f"reading teacher {teacher} and student {chosen.student}")
    hush_torchao()
    needs("transformers", "datasets", "accelerate", "rich", "matplotlib", *chosen.report_to)
    from .watch import Watch

    checkpoint = storage.last_checkpoint(folder) if resume else None
    state = _state(checkpoint)
    over = state is not None and state.global_step >= state.max_steps
    for path in (folder / STUDENT, folder / BEST):
        if first and path.exists() and not over:
            raise RunError(f"{path} is there, and not from this run: move it away")
    with _nothing_left_if_it_fails(folder, first and not resume):
        if first and not resume:
            storage.write(folder / storage.CONFIG, settings.toml(chosen))
        with report.bars() as bars:
            bar = bars.add_task("text", total=None, visible=first, text="")
            job = Job(chosen, folder / TOKENS, lambda count: bars.update(bar, completed=count))
        trainer = job.trainer(
            chosen,
            folder,
            student=str(checkpoint) if over else "",
            save_strategy="steps",
            eval_strategy="steps",
            eval_on_start=checkpoint is None,
        )
    if first:
        _same_teacher(job.teacher, folder / INPUTS)
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
    evaluated = [entry for entry in trainer.state.log_history if "eval_agreement" in entry]
    figures = {
        "before": plain(evaluated[0]),
        "after": plain(evaluated[-1]),
        "teacher": chosen.teacher or job.teacher.manifest.about.get("teacher", "a teacher"),
        "settings": asdict(chosen),
        "vocab_size": job.vocab_size,
        "data": asdict(job.counts),
        "machine": report.machine(trainer.args.device),
    }
    _save(trainer, job, figures, folder)
    return figures


@contextlib.contextmanager
def _nothing_left_if_it_fails(folder: Path, new: bool) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if new:
            shutil.rmtree(folder / TOKENS, ignore_errors=True)
            (folder / storage.CONFIG).unlink(missing_ok=True)
        raise


class Job:
    """Teacher, tokens and text, from which any number of students may learn."""

    def __init__(
        self,
        chosen: settings.UserModels,
        tokens: Path,
        tell: Callable[[int], None] = lambda sequences: None,
    ) -> None:
        import transformers
        from accelerate import PartialState

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        if chosen.threads:
            torch.set_num_threads(chosen.threads)
        self.device = pick(chosen.device)
        self.dtype = precision(chosen.precision, self.device)
        cache = cached.opened(chosen) if chosen.teacher_cache else None
        source = chosen.teacher if cache is None else str(cache.path / cached.TOKENIZER)
        self.tokens = models.common_tokenizer(source, chosen.student)
        if chosen.chat_template:
            self.tokens.chat_template = text(chosen.chat_template)
        self.vocab_size = models.vocabulary(self.tokens, chosen.vocab_size)
        for name in ("teacher", "student") if cache is None else ("student",):
            shape = models.configuration(getattr(chosen, name))
            models.check_width(name, shape, self.vocab_size)
            models.check_positions(name, shape, chosen.sequence_length)
        self.teacher = models.load(chosen.teacher, self.dtype) if cache is None else cache
        processes = PartialState(cpu=self.device.type == "cpu")
        with processes.main_process_first():
            self.training, self.held_out, self.counts = sequences.prepare(
                chosen, self.tokens, tokens, tell
            )
        if cache is not None:
            self.training, self.held_out = cached.with_rows(cache, self.training, self.held_out)

    def trainer(
        self, chosen: settings.UserModels, folder: Path, student: str = "", **arguments: Any
    ) -> DistillationTrainer:
        """Of a student as it was before any training, or of another."""
        from transformers import PrinterCallback

        from fastkd.integrations.transformers import DistillationTrainer

        model, self.came_in = models.student(chosen.student, chosen.seed)
        if student:
            model, _ = models.student(student, chosen.seed)
        self.separate = all(map(_keeps_documents_apart, (self.teacher, model)))
        if chosen.checkpointing:
            model.train()
            # transformers 5.23 renamed it.
            old, new = "gradient_checkpointing_enable", "activation_checkpointing_enable"
            getattr(model, new if hasattr(model, new) else old)()
        trainer = DistillationTrainer(
            teacher=self.teacher,
            loss=chosen.loss,
            vocab_size=self.vocab_size,
            model=model,
            args=_arguments(chosen, folder, self.device, self.dtype, **arguments),
            train_dataset=self.training,
            eval_dataset=self.held_out,
            data_collator=partial(sequences.collate, separate=self.separate),
        )
        trainer.remove_callback(PrinterCallback)
        return trainer


def precision(wanted: str, device: torch.device) -> torch.dtype:
    """bf16 where it is asked for, or where the device computes in it."""
    able = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    bf16 = wanted == "bf16" or (wanted == "auto" and able)
    return torch.bfloat16 if bf16 else torch.float32


def text(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Usage(f"cannot read {file}: {one_line(error)}") from None


def _arguments(
    chosen: settings.UserModels,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    **others: Any,
) -> TrainingArguments:
    from transformers import TrainingArguments

    try:
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=chosen.steps or -1,
            num_train_epochs=chosen.epochs,
            per_device_train_batch_size=chosen.batch_size,
            per_device_eval_batch_size=chosen.batch_size,
            gradient_accumulation_steps=chosen.accumulation,
            optim=chosen.optimizer,
            learning_rate=chosen.learning_rate,
            weight_decay=chosen.weight_decay,
            lr_scheduler_type=chosen.lr_schedule,
            warmup_steps=chosen.warmup,
            max_grad_norm=chosen.clip,
            logging_steps=chosen.log_every,
            logging_first_step=True,
            logging_nan_inf_filter=False,  # a loss that is not finite ends the run
            eval_steps=chosen.evaluate_every,
            metric_for_best_model="validation_loss",
            greater_is_better=False,
            save_steps=chosen.save_every,
            save_total_limit=chosen.keep,
            seed=chosen.seed,
            bf16=dtype == torch.bfloat16,
            use_cpu=device.type == "cpu",
            dataloader_pin_memory=device.type == "cuda",
            remove_unused_columns=False,
            report_to=list(chosen.report_to) or "none",
            disable_tqdm=True,
            **others,
        )
    except ValueError as error:  # a name that transformers does not know
        raise Usage(one_line(error)) from None
    if "WORLD_SIZE" not in os.environ:
        arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs are for torchrun
    return arguments


def _announcement(
    job: Job, chosen: settings.UserModels, trainer: DistillationTrainer, folder: Path
) -> str:
    """What is about to happen, and what was left out."""
    teacher, size = job.teacher, _size(trainer.model)
    known = (
        f"teacher known by its {teacher.manifest.layout.kind}"
        if isinstance(teacher, TeacherCache)
        else f"teacher of {_size(teacher):,} parameters"
    )
    length, passes = chosen.sequence_length, f"{chosen.epochs:g} passes"
    how = "apart" if job.separate else "not kept apart, which one of the models cannot do"
    lines = [
        f"{len(job.training):,} sequences of {length} tokens to train on, {len(job.held_out):,} "
        f"held out, from {job.counts.documents:,} documents, {how}",
        *job.counts.remarks(length),
        f"{known}, student of {size:,} parameters, in {job.dtype} on "
        f"{trainer.args.device.type}; {f'{chosen.steps:,} steps' if chosen.steps else passes}, "
        f"into {folder}/".replace("torch.", ""),
    ]
    return "\n".join(lines)


def _keeps_documents_apart(model: Any) -> bool:
    if isinstance(model, TeacherCache):
        return bool(model.manifest.about.get(cached.APART))
    return models.keeps_documents_apart(model)


def _size(model: Any) -> int:
    return sum(weight.numel() for weight in model.parameters())


# --- training and stopping -------------------------------------------------------------------


def _state(checkpoint: Path | None) -> TrainerState | None:
    from transformers import TrainerState

    if checkpoint is None:
        return None
    try:
        return TrainerState.load_from_json(str(checkpoint / storage.TRAINER_STATE))
    except Exception as error:
        raise _broken(checkpoint, error) from None


def _same_teacher(teacher: Any, path: Path) -> None:
    """Refuses to go on with another teacher than the run began with."""
    cache = isinstance(teacher, TeacherCache)
    key = teacher.manifest.key() if cache else models.fingerprint(teacher)
    found = json.dumps({"teacher": key})
    if not path.exists():
        storage.write(path, found)
    elif path.read_text() != found:
        raise RunError("the teacher is another than when this run began: start again")


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
    except CacheError as error:
        raise RunError(str(error)) from None
    except Exception as error:
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


def plain(values: dict[str, float]) -> dict[str, float]:
    names = ("validation_loss", "kl_to_teacher", "agreement")
    return {name: values[f"eval_{name}"] for name in names}


# --- what came of it -------------------------------------------------------------------------


def _save(trainer: Any, job: Job, figures: dict[str, Any], folder: Path) -> None:
    """The student with its tokenizer, whole or not at all; then the figures.

    Every process calls it: where the weights are sharded, each has a part of them.
    """
    chosen = figures["settings"]
    wanted = chosen["save_precision"]
    dtype = job.came_in if wanted == "auto" else precision(wanted, job.device)
    trainer.model.to(dtype)
    text = card.text(figures)

    def student(temporary: Path) -> None:
        trainer.save_model(str(temporary))
        _complete(temporary, job, text)

    _replace(folder / STUDENT, student, trainer.is_world_process_zero())
    if not trainer.is_world_process_zero():
        return
    state = trainer.state
    best = folder / f"checkpoint-{state.best_global_step}"
    if best.exists() and state.best_global_step != state.global_step:

        def earlier(temporary: Path) -> None:
            models.load(str(best), dtype).save_pretrained(temporary)
            _complete(temporary, job, text)

        _replace(folder / BEST, earlier, True)
    rows = report.rows(folder / "metrics.csv")
    storage.write(folder / "curves.png", report.curves(rows))
    storage.write(folder / storage.METRICS, storage.json_text(figures))
    for path in (*folder.glob("checkpoint-*"), folder / TOKENS):
        shutil.rmtree(path, ignore_errors=True)
    (folder / INPUTS).unlink(missing_ok=True)
    report.show_user_models(figures, folder / STUDENT)


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
