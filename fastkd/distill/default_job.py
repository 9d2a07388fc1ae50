"""The default job: train a small teacher, distil it by three methods, and compare."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch

from . import corpus, report, storage
from .errors import Interrupted, RunError, needs
from .settings import DefaultJob, toml
from .train import Training

# Largest relative difference allowed between fastkd's loss and the other spelling's of it, both in
# fp32 on the same logits, in any step.
TOLERANCE = 1e-5


def run(chosen: DefaultJob, folder: Path, *, resume: bool = False) -> report.Result:
    """Trains, compares and saves; what came of it.

    Raises Interrupted, with a checkpoint in `folder`, on Ctrl-C; RunError where fastkd and F.kl_div
    do not agree, after everything is saved.
    """
    needs("tokenizers", "rich", "matplotlib", "safetensors")
    device = pick(chosen.device)
    with repeatable(chosen.threads), Stop() as stop:
        text = corpus.prepare(chosen.data, chosen.vocabulary, chosen.sequence_length)
        training = Training(chosen, text, device)
        if resume:
            state = storage.load_checkpoint(folder)
            if state is not None:
                training.load(state)
        else:
            storage.write(folder / storage.CONFIG, toml(chosen))
        report.announce(training, folder)
        train(training, folder, stop)
        result = report.Result.of(training, TOLERANCE)
        report.save(result, training, folder)
    (folder / storage.CHECKPOINT).unlink(missing_ok=True)
    report.show(result, folder)
    if not result.agrees:
        raise RunError(f"fastkd and {result.other} do not agree; results are in {folder}")
    return result


def train(training: Training, folder: Path, stop: Stop) -> None:
    """All steps that are left, with a bar for each phase."""
    chosen = training.settings
    with report.bars() as bars:
        bar = bars.add_task(
            "teacher", total=chosen.teacher_steps, completed=training.teacher_step, text=""
        )
        while training.teacher_step < chosen.teacher_steps:
            loss = training.train_teacher()
            bars.update(bar, advance=1, text=f"loss {loss:.2f}")
            _keep(training, folder, stop, training.teacher_step == chosen.teacher_steps)
        bar = bars.add_task("students", total=chosen.steps, completed=training.step, text="")
        while training.step < chosen.steps:
            losses = training.train_students()
            bars.update(
                bar,
                advance=1,
                text="loss " + ", ".join(f"{loss:.2f}" for loss in losses.values()),
            )
            _keep(training, folder, stop, training.step % chosen.evaluate_every == 0)


def _keep(training: Training, folder: Path, stop: Stop, due: bool) -> None:
    if due or stop.asked:
        storage.save_checkpoint(folder, training.state())
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


def pick(device: str) -> torch.device:
    if device == "cuda" and not torch.cuda.is_available():
        raise RunError("device 'cuda' was asked for, and PyTorch finds no GPU: try fastkd doctor")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


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
