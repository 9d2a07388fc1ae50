"""Distillation in the Trainer of transformers: one with a teacher, and a loss for any other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import require

require("transformers", "5.2", "6", extra="distill")
require("accelerate", "1.10", "2", extra="distill")

from fastkd.cache import TeacherCache  # noqa: E402
from fastkd.divergences import Bernoulli  # noqa: E402
from fastkd.functional import Metrics, distillation_loss  # noqa: E402
from fastkd.operands import Ensemble, LinearHead, Sampled, TopK  # noqa: E402

from .learnt import LossTrainer, leaves, outside  # noqa: E402
from .models import (  # noqa: E402
    ROW,
    TARGETS,
    by_sequence,
    counted,
    evaluating,
    freeze,
    head_of,
    is_causal,
    logits_of,
    model_inputs,
    targets,
)
from .on_policy import OnPolicy  # noqa: E402
from .settings import KEYWORDS, Settings, by_step, fixed, known, refuse_without_meaning  # noqa: E402
from .teachers import asked, check, check_all  # noqa: E402

Operand = Tensor | LinearHead | TopK | Sampled | Ensemble


class DistillationTrainer(LossTrainer):
    r"""Trains a student against a teacher that sees the same inputs.

    The loss is that of `distillation_loss`, divided by the tokens that count in all batches of an
    optimizer step, over all processes: accumulation and processes change nothing in the gradient.
    Rows of the log hold the loss of their step and, per token of it, `kd` (the divergence), `ce`,
    `student_entropy`, `teacher_entropy` and `agreement` (top-1).

    Args:
        teacher: a model whose logits are over the student's vocabulary. It is moved to the
            student's device, frozen, and set to evaluation. None takes the student itself with
            its peft adapters off: one copy of the weights. A `fastkd.TeacherCache` is asked for
            the rows that a batch names as `row`, [B]. Of a list, the mixture teaches:
            `fastkd.Ensemble`.
        teacher_weights: of a list of teachers; None: equal.
        loss: arguments of `distillation_loss`; or a function of (step, steps of the run) that
            returns them, so that a schedule goes on where a resumed run does. A tensor there that
            trains, as a learnable temperature, is in the optimizer, in a group without weight
            decay, and in checkpoints; `max_grad_norm` is the student's alone.
        vocab_size: columns from here on are padding.
        heads: of models whose logits are a linear head's, hand on hidden states and head in place
            of logits, which then are never in memory as a whole.
        on_policy: a share of the steps, in which the student learns from what it writes itself.
        tensor_parallel: so many neighbouring processes see the same batches, and divide the columns
            of both output heads and all that is made of them; the weights stay whole, or FSDP's.
        shift: whether the logits at a place predict the label of the next one; None does as the
            model's own loss, which shifts in causal language models. Batches with `shift_labels`
            are taken as they are.
        options: those of Trainer. `label_smoothing_factor` smooths the cross-entropy, if any.

    Raises:
        ValueError: for what of the Trainer has no meaning here.

    Example:
        >>> import tempfile, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
        >>> from fastkd.integrations.transformers import DistillationTrainer
        >>> shape = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=16,
        ...                     num_hidden_layers=1, num_attention_heads=2)
        >>> ids = torch.randint(50, (8, 12))
        >>> rows = [{"input_ids": row, "labels": row} for row in ids]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     arguments = TrainingArguments(folder, max_steps=1, save_strategy="no",
        ...                                   use_cpu=True, report_to="none")
        ...     trainer = DistillationTrainer(
        ...         model=LlamaForCausalLM(shape), teacher=LlamaForCausalLM(shape),
        ...         loss={"temperature": 2.0, "alpha": 0.9}, args=arguments, train_dataset=rows)
        >>> trainer.train()  # doctest: +ELLIPSIS
        {...
        TrainOutput(global_step=1, ...
    """

    loss_is_scaled_for_ga = True
    heads = False

    def __init__(
        self,
        *arguments: Any,
        teacher: Any,
        teacher_weights: Sequence[float] | None = None,
        loss: Settings | Mapping[str, Any] | None = None,
        vocab_size: int | None = None,
        shift: bool | None = None,
        heads: bool = True,
        on_policy: OnPolicy | None = None,
        tensor_parallel: int = 1,
        **options: Any,
    ) -> None:
        for name in KEYWORDS & options.keys():
            raise TypeError(f"{name} is an argument of the loss: pass loss={{{name!r}: ...}}")
        super().__init__(*arguments, **options)
        refuse_without_meaning(self)
        self.model_accepts_loss_kwargs = True  # so that the tokens are counted
        if self.accelerator.mixed_precision == "bf16":
            # accelerate's own autocast would copy the student's logits to fp32.
            self.accelerator.native_amp = False
        # Older transformers let accelerate divide by the batches of a step once more.
        self.accelerator.gradient_accumulation_steps = 1
        self.loss = by_step(loss)
        self.vocab_size = vocab_size
        self.shift = is_causal(self.model) if shift is None else shift
        self.step_figures: dict[int, Tensor] = {}  # the latest step's, summed over its batches
        teachers = list(teacher) if isinstance(teacher, list | tuple) else [teacher]
        check_all(teachers, teacher_weights, self.model)
        self.teacher_weights = teacher_weights
        if not isinstance(on_policy, OnPolicy | None):
            got = type(on_policy).__name__
            raise TypeError(f"on_policy must be an OnPolicy, got {got}: pass OnPolicy(share=...)")
        cached = any(isinstance(each, TeacherCache) for each in teachers)
        if on_policy is not None and (cached or not self.shift):
            raise ValueError(
                "on_policy needs a teacher that reads what the student writes, and models that "
                "write: no TeacherCache, and causal language models"
            )
        self.on_policy, self.own_words = on_policy, False
        self.heads = heads = heads and not self._sharded()
        self.student_head = head_of(self.model) if heads else None
        self._divide_vocabulary(tensor_parallel)
        sharded = self._fsdp_version() == 2
        self.teachers = [
            self._without_adapters
            if each is None
            else asked(each, self.args.device, heads, sharded)
            for each in teachers
        ]

    def call_model_init(self, trial: Any = None) -> Any:
        """A new student for each run, with a head of its own."""
        model = super().call_model_init(trial)
        self.student_head = head_of(model) if self.heads else None
        return model

    def _set_signature_columns_if_needed(self) -> None:
        """What the loss reads stays in the batches, whatever the model's forward takes."""
        super()._set_signature_columns_if_needed()
        self._signature_columns: Any = list({*(self._signature_columns or ()), *TARGETS, ROW})

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        labels = targets(inputs, self.shift)
        teacher = self.teacher_logits(inputs)
        outputs = self.student_outputs(model, inputs) if return_outputs else None
        student = self.student_logits(model, inputs) if outputs is None else logits_of(outputs)
        given = self.settings_of_step()
        settings = {
            **self._vocabulary(),
            "num_items": num_items_in_batch,
            "label_smoothing": self.args.label_smoothing_factor,
            # Nobody reads the student's logits again; fp16 gradients wait for the loss scale.
            "inplace": outputs is None
            and isinstance(student, Tensor)
            and student.dtype != torch.float16
            and given.get("gradient") != "backward"
            and not leaves(given),
            "return_metrics": True,
            **given,
        }
        if self.own_words:
            settings["alpha"] = 1.0  # what the student wrote is no label
        with self._precision(of=student):
            loss, metrics = distillation_loss(self._mine(student), teacher, labels, **settings)
        scale = self._divided(num_items_in_batch)
        if torch.is_grad_enabled():  # else it is a prediction, between steps
            self._keep(loss, metrics, labels, num_items_in_batch, scale)
        loss = loss * scale
        return (loss, outputs) if return_outputs else loss

    def student_outputs(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        with self._precision():
            return model(**model_inputs(inputs, self.model))

    def student_logits(self, model: Any, inputs: Mapping[str, Any]) -> Tensor | LinearHead:
        if self.student_head is None:
            return logits_of(self.student_outputs(model, inputs))
        with self._precision():
            return self.student_head(model, model_inputs(inputs, self.model))

    @torch.no_grad()
    def teacher_logits(self, inputs: Mapping[str, Any]) -> Operand:
        said = [self._mine(teacher(inputs)) for teacher in self.teachers]
        return said[0] if len(said) == 1 else Ensemble(said, self.teacher_weights)

    def _without_adapters(self, inputs: Mapping[str, Any]) -> Tensor | LinearHead:
        student = self.accelerator.unwrap_model(self.model)
        with evaluating(student), student.disable_adapter():
            return self.student_logits(student, inputs)

    def _precision(self, of: Any = None) -> torch.autocast:
        """Where the student runs, and the products of its head; logits stay as they are."""
        bf16 = self.accelerator.mixed_precision == "bf16" and not isinstance(of, Tensor)
        return torch.autocast(self.args.device.type, torch.bfloat16, enabled=bf16)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The batches; in a step on policy, what the student writes from their prompts."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        step = self.state.global_step
        self.own_words = self.on_policy is not None and self.on_policy.at(step, self.args.seed)
        if self.on_policy is not None and self.own_words and batches:
            student = self.accelerator.unwrap_model(self.model)
            process = self.args.process_index // self._sharing()
            with self._precision(), self.on_policy.random(self.args.seed, step, process):
                batches = [
                    self.on_policy.written(student, self._prepare_inputs(batch), self.vocab_size)
                    for batch in batches
                ]
            items = self._get_num_items_in_batch(batches, device)
        return batches, items

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """The tokens that the loss counts, whatever this version of the Trainer would count."""
        found = [counted(targets(batch, self.shift), self._several()) for batch in batch_samples]
        batches = [dict.fromkeys(TARGETS, torch.where(places, 0, -100)) for places in found]
        return super()._get_num_items_in_batch(batches, device)

    def _several(self) -> bool:
        """Whether the loss has a sigmoid for each class, and labels one answer for each."""
        step, steps = self.state.global_step, max(self.state.max_steps, 1)
        return isinstance(self.loss(step, steps).get("divergence"), Bernoulli)

    def _keep(self, loss: Tensor, metrics: Metrics, labels: Tensor, items: Any, scale: int) -> None:
        if items is None:
            items = counted(labels, self._several()).sum()
        items = torch.as_tensor(items).clamp_min(1)  # a student may write nothing at all
        parts = torch.stack([rows.sum() for rows in metrics if rows is not None]) / items
        figures = torch.cat([loss.detach()[None], parts]) * scale
        step = self.state.global_step
        self.step_figures = {step: self.step_figures.get(step, 0.0) + figures}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs this step's figures: a mean since the last row would change where a run stops."""
        if "loss" in logs:
            (figures,) = self.step_figures.values()
            names = ("loss", *Metrics._fields)
            values = self.accelerator.reduce(figures, "mean").tolist()
            logs.update(zip(names, values, strict=True))
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Per token of held-out text: loss in nats, KL to the teacher in nats, top-1 agreement.

        The first is there as `eval_loss` too, by which the Trainer finds its best model.
        """
        datasets = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(datasets, dict):
            several: dict[str, float] = {}
            for name, dataset in datasets.items():
                several |= self.evaluate(dataset, ignore_keys, f"{metric_key_prefix}_{name}")
            return several
        model = self.accelerator.unwrap_model(self.model)
        rows = []
        with evaluating(model):
            for batch in self.get_eval_dataloader(eval_dataset):
                sums = self._sums(model, self._prepare_inputs(batch))
                rows.append(self._gathered(sums))
        total = torch.cat(rows).double().sum(0) if rows else torch.zeros(4)
        if not total[3]:
            raise ValueError(
                "there is nothing to evaluate on: the dataset is empty, or all its labels are -100"
            )
        names = ("validation_loss", "kl_to_teacher", "agreement")
        means = (total[:3] / total[3]).tolist()
        values = {f"{metric_key_prefix}_{n}": mean for n, mean in zip(names, means, strict=True)}
        self.log(values)
        values[f"{metric_key_prefix}_loss"] = values[f"{metric_key_prefix}_validation_loss"]
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, values
        )
        return values

    def _sums(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Each sequence's cross-entropy, KL to the teacher, agreement, and places, [B, 4]."""
        labels = targets(inputs, self.shift)
        student = self.student_logits(model, inputs)
        with self._precision(of=student):
            _, found = distillation_loss(
                self._mine(student),
                self.teacher_logits(inputs),
                labels,
                divergence=Bernoulli() if self._several() else "forward_kl",
                return_metrics=True,
                **self._vocabulary(),
            )
        assert found.ce is not None  # since labels are given
        parts = (found.ce, found.kd, found.agreement, counted(labels, self._several()))
        return torch.stack([by_sequence(part) for part in parts], -1)


def distillation_loss_func(
    student: Any, teacher: Any, *, shift: bool | None = None, **settings: Any
) -> Callable[..., Tensor]:
    """A `compute_loss_func` for any Trainer: `Trainer(model, compute_loss_func=...)`.

    The Trainer hands such a function the student's outputs only; so a hook on the student keeps
    its inputs, which the teacher then sees too. `DistillationTrainer` saves a copy of the logits
    in bf16, and logs more. The count of tokens is the Trainer's: that of older versions has the
    first token of a sequence too, unless its label is -100.

    Args:
        student: the model that the Trainer trains.
        teacher: frozen here, set to evaluation, and moved to where the inputs are.
        shift: as in `DistillationTrainer`.
        settings: those of `distillation_loss`.

    Raises:
        ImportError: before transformers 5.6, whose Trainer divides such a loss by the batches of
            a step once more.

    Returns:
        loss(outputs, labels, num_items_in_batch=None), a 0-d tensor: sum / num_items_in_batch, or
        the mean over the tokens of this batch where the Trainer has no count.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from fastkd.integrations.transformers import distillation_loss_func
        >>> shape = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=16,
        ...                     num_hidden_layers=1, num_attention_heads=2)
        >>> student, teacher = LlamaForCausalLM(shape), LlamaForCausalLM(shape)
        >>> loss = distillation_loss_func(student, teacher, temperature=2.0)
        >>> ids = torch.randint(50, (2, 12))
        >>> loss(student(input_ids=ids), ids, num_items_in_batch=22).shape
        torch.Size([])
    """
    require("transformers", "5.6", "6", extra="distill")
    known(settings)
    fixed(settings)
    if outside(student, settings):
        raise ValueError(
            "the loss learns a tensor, and a Trainer trains its model's parameters alone: make it "
            "one of the student's, or take DistillationTrainer, which trains it too"
        )
    if not isinstance(teacher, nn.Module):
        raise TypeError(f"teacher must be a model, got {type(teacher).__name__}")
    check(teacher, student)
    shifts = is_causal(student) if shift is None else shift
    freeze(teacher, None)
    kept: dict[str, Any] = {}

    def keep(module: Any, positional: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        kept.update(inputs)

    def loss(
        outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        if not kept:
            raise ValueError(
                "the student given to distillation_loss_func has not run: give it the model that "
                "the Trainer trains"
            )
        inputs = dict(kept)
        kept.clear()
        shifted = targets({**inputs, "labels": labels}, shifts)
        logits = logits_of(outputs)
        if next(teacher.parameters()).device != logits.device:
            freeze(teacher, logits.device)
        with torch.no_grad():
            target = logits_of(teacher(**model_inputs(inputs, teacher)))
        items: Any = num_items_in_batch
        if items is not None and shifted.shape == logits.shape:
            items = items // shifted.size(-1)  # it counts each class
        options = {"num_items": items, **settings}
        return distillation_loss(logits, target, shifted, **options)

    student.register_forward_pre_hook(keep, with_kwargs=True)
    return loss
