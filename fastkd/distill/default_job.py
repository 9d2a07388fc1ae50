"""The default job: a small teacher, students that learn from it, and a fair baseline.

The students see a share of the text that the teacher saw, which is where distillation is known to
pay. Hard labels have every advantage: the best of several learning rates, chosen on the held-out
text itself, and once as many steps as the distilled students, once twice as many. What a step costs
is measured while students of all methods take theirs in turn, so that a busy machine slows all.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from . import config, corpus, devices, files, report, storage
from .corpus import Corpus
from .documents import Counts
from .errors import Interrupted, RunError, Usage, needs
from .methods import EAGER, FASTKD, FIGURES, HARD, LONGER, TEACHER
from .settings import DefaultJob
from .train import Training

# Largest relative difference allowed between fastkd's loss and the other spelling's of it, both in
# fp32 on the same logits, in any step.
TOLERANCE = 1e-5
# Of the learning rate of the distilled students: what hard labels try besides that one.
RATES = (0.1, 0.3)


def run(chosen: DefaultJob, folder: Path, *, resume: bool = False) -> report.Result:
    """Trains, compares and saves; what came of it.

    Raises Interrupted, with a checkpoint in `folder`, on Ctrl-C; RunError where fastkd and F.kl_div
    do not agree, after everything is saved.
    """
    needs("tokenizers", "rich", "matplotlib", "safetensors")
    device = devices.pick(chosen.device)
    state = storage.load_checkpoint(folder) if resume else None
    config.check_same(chosen, state.get("settings", {}) if state else {})
    with repeatable(chosen.threads), Stop() as stop:
        found = files.find(chosen.data)
        text = corpus.prepare(
            found.files, chosen.vocabulary, chosen.sequence_length, chosen.student_share
        )
        check_memory(chosen, text.vocabulary, device)
        experiment = Experiment(chosen, text, device)
        if state is not None:
            experiment.load(state)
        if not resume:
            storage.write(folder / storage.CONFIG, config.text(chosen))
        for remark in Counts(passed_over=found.passed_over).remarks(0):
            report.say(remark)
        report.announce(experiment, folder)
        train(experiment, folder, stop)
        result = report.Result.of(experiment, TOLERANCE)
        report.save(result, experiment, folder)
    (folder / storage.CHECKPOINT).unlink(missing_ok=True)
    report.show(result, folder)
    if not result.agrees:
        raise RunError(f"fastkd and {result.other} do not agree; results are in {folder}")
    return result


def check_memory(chosen: DefaultJob, vocabulary: int, device: torch.device) -> None:
    """Refuses what cannot fit: models with gradients and two moments, logits with a gradient."""
    wide = ((chosen.teacher_width, chosen.teacher_layers, 1),
            (chosen.student_width, chosen.student_layers, 3))  # fmt: skip
    weights = sum(n * w * (vocabulary + 12 * w * layers) for w, layers, n in wide)
    logits = chosen.batch_size * chosen.sequence_length * vocabulary
    least, there = 16 * weights + 8 * logits, devices.memory(device)
    if least > there:
        raise Usage(
            f"these models and batches take more than {least / 2**30:,.1f} GiB, and {device} has "
            f"{there / 2**30:,.1f}: lower widths, layers, batch_size or sequence_length"
        )


@dataclass(frozen=True)
class Part:
    """Students that are trained together, on the same batches."""

    name: str
    methods: tuple[str, ...]
    settings: DefaultJob

    def steps(self) -> int:
        return self.settings.steps if self.methods else self.settings.teacher_steps


class Experiment:
    """The parts one after the other, and what came of those that are done."""

    def __init__(self, chosen: DefaultJob, text: Corpus, device: torch.device) -> None:
        self.settings, self.text, self.device = chosen, text, device
        self.done: list[dict[str, Any]] = []
        self.training = self._begin(self.parts()[0])

    def parts(self) -> list[Part]:
        """The teacher; students of all methods in turn; then the others of hard labels and fastkd.

        Other seeds of hard labels take the best rate of the first.
        """
        chosen = self.settings
        few = replace(chosen, evaluate_every=chosen.steps)
        parts = [Part(TEACHER, (), chosen), Part(FASTKD, (HARD, EAGER, FASTKD), chosen)]
        seeds = range(chosen.seed + 1, chosen.seed + chosen.students)
        parts += [Part(FASTKD, (FASTKD,), replace(few, seed=seed)) for seed in seeds]
        for name, factor in ((HARD, 1), (LONGER, 2)):
            steps = factor * chosen.steps
            for rate in RATES if name == HARD else (*RATES, 1.0):
                changed = replace(chosen, learning_rate=rate * chosen.learning_rate, steps=steps)
                every = chosen.evaluate_every if name == HARD else steps
                parts.append(Part(name, (HARD,), replace(changed, evaluate_every=every)))
            best = self.best_rate(name)
            for seed in seeds:
                changed = replace(few, seed=seed, learning_rate=best, steps=steps)
                parts.append(Part(name, (HARD,), replace(changed, evaluate_every=steps)))
        return parts

    def best_rate(self, name: str) -> float:
        """The first seed's best learning rate; that of the distilled students until it is known."""
        first = [each for each in self.of(name) if each["seed"] == self.settings.seed]
        best = min(first, key=lambda each: each["validation_loss"], default=None)
        return best["learning_rate"] if best else self.settings.learning_rate

    def of(self, name: str) -> list[dict[str, Any]]:
        """What came of the students of that name so far."""
        return [students[name] for students in self.done if name in students]

    def chosen(self, name: str) -> list[dict[str, Any]]:
        """One for each seed, all at the best rate."""
        found = self.of(name)
        rate = self.best_rate(name)
        return [each for each in found if name in (EAGER, FASTKD) or each["learning_rate"] == rate]

    def costs(self, name: str) -> dict[str, float]:
        """What a step costs, where students of all methods took theirs in turn."""
        costs: dict[str, float] = self.done[1][HARD if name == LONGER else name]["costs"]
        return costs

    def _begin(self, part: Part) -> Training:
        training = Training(part.settings, self.text, self.device, part.methods)
        if self.done:
            training.teacher = self.training.teacher
        return training

    def over(self) -> bool:
        return len(self.done) == len(self.parts())

    def end_part(self) -> None:
        """Keeps what came of the part, and begins the next one."""
        part, training = self.parts()[len(self.done)], self.training
        costs = training.costs() if EAGER in part.methods else {}
        prompt = self.text.validation[:8]
        outcome: dict[str, Any] = {}
        for method, model in (training.students or {TEACHER: training.teacher}).items():
            rows = [row for row in training.rows if row["way"] == method]
            last = rows[-1] if rows else training.evaluate()[TEACHER]
            loss = last["validation_loss"]
            if not math.isfinite(loss):
                raise RunError(
                    f"the loss of {method} on held-out text is {loss}: lower the learning rate"
                )
            outcome[LONGER if part.name == LONGER else method] = {
                **{name: last[name] for name in FIGURES},
                "costs": costs.get(method, {}),
                "steps": part.steps(),
                "seed": part.settings.seed,
                "learning_rate": part.settings.learning_rate,
                "rows": rows,
                "sample": training.sample(model, prompt, 24).tolist(),
            }
        if FASTKD in training.students and EAGER in training.students:
            outcome[FASTKD]["difference"] = training.difference
            outcome[FASTKD]["drift"] = training.drift
            weights = training.students[FASTKD].state_dict()
            self.student = {name: weight.cpu().clone() for name, weight in weights.items()}
        self.done.append(outcome)
        if not self.over():
            self.training = self._begin(self.parts()[len(self.done)])

    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.csv: every student of every part, in the order of their training."""
        rows = [
            {**row, "way": name}
            for outcome in self.done
            for name, student in outcome.items()
            for row in student["rows"]
        ]
        part = self.parts()[min(len(self.done), len(self.parts()) - 1)]
        longer = part.name == LONGER
        now = [] if self.over() else self.training.rows
        return rows + [{**row, "way": LONGER if longer else row["way"]} for row in now]

    # --- checkpoints -------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return {
            "settings": config.values(self.settings),
            "done": self.done,
            "student": getattr(self, "student", None),
            "training": self.training.state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        try:
            self.done = state["done"]
            if state["student"] is not None:
                self.student = state["student"]
            parts = self.parts()
            self.training = self._begin(parts[min(len(self.done), len(parts) - 1)])
            self.training.load(state["training"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise RunError(
                f"the checkpoint does not fit this run ({type(error).__name__}): start again"
            ) from None


def train(experiment: Experiment, folder: Path, stop: Stop) -> None:
    """All steps that are left, with a bar for the teacher and one for all students."""
    with report.bars() as bars:
        totals = [part.steps() for part in experiment.parts()]
        before = sum(totals[: len(experiment.done)])
        bar = bars.add_task("training", total=sum(totals), completed=before, text="")
        while not experiment.over():
            training, part = experiment.training, experiment.parts()[len(experiment.done)]
            step = training.teacher_step if part.name == TEACHER else training.step
            bars.update(bar, completed=before + step)
            while step < part.steps():
                if part.name == TEACHER:
                    losses, step = [training.train_teacher()], training.teacher_step
                else:
                    losses, step = [*training.train_students().values()], training.step
                said = ", ".join(f"{loss:.2f}" for loss in losses)
                bars.update(bar, advance=1, text=f"{part.name}: loss {said}")
                _keep(experiment, folder, stop, step % part.settings.save_every == 0)
            experiment.end_part()
            _keep(experiment, folder, stop, due=True)
            before += step


def _keep(experiment: Experiment, folder: Path, stop: Stop, due: bool) -> None:
    if due or stop.asked:
        storage.save_checkpoint(folder, experiment.state())
        storage.write(folder / "metrics.csv", report.table(experiment.rows(), report.EXPERIMENT))
    if stop.asked:
        raise Interrupted(f"stopped; go on with: fastkd distill --resume {folder}")


class Stop:
    """Ctrl-C, a polite kill or a lost terminal asks for an end after the step.

    A second Ctrl-C ends at once. torchrun answers the first with a polite kill of its processes,
    so that one does not count as the second.
    """

    def __init__(self) -> None:
        self.asked = False

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        if self.asked and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def __enter__(self) -> Stop:
        kinds = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            kinds.append(signal.SIGHUP)  # nohup ignores it
        self._before = {kind: signal.signal(kind, self._ask) for kind in kinds}
        return self

    def __exit__(self, *_: object) -> None:
        for kind, handler in self._before.items():
            signal.signal(kind, handler)


@contextlib.contextmanager
def repeatable(threads: int) -> Iterator[None]:
    """Two runs on one machine are equal to the bit."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
