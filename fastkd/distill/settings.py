"""Every setting of `fastkd distill`: its default, its option, what it may be."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from fastkd.cross_tokenizer import summed

from .errors import Usage, in_range, known
from .files import find
from .hub import PREFIX
from .parsing import DIVERGENCES, SCHEDULES, divergence, lora, schedule, weights
from .quantised import STUDENTS, TEACHERS

S = TypeVar("S", bound="Common")

# Of steps and the like; torch and NumPy take seeds of this size, and of a few more.
COUNT = "[1, 2147483647]"
PATHS = ("data", "eval_data", "teacher", "teacher_cache", "student", "chat_template")


def setting(default: Any, text: str, within: str = "") -> Any:
    """A field; of a number, with the interval that it lies in, as in '(0, 1]'."""
    return field(default=default, metadata={"help": text, "within": within})


def check_ranges(settings: Any) -> None:
    """Refuses numbers outside of their intervals."""
    for item in dataclasses.fields(settings):
        if item.metadata["within"]:
            in_range(item.name, getattr(settings, item.name), item.metadata["within"])


@dataclass(frozen=True, kw_only=True)
class Common:
    """What both jobs take."""

    data: tuple[str, ...] = setting(
        (),
        "files, folders and patterns of text to train on; with --teacher, of rows too (.jsonl, "
        ".csv, .parquet), of conversations, and data sets of the hub, as in hf:owner/name@v1:train",
    )
    divergence: str = setting(
        "forward_kl",
        f"of teacher and student, one of {', '.join(DIVERGENCES)}; numbers follow, as in jsd:0.1",
    )
    temperature: str = setting(
        "2",
        f"of both, in the divergence: a number, or a schedule from one to another, as in "
        f"cosine:8,1; schedules are {', '.join(SCHEDULES)}",
    )
    teacher_temperature: str = setting("", "of the teacher, where it is another; likewise")
    scale_by_temperature: bool = setting(True, "multiply the divergence by both, as Hinton by T^2")
    standardize: bool = setting(False, "z-scores instead of logits, on both sides")
    alpha: float = setting(
        0.9, "share of the divergence; the rest is cross-entropy with the text", "[0, 1]"
    )
    entropy_weight: float = setting(
        0.0, "of the student's entropy: above 0 sharpens it", "[-1000, 1000]"
    )
    steps: int = setting(
        200, "optimizer steps of the student; with --teacher, 0: as many as --epochs takes", COUNT
    )
    batch_size: int = setting(8, "sequences in a batch, for each device", "[1, 65536]")
    sequence_length: int = setting(64, "tokens in a sequence", "[2, 1048576]")
    learning_rate: float = setting(4e-3, "of the student, at its peak", "(0, 1000]")
    log_every: int = setting(10, "steps between rows of metrics.csv", COUNT)
    evaluate_every: int = setting(50, "steps between evaluations on held-out text", COUNT)
    save_every: int = setting(50, "steps between saves, from which --resume goes on", COUNT)
    seed: int = setting(0, "of weights and batches", "[0, 2147483647]")
    device: str = setting("auto", "cpu, cuda, or auto: a GPU where there is one")

    def check(self) -> None:
        """Refuses values out of range, each with the range."""
        check_ranges(self)
        known("device", self.device, ("auto", "cpu", "cuda"))
        self.loss(step=0, steps=1)

    def loss(self, step: int, steps: int) -> dict[str, Any]:
        """The arguments of `distillation_loss` at a step of a run of so many."""
        of_teacher = self.teacher_temperature or self.temperature
        return {
            "divergence": divergence(self.divergence),
            "temperature": schedule(self.temperature, steps)(step),
            "teacher_temperature": schedule(of_teacher, steps)(step),
            "scale_by_temperature": self.scale_by_temperature,
            "standardize": self.standardize,
            "alpha": self.alpha,
            "entropy_weight": self.entropy_weight,
        }


@dataclass(frozen=True, kw_only=True)
class DefaultJob(Common):
    """The default job: teacher and student are small GPTs, trained here."""

    vocabulary: int = setting(
        2048, "tokens of the tokenizer that is trained on the text", "[257, 1048576]"
    )
    student_share: float = setting(
        0.1, "share of the text that the students see; the teacher: all", "(0, 1]"
    )
    students: int = setting(3, "seeds that students of each method begin with", "[1, 1000]")
    teacher_steps: int = setting(600, "optimizer steps of the teacher", COUNT)
    teacher_width: int = setting(128, "of its hidden states", "[1, 65536]")
    teacher_layers: int = setting(2, "of its transformer", "[1, 1000]")
    student_width: int = setting(64, "of its hidden states", "[1, 65536]")
    student_layers: int = setting(2, "of its transformer", "[1, 1000]")
    heads: int = setting(4, "of the attention, in both", "[1, 65536]")
    threads: int = setting(1, "of the CPU; for models this small more help little", "[1, 1024]")

    def check(self) -> None:
        super().check()
        for name in ("teacher_width", "student_width"):
            if getattr(self, name) % self.heads:
                raise Usage(f"{name} must be a multiple of heads={self.heads}")


@dataclass(frozen=True, kw_only=True)
class UserModels(Common):
    """The user's models: Hugging Face causal language models."""

    teacher: tuple[str, ...] = setting(
        (), "folder or hub name of the teacher; of several, the mixture teaches"
    )
    teacher_weights: str = setting("", "of several teachers, as in 2,1; by default equal")
    teacher_precision: str = setting(
        "auto",
        "bf16, fp32, int8 (by torchao), llm_int8 or nf4 (by bitsandbytes), or auto: that of the "
        "student",
    )
    teacher_device: str = setting(
        "", "cpu, cuda:1, or auto: over all GPUs; by default, the student's"
    )
    teacher_cache: str = setting("", "folder of fastkd cache, in place of --teacher")
    teacher_tail: str = setting(
        "bucket", "what a cached top-k does not list: bucket, renormalize, drop or label"
    )
    student: str = setting("", "folder, hub name, or config.json (a new student) of the student")
    cross_tokenizer: str = setting(
        "",
        "learn from a teacher of another tokenizer: uld (sorted probabilities) or gold (the "
        "divergence on shared tokens, and uld on the others)",
    )
    quantize: str = setting(
        "", "train the student for linear layers of these bits: int8 or int4, as torchao has them"
    )
    lora: str = setting(
        "",
        "train low-rank adapters: their rank, alpha (twice that by default) and layers (all linear "
        "ones), as in 8,16,q_proj,v_proj; where teacher and student are one model, it teaches with "
        "its adapters off",
    )
    on_policy: float = setting(
        0.0, "share of the steps in which the student learns from what it writes itself", "[0, 1]"
    )
    sampling_temperature: float = setting(1.0, "at which it writes", "[0.001, 1000]")
    top_p: float = setting(
        1.0, "it writes of the likeliest tokens with this mass together", "(0, 1]"
    )
    completion_length: int = setting(128, "tokens that it writes at most", "[1, 1048576]")
    prompt_length: int = setting(16, "tokens of plain text that it goes on from", "[1, 1048576]")
    sampling_server: str = setting(
        "",
        "address of a server that writes in its place, by OpenAI's /v1/completions, as vLLM's: "
        "http://host:8000; it keeps the weights that it was started with",
    )
    chunked_logits: bool = setting(True, "make logits in chunks, where the models allow it")
    chunk_mib: int = setting(0, "memory of a chunk; 0: 512 on a GPU, 80 on a CPU", "[0, 1048576]")
    steps: int = setting(0, "optimizer steps; 0: as many as --epochs takes", "[0, 2147483647]")
    epochs: float = setting(1.0, "passes over the data", "(0, 1000000]")
    batch_size: int = setting(4, "sequences in a batch, for each device", "[1, 65536]")
    accumulation: int = setting(1, "batches in an optimizer step, for each device", "[1, 65536]")
    sequence_length: int = setting(512, "tokens that are packed into a sequence", "[2, 1048576]")
    learning_rate: float = setting(5e-5, "of the student, at its peak", "(0, 1000]")
    optimizer: str = setting("adamw_torch", "by its name in transformers: adafactor, lion_32bit...")
    weight_decay: float = setting(0.0, "of the optimizer", "[0, 1000]")
    lr_schedule: str = setting("cosine", "by its name in transformers: linear, constant...")
    warmup: float = setting(
        0.05, "share of the steps that the rate rises in; from 1 on: steps", "[0, 2147483647]"
    )
    clip: float = setting(1.0, "largest norm of the gradient; 0: any", "[0, 1000000]")
    evaluate_every: int = setting(500, "steps between evaluations on held-out text", COUNT)
    save_every: int = setting(100, "steps between saves, from which --resume goes on", COUNT)
    keep: int = setting(
        1, "saves to keep while it trains, besides the best on held-out text", COUNT
    )
    held_out: float = setting(
        0.05, "share of the sequences to evaluate on, without --eval-data", "(0, 1)"
    )
    eval_data: tuple[str, ...] = setting((), "as --data, to evaluate on")
    text: str = setting(
        "",
        "column of text or of messages; by default messages, prompt and completion, or text, "
        "whichever is there",
    )
    loss_on: str = setting(
        "completions", "of conversations: completions, last (completion), or all (turns)"
    )
    chat_template: str = setting("", "file with a chat template, instead of the tokenizer's own")
    special_tokens: bool = setting(True, "begin text as the tokenizer does, with <s> for example")
    end_of_text: bool = setting(True, "end text with the tokenizer's end token")
    parse_special_tokens: bool = setting(
        False, "read special tokens that are spelt in the text as such; conversations always do"
    )
    fsdp: bool = setting(False, "divide the models over the processes of torchrun, by FSDP2")
    tensor_parallel: int = setting(1, "processes that divide the vocabulary", "[1, 65536]")
    precision: str = setting("auto", "bf16, fp32, or auto: bf16 where the device has it")
    save_precision: str = setting("auto", "bf16, fp32, or auto: as the student came")
    checkpointing: bool = setting(False, "recompute the student's activations, to save memory")
    vocab_size: int = setting(
        0, "columns from here on are padding; 0: the tokenizer says", "[0, 2147483647]"
    )
    threads: int = setting(0, "of the CPU; 0: PyTorch's choice", "[0, 1024]")
    report_to: tuple[str, ...] = setting((), "trackers of transformers: tensorboard, wandb...")

    def check(self) -> None:
        super().check()
        given = weights(self.teacher_weights)
        if given is not None and len(given) != len(self.teacher):
            raise Usage(
                f"teacher_weights must be one for each of {len(self.teacher)} teachers, got "
                f"{len(given)}"
            )
        if given is not None and not (min(given) >= 0 and 0 < sum(given) < math.inf):
            raise Usage(f"teacher_weights must be at least 0, and not all 0, got {given}")
        self._check_adapters()
        self._check_on_policy()
        self._check_meaning()
        self._check_cross_tokenizer()
        if self.teacher and self.teacher_cache:
            raise Usage("--teacher-cache stands in place of --teacher: leave one of them out")
        known("teacher_tail", self.teacher_tail, ("bucket", "renormalize", "drop", "label"))
        for name in ("teacher", "student", "data"):
            if not getattr(self, name) and not (name == "teacher" and self.teacher_cache):
                raise Usage(f"--{name} is missing: --teacher, --student and --data go together")
        known("precision", self.precision, ("auto", "bf16", "fp32"))
        known("save_precision", self.save_precision, ("auto", "bf16", "fp32"))
        known("loss_on", self.loss_on, ("completions", "last", "all"))

    def loss(self, step: int, steps: int) -> dict[str, Any]:
        return super().loss(step, steps) | {"chunk_bytes": self.chunk_mib << 20 or None}

    def own_teacher(self) -> bool:
        """Whether the student without its adapters is the teacher."""
        itself = self.teacher == (self.student,) and not self.teacher_device
        return bool(self.lora) and itself and self.teacher_precision == "auto"

    def _check_meaning(self) -> None:
        """Refuses what was asked for and would do nothing beside the other settings."""
        writing = "sampling_server sampling_temperature top_p completion_length prompt_length"
        crossed = self.cross_tokenizer and "with cross_tokenizer it has no meaning, "
        cases = (
            (crossed, "teacher_cache", f"{crossed}a cache is of the student's tokens"),
            (crossed, "on_policy", f"{crossed}the student writes in its own tokens"),
            (crossed, "standardize", f"{crossed}the losses are of probabilities"),
            (crossed, "entropy_weight", f"{crossed}the losses have no such term"),
            (crossed, "tensor_parallel", f"{crossed}uld sorts all probabilities"),
            (crossed, "chunk_mib", f"{crossed}logits are made whole"),
            (crossed, "chat_template", f"{crossed}conversations are refused"),
            (not self.on_policy, writing, "without on_policy the student writes nothing"),
            (not self.teacher_cache, "teacher_tail", "it is of a teacher_cache"),
            (self.teacher_cache, "teacher_precision teacher_device", "no teacher is loaded"),
            (not self.chunked_logits, "chunk_mib", "without chunked_logits they are whole"),
            (not self.chunked_logits, "tensor_parallel", "without chunked_logits they are whole"),
            (self.eval_data, "held_out", "with eval_data nothing is held out"),
            (self.lr_schedule == "constant", "warmup", "lr_schedule constant has none"),
        )
        for vain, names, why in cases:
            for name in filter(self._given, names.split() if vain else ()):
                raise Usage(f"{name}: {why}: leave it out")

    def _given(self, name: str) -> bool:
        """Whether a setting is another than its default."""
        return getattr(self, name) != type(self).__dataclass_fields__[name].default

    def _check_adapters(self) -> None:
        known("teacher_precision", self.teacher_precision, ("auto", "bf16", "fp32", *TEACHERS))
        known("quantize", self.quantize, ("", *STUDENTS))
        known("cross_tokenizer", self.cross_tokenizer, ("", "uld", "gold"))
        if self.quantize and self.lora:
            raise Usage("quantize trains the weights themselves: leave --lora out")
        if not self.lora:
            return
        lora(self.lora)
        if self.own_teacher() and (self.alpha == 1 or self.on_policy):
            what = "alpha=1" if self.alpha == 1 else "on_policy"
            raise Usage(
                f"{what}: a student that is its own teacher learns from the labels of the data "
                "alone, and the divergence keeps it near to what it was: leave labels in"
            )

    def _check_on_policy(self) -> None:
        if self.sampling_server and not re.match("https?://", self.sampling_server):
            raise Usage(
                f"sampling_server must begin with http:// or https://, got {self.sampling_server!r}"
            )
        if self.on_policy and self.teacher_cache:
            raise Usage("on_policy: a cache knows nothing of what the student writes: --teacher")
        if self.on_policy and self.completion_length >= self.sequence_length:
            raise Usage(
                f"completion_length={self.completion_length} leaves no room for a prompt in "
                f"sequence_length={self.sequence_length}"
            )

    def _check_cross_tokenizer(self) -> None:
        if not self.cross_tokenizer:
            return
        if len(self.teacher) > 1:
            raise Usage(f"cross_tokenizer takes one teacher, got {len(self.teacher)}")
        if self.teacher == (self.student,):
            raise Usage("cross_tokenizer: teacher and student are one model: leave it out")
        if self.cross_tokenizer == "uld" and self._given("divergence"):
            raise Usage("divergence: uld has its own distance: leave it out, or take gold")
        try:
            summed(divergence(self.divergence))
        except ValueError as error:
            raise Usage(f"cross_tokenizer: {error}") from None


