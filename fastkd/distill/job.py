"""What a run on the user's models is made of: teachers, tokens, text, and students."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastkd.cross_tokenizer import shared_tokens
from fastkd.integrations.columns import Indivisible, check_processes

from . import aligned, cached, models, parsing, quantised, sequences, settings
from .devices import pick, placement
from .errors import Usage, one_line

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from fastkd.integrations.on_policy import OnPolicy
    from fastkd.integrations.transformers import DistillationTrainer


class Job:
    """Teacher, tokens and text, from which any number of students may learn."""

    def __init__(
        self,
        chosen: settings.UserModels,
        tokens: Path,
        tell: Callable[[int], None] = lambda sequences: None,
    ) -> None:
        from accelerate import PartialState

        self.device = set_up(chosen)
        self.dtype = precision(chosen.precision, self.device)
        _check_machine(chosen)
        _check_optimizer(
            chosen, _arguments(chosen, tokens, self.device, self.dtype, eval_strategy="steps")
        )
        self.cache = cached.opened(chosen) if chosen.teacher_cache else None
        self.tokens, self.teacher_tokens = self._tokenizers(chosen)
        self.vocab_size = models.vocabulary(self.tokens, chosen.vocab_size)
        if self.cache is not None:
            cached.check_loss(self.cache, chosen, self.vocab_size)
        other = self._check_shapes(chosen)
        names = () if chosen.own_teacher() else chosen.teacher
        self.teachers = [models.teacher(name, chosen, self.dtype, self.device) for name in names]
        processes = PartialState(cpu=self.device.type == "cpu")
        with processes.main_process_first():
            self.training, self.held_out, self.counts = sequences.prepare(
                chosen, self.tokens, tokens, tell, other
            )
        if self.cache is not None:
            self.training, self.held_out = cached.with_rows(
                self.cache, self.training, self.held_out
            )

    def _tokenizers(self, chosen: settings.UserModels) -> tuple[Any, Any]:
        """The student's, and the teacher's where it is another."""
        if chosen.cross_tokenizer:
            return models.both_tokenizers(chosen.teacher[0], chosen.student)
        cache = self.cache
        sources = chosen.teacher if cache is None else (str(cache.path / cached.TOKENIZER),)
        return models.common_tokenizer(sources, chosen.student, chosen.chat_template), None

    def _check_shapes(self, chosen: settings.UserModels) -> tuple[Any, int] | None:
        """Refuses models that do not suit the tokens, before any weights are read.

        Of a teacher of other tokens: its tokenizer, and the most tokens that it takes.
        """
        other = None
        for name in chosen.teacher:
            if self.teacher_tokens is None:
                models.check_shape("teacher", name, chosen, self.vocab_size)
            else:
                shape = models.configuration(name)
                models.check_width("teacher", shape, models.vocabulary(self.teacher_tokens, 0))
                other = self.teacher_tokens, models.positions(shape)
        shape = models.check_shape("student", chosen.student, chosen, self.vocab_size)
        models.check_rank(shape, chosen.lora)
        return other

    def trainer(
        self,
        chosen: settings.UserModels,
        folder: Path,
        checkpoint: Path | None = None,
        **arguments: Any,
    ) -> DistillationTrainer:
        """The trainer of a student as it was before any training, or as a checkpoint has it."""
        from transformers import PrinterCallback

        model, self.came_in = self.student(chosen)
        if checkpoint is not None:
            model, _ = self.student(chosen, checkpoint)
        apart = self.cache is None or bool(self.cache.manifest.about.get(cached.APART))
        self.separate = apart and all(map(models.keeps_documents_apart, (*self.teachers, model)))
        kind, others = self._kind_of_trainer(chosen)
        try:
            trainer = kind(
                loss=chosen.loss,
                vocab_size=self.vocab_size,
                shift=True,  # of whatever class: it was loaded as a causal language model
                model=model,
                args=_arguments(chosen, folder, self.device, self.dtype, **arguments),
                train_dataset=self.training,
                eval_dataset=self.held_out,
                **others,
            )
        except Indivisible as error:
            raise Usage(str(error)) from None
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _kind_of_trainer(
        self, chosen: settings.UserModels
    ) -> tuple[type[DistillationTrainer], dict[str, Any]]:
        """A Trainer, and what it is told of the teacher."""
        if self.teacher_tokens is not None:
            from .cross import CrossTokenizerTrainer

            return CrossTokenizerTrainer, {
                "teacher": self.teachers,
                "shared": shared_tokens(self.tokens.get_vocab(), self.teacher_tokens.get_vocab()),
                "teacher_vocab_size": models.vocabulary(self.teacher_tokens, 0),
                "distance": chosen.cross_tokenizer,
                "data_collator": aligned.collate,
            }
        from fastkd.integrations.transformers import DistillationTrainer

        return DistillationTrainer, {
            "teacher": self.cache if self.cache is not None else self.teachers or None,
            "teacher_weights": parsing.weights(chosen.teacher_weights),
            "heads": chosen.chunked_logits,
            "on_policy": _on_policy(chosen, self.tokens.eos_token_id),
            "tensor_parallel": chosen.tensor_parallel,
            "data_collator": partial(sequences.collate, separate=self.separate),
        }

    def student(
        self, chosen: settings.UserModels, checkpoint: Path | None = None
    ) -> tuple[Any, torch.dtype]:
        """The model, and the precision that it came in: of adapters, fp32."""
        if chosen.lora:
            adapters = parsing.lora(chosen.lora)
            name, again = chosen.student, chosen.checkpointing
            model = models.adapted(name, self.dtype, adapters, chosen.seed, again, checkpoint)
            return model, torch.float32
        model, came = models.student(str(checkpoint or chosen.student), chosen.seed)
        if chosen.quantize:
            quantised.prepare(model, chosen.quantize)
        if chosen.checkpointing:
            models.recompute(model)
        return model, came

    @property
    def cited(self) -> list[str]:
        """The name of whom the cache cites."""
        return [str(self.cache.manifest.about.get("teacher", "a teacher"))] if self.cache else []

    def known_teacher(self, student: Any) -> str:
        """Changes with the teacher; that of adapters is the student without them."""
        if self.cache is not None:
            return str(self.cache.manifest.key())
        return " ".join(map(models.fingerprint, self.teachers or [student]))


def set_up(chosen: settings.UserModels) -> torch.device:
    """Makes transformers quiet, takes the threads that were asked for; the device."""
    from transformers import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    return pick(chosen.device)


def _check_machine(chosen: settings.UserModels) -> None:
    """Refuses what it has no processes, packages or devices for."""
    processes, share = int(os.environ.get("WORLD_SIZE", 1)), chosen.tensor_parallel
    if chosen.fsdp and processes == 1:
        raise Usage("fsdp: there is one process: start several by torchrun, or leave it out")
    try:
        check_processes(share, processes)
    except Indivisible as error:
        raise Usage(str(error)) from None
    quantised.check(chosen.teacher_precision, chosen.quantize)
    placement(chosen.teacher_device)
    if chosen.sampling_server:
        _reach(chosen.sampling_server)


def precision(wanted: str, device: torch.device) -> torch.dtype:
    """bf16 where it is asked for, or where the device computes in it."""
    able = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    bf16 = wanted == "bf16" or (wanted == "auto" and able)
    return torch.bfloat16 if bf16 else torch.float32


def _on_policy(chosen: settings.UserModels, end: int | None) -> OnPolicy | None:
    if not chosen.on_policy:
        return None
    from fastkd.integrations.on_policy import OnPolicy

    return OnPolicy(
        chosen.on_policy,
        chosen.sampling_temperature,
        chosen.top_p,
        chosen.completion_length,
        chosen.prompt_length,
        () if end is None else (end,),
        chosen.sampling_server,
    )


def _reach(server: str) -> None:
    from fastkd.integrations.served import Server, ServerError

    try:
        Server(server, patience=10).model()
    except ServerError as error:
        raise Usage(f"sampling_server: {one_line(error)}") from None


def _check_optimizer(chosen: settings.UserModels, arguments: TrainingArguments) -> None:
    """Refuses one, or a schedule, that needs a package or an option which is not there."""
    from transformers import Trainer, get_scheduler

    one = torch.nn.Linear(1, 1)
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        dummy = torch.optim.SGD(one.parameters(), arguments.learning_rate)
        get_scheduler(arguments.lr_scheduler_type, dummy, 0, 1)
    except (ImportError, TypeError, ValueError) as error:
        both = f"optimizer {chosen.optimizer}, lr_schedule {chosen.lr_schedule}"
        raise Usage(f"{both}: {one_line(error)}") from None
    if chosen.fsdp and kind is torch.optim.SGD and not options.get("momentum"):
        raise Usage(
            f"optimizer {chosen.optimizer} keeps nothing of the steps before, and with --fsdp "
            "PyTorch cannot load what is empty, so that no run goes on: take another"
        )


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
            fsdp=chosen.fsdp or None,  # type: ignore[arg-type]  # True is the newer spelling
            **others,
        )
    except ValueError as error:  # a name that transformers does not know
        raise Usage(one_line(error)) from None
    if chosen.fsdp:
        _fsdp2(arguments, dtype)
    if "WORLD_SIZE" not in os.environ:
        arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs are for torchrun
    return arguments


def _fsdp2(arguments: TrainingArguments, dtype: torch.dtype) -> None:
    """What accelerate is told, the same by all versions of transformers."""
    from accelerate.utils import DistributedType
    from torch.distributed.fsdp import MixedPrecisionPolicy

    arguments.fsdp_plugin_args = {
        "fsdp_version": 2,
        "auto_wrap_policy": "transformer_based_wrap",
        "reshard_after_forward": True,
        "state_dict_type": "FULL_STATE_DICT",  # saves are those of one process
        "cpu_ram_efficient_loading": False,
    }
    if dtype != torch.float32:  # gradients are summed in fp32, as by DDP
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        arguments.fsdp_plugin_args["mixed_precision_policy"] = policy
    if arguments.device.type == "cpu":  # there accelerate would take DDP in silence
        arguments.distributed_state.distributed_type = DistributedType.MULTI_GPU
