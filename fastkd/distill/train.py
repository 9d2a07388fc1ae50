"""Training of the default job: the teacher, then a student by each method, on the same batches."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.functional import distillation_loss

from . import measure, settings
from .corpus import Corpus
from .errors import RunError
from .gpt import GPT, Shape, optimizer
from .methods import EAGER, FASTKD, FIGURES, HARD, TEACHER, Loss, methods, needs_teacher

# The teacher sees other batches than the students: both draw from the seed, under these names.
TEACHER_BATCHES, STUDENT_BATCHES = 1, 2
# Rows of held-out text that are evaluated at once.
EVALUATED = 1024

Row = dict[str, Any]


def rate(step: int, steps: int, peak: float) -> float:
    """The learning rate: up in a straight line, then down along a cosine."""
    warm = max(1, steps // 20)
    return peak * min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _finite(name: str, loss: float, step: int) -> float:
    if not math.isfinite(loss):
        raise RunError(f"the loss of {name} is {loss} at step {step}: lower the learning rate")
    return loss


class Training:
    """Teacher, students, and all that was measured; each step is a function of what it holds."""

    def __init__(
        self,
        chosen: settings.DefaultJob,
        corpus: Corpus,
        device: torch.device,
        names: Sequence[str] = (HARD, EAGER, FASTKD),
    ) -> None:
        self.settings, self.corpus, self.device = chosen, corpus, device
        self.lesson = corpus.share(chosen.student_share)  # what the students see
        self.teacher = self._model(chosen.teacher_width, chosen.teacher_layers)
        self.students = {
            method: self._model(chosen.student_width, chosen.student_layers) for method in names
        }
        self._optimizers = {
            name: optimizer(model, chosen.learning_rate) for name, model in self._models().items()
        }
        self.teacher_step = self.step = 0
        self.rows: list[Row] = []
        # Of fastkd's loss and the other spelling's, the largest relative difference in all steps:
        # on the same logits, and between the two students, which rounding drives apart.
        self.difference = self.drift = 0.0
        # Of every step, in seconds: by method, the whole of it and the loss with its gradient.
        self.seconds: dict[str, list[list[float]]] = {method: [] for method in self.students}

    def _model(self, width: int, layers: int) -> GPT:
        shape = Shape(
            self.corpus.vocabulary,
            self.settings.sequence_length,
            width,
            layers,
            self.settings.heads,
        )
        torch.manual_seed(self.settings.seed)  # so all students begin alike
        return GPT(shape).to(self.device)

    def losses(self, step: int) -> dict[str, Loss]:
        return methods(self.settings.loss(step, self.settings.steps))

    def _models(self) -> dict[str, GPT]:
        return {TEACHER: self.teacher, **self.students}

    def _batch(self, which: int, step: int) -> tuple[Tensor, Tensor]:
        chosen = self.settings
        seed = 10 * chosen.seed + which
        text = self.corpus if which == TEACHER_BATCHES else self.lesson
        ids, labels = text.batch(seed, step, chosen.batch_size, chosen.sequence_length)
        return ids.to(self.device), labels.to(self.device).flatten()

    def _update(self, name: str, step: int, steps: int) -> None:
        for group in self._optimizers[name].param_groups:
            group["lr"] = rate(step, steps, self.settings.learning_rate)
        self._optimizers[name].step()
        self._optimizers[name].zero_grad()

    # --- steps -------------------------------------------------------------------------------

    def train_teacher(self) -> float:
        """One step of the teacher, on hard labels; its loss."""
        ids, labels = self._batch(TEACHER_BATCHES, self.teacher_step)
        loss = F.cross_entropy(self.teacher(ids).flatten(0, 1), labels)
        loss.backward()
        self._update(TEACHER, self.teacher_step, self.settings.teacher_steps)
        self.teacher_step += 1
        return _finite("the teacher", loss.item(), self.teacher_step)

    def train_students(self) -> dict[str, float]:
        """One step of each student, on the same batch; their losses."""
        ids, labels = self._batch(STUDENT_BATCHES, self.step)
        began = measure.now(self.device)
        teacher = self._teach(ids)
        of_teacher = measure.now(self.device) - began
        losses, names = self.losses(self.step), list(self.students)
        turn = self.step % len(names)  # so none is always the one that finds the cache warm
        values = {}
        for method in names[turn:] + names[:turn]:
            started = measure.now(self.device)
            logits = self.students[method](ids)
            before = measure.now(self.device)
            value, gradient = measure.gradient(
                losses[method], logits.flatten(0, 1), teacher, labels
            )
            after = measure.now(self.device)
            logits.backward(gradient.view_as(logits))
            self._update(method, self.step, self.settings.steps)
            total = measure.now(self.device) - started + needs_teacher(method) * of_teacher
            self.seconds[method].append([total, after - before])
            values[method] = _finite(method, value.item(), self.step + 1)
            if method == FASTKD and EAGER in names:
                with torch.no_grad():
                    other = losses[EAGER](logits.detach().flatten(0, 1), teacher, labels).item()
        if EAGER in names:
            self._compare(values[FASTKD], other, values[EAGER])
        self.step += 1
        values = {method: values[method] for method in names}
        self._log(values)
        return values

    @torch.no_grad()
    def _teach(self, ids: Tensor) -> Tensor:
        """The teacher's logits [N, V]; no rows where hard labels alone are learnt."""
        if not any(map(needs_teacher, self.students)):
            return torch.empty(0, self.corpus.vocabulary, device=self.device)
        return self.teacher(ids).flatten(0, 1)

    def _compare(self, value: float, other: float, apart: float) -> None:
        self.difference = max(self.difference, abs(value - other) / abs(other))
        self.drift = max(self.drift, abs(value - apart) / abs(apart))

    def _log(self, values: dict[str, float]) -> None:
        chosen, ends = self.settings, self.step in (1, self.settings.steps)
        evaluated = self.step % chosen.evaluate_every == 0 or self.step == chosen.steps
        if not (ends or evaluated or self.step % chosen.log_every == 0):
            return
        found = self.evaluate() if evaluated else {}
        temperature = chosen.loss(self.step - 1, chosen.steps)["temperature"]
        for method, value in values.items():
            row = {
                "step": self.step,
                "way": method,
                "loss": value,
                "seed": chosen.seed,
                "learning_rate": chosen.learning_rate,
            }
            if needs_teacher(method):
                row["temperature"] = temperature
            self.rows.append({**row, **found.get(method, {})})

    # --- what came of it -----------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self) -> dict[str, dict[str, float]]:
        """FIGURES of the students, or of the teacher where there are none."""
        ids, labels = self.corpus.held_out(self.settings.sequence_length)
        size = max(1, EVALUATED // self.settings.sequence_length)
        models = self.students or {TEACHER: self.teacher}
        sums = {name: torch.zeros(3, dtype=torch.float64) for name in models}
        for some, wanted in zip(ids.split(size), labels.split(size), strict=True):
            some, wanted = some.to(self.device), wanted.to(self.device)
            teacher = self.teacher(some)
            for name, model in models.items():
                student = teacher if model is self.teacher else model(some)
                _, found = distillation_loss(student, teacher, wanted, return_metrics=True)
                assert found.ce is not None  # since labels are given
                parts = (found.ce, found.kd, found.agreement)
                sums[name] += torch.stack([part.sum().double().cpu() for part in parts])
        return {
            name: dict(zip(FIGURES, (total / labels.numel()).tolist(), strict=True))
            for name, total in sums.items()
        }

    @torch.no_grad()
    def sample(self, model: GPT, prompt: Tensor, count: int) -> Tensor:
        """Token ids [count] that the model says after the prompt [n], at a temperature of 0.7."""
        draw, ids = torch.Generator().manual_seed(self.settings.seed), prompt
        for _ in range(count):
            seen = ids[-self.settings.sequence_length :].to(self.device)
            probabilities = (model(seen[None])[0, -1].cpu() / 0.7).softmax(-1)
            ids = torch.cat([ids, probabilities.multinomial(1, generator=draw)])
        return ids[len(prompt) :]

    def costs(self) -> dict[str, dict[str, float]]:
        """Each method's milliseconds of a step, the loss's share of them, and its peak bytes."""
        ids, labels = self._batch(STUDENT_BATCHES, 0)
        with torch.no_grad():
            teacher = self.teacher(ids).flatten(0, 1)
            student = next(iter(self.students.values()))(ids).flatten(0, 1)
        found = {}
        for method in self.students:
            total, part = (
                statistics.median(column) for column in zip(*self.seconds[method], strict=True)
            )
            loss = self.losses(step=0)[method]
            call = partial(measure.gradient, loss, student, teacher, labels)
            call()  # what is allocated once is no part of its peak
            found[method] = {
                "step_ms": 1e3 * total,
                "loss_ms": 1e3 * part,
                "loss_share": part / total,
                "loss_peak_bytes": measure.peak_memory(call, self.device),
            }
        return found

    # --- checkpoints ---------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return {
            "fingerprint": self.corpus.fingerprint(),
            "models": {name: model.state_dict() for name, model in self._models().items()},
            "optimizers": {name: each.state_dict() for name, each in self._optimizers.items()},
            "teacher_step": self.teacher_step,
            "step": self.step,
            "rows": self.rows,
            "differences": [self.difference, self.drift],
            "seconds": self.seconds,
        }

    def load(self, state: dict[str, Any]) -> None:
        if state["fingerprint"] != self.corpus.fingerprint():
            raise RunError(
                "the text or its tokenizer is another than when this run began "
                "(another Python? a changed file?): start again"
            )
        for name, model in self._models().items():
            model.load_state_dict(state["models"][name])
            self._optimizers[name].load_state_dict(state["optimizers"][name])
        self.teacher_step, self.step = state["teacher_step"], state["step"]
        self.rows, self.seconds = state["rows"], state["seconds"]
        self.difference, self.drift = state["differences"]