@dataclass(frozen=True, kw_only=True)
class Search:
    """How `fastkd tune` searches."""

    sampler: str = setting("tpe", "grid, random, or tpe")
    trials: int = setting(12, "settings to try, besides those that --out holds", "[1, 100000]")
    seeds: int = setting(4, "students for each, and for the comparison at the end", "[2, 1000]")

    def check(self) -> None:
        known("sampler", self.sampler, ("grid", "random", "tpe"))
        check_ranges(self)


# --- from names and values ---------------------------------------------------------------------


def build(kind: type[S], values: Mapping[str, Any]) -> S:
    """The settings of a job from names and values, all of them checked."""
    hints = get_type_hints(kind)
    other = UserModels if issubclass(kind, DefaultJob) else DefaultJob
    elsewhere = {item.name for item in dataclasses.fields(other)} - set(hints)
    checked = {}
    for name, value in values.items():
        _check_text(name, value)
        if name in elsewhere:
            whose = "the default job's" if other is DefaultJob else "for --teacher and --student"
            raise Usage(f"setting {name!r} is {whose}: leave it out here")
        known("setting", name, hints)
        checked[name] = _as(hints[name], name, value)
    settings = kind(**checked)
    settings.check()
    return settings


def _check_text(name: str, value: Any) -> None:
    """Refuses names of files in another encoding, which no TOML can hold."""
    for each in value if isinstance(value, list | tuple) else [value]:
        if isinstance(each, str) and re.search("[\ud800-\udfff]", each):
            raise Usage(f"{name} must be text in UTF-8, got {each!a}: rename it")


def _as(kind: Any, name: str, value: Any) -> Any:
    """The value where it is of the kind, as TOML means it; a number is a spelling too."""
    if kind in (float, str) and type(value) in (int, float):
        try:
            return kind(value)
        except (OverflowError, ValueError):  # of hundreds of digits
            raise Usage(f"{name} is a number of too many digits") from None
    if kind == tuple[str, ...]:
        value = [value] if isinstance(value, str) else value
        if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            return tuple(value)
    elif type(value) is kind:
        return value
    expected = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}
    raise Usage(f"{name} must be {expected.get(kind, 'a list of strings')}, got {value!r}")


def absolute(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with absolute paths, which a resumed run finds from any folder."""
    return {name: _path(name, each) if name in PATHS else each for name, each in values.items()}


def _path(name: str, value: Any) -> Any:
    if name in ("data", "eval_data"):
        names = [value] if isinstance(value, str) else value
        if isinstance(names, list | tuple) and all(isinstance(each, str) for each in names):
            find(names)
            return [each if each.startswith(PREFIX) else os.path.abspath(each) for each in names]
    if isinstance(value, list | tuple):
        return [_path("", each) for each in value]
    here = isinstance(value, str) and value and os.path.exists(value)
    return str(Path(value).resolve()) if here else value
