"""What a run of the default job found: on the terminal, in files, as a picture."""

from __future__ import annotations

import csv
import io
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastkd.doctor import versions

from . import storage
from .methods import EAGER, FASTKD, HARD, other_name
from .picture import BLUE, GRAY, ORANGE, png

if TYPE_CHECKING:
    from rich.progress import Progress

    from .train import Training

Figures = dict[str, Any]
COLUMNS = ("step", "way", "temperature", "loss", "validation_loss", "kl_to_teacher", "agreement")


@dataclass(frozen=True)
class Result:
    """The figures at the end, by method of training; the teacher's are under 'teacher'."""

    students: dict[str, Figures]
    teacher: Figures
    other: str  # what fastkd is compared with
    difference: float  # of the two losses on the same logits: relative, the largest of all steps
    drift: float  # likewise, of the two students, each with the weights that its way gave it
    agrees: bool
    margin: float  # nats of held-out text by which fastkd is below hard labels

    @classmethod
    def of(cls, training: Training, tolerance: float) -> Result:
        found, costs = training.evaluate(), training.costs()
        students = {method: {**found[method], **costs[method]} for method in training.students}
        return cls(
            students,
            {**found["teacher"], "parameters": training.teacher.size()},
            other_name(training.settings.loss(step=0, steps=1)),
            training.difference,
            training.drift,
            training.difference <= tolerance,
            found[HARD]["validation_loss"] - found[FASTKD]["validation_loss"],
        )


# --- files -----------------------------------------------------------------------------------


def save(result: Result, training: Training, folder: Path) -> None:
    """All files of the run. metrics.json comes last: where it is, the run is whole.

    metrics.csv, the student and the tokenizer are the same to the bit in every run of these
    settings on this machine; times are in metrics.json and curves.png alone.
    """
    from safetensors.torch import save as safetensors

    student = training.students[FASTKD].state_dict()
    weights = {name: weight.cpu().contiguous() for name, weight in student.items()}
    storage.write(folder / "student.safetensors", safetensors(weights))
    storage.write(folder / "tokenizer.json", training.corpus.tokenizer)
    storage.write(folder / "metrics.csv", table(training.rows))
    storage.write(folder / "curves.png", picture(result, training))
    values = {
        **asdict(result),
        "settings": asdict(training.settings),
        "machine": machine(training.device),
    }
    storage.write(folder / storage.METRICS, storage.json_text(values))


def machine(device: torch.device) -> Figures:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        **versions("torch"),
        "device": f"{device}: {name}",
        "threads": torch.get_num_threads(),
    }


def table(rows: list[Figures], header: bool = True) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def rows(path: Path) -> list[Figures]:
    """Those of a metrics.csv, without what was not logged."""
    with open(path, newline="") as file:
        return [
            {name: value if name == "way" else float(value) for name, value in row.items() if value}
            for row in csv.DictReader(file)
        ]


def picture(result: Result, training: Training) -> bytes:
    """Held-out loss, the two curves that must be one, and where the time of a step goes."""
    return png(lambda figure: _compare(figure, result, training.rows))


def _compare(figure: Any, result: Result, rows: list[Figures]) -> None:
    figure.set_size_inches(12, 3.6)
    held_out, losses, times = figure.subplots(1, 3)
    styles: dict[str, Figures] = {
        HARD: {"color": GRAY},
        EAGER: {"color": BLUE, "linewidth": 5, "alpha": 0.45},
        FASTKD: {"color": ORANGE},
    }
    names = {HARD: HARD, EAGER: result.other, FASTKD: FASTKD}
    for method, style in styles.items():
        mine = [row for row in rows if row["way"] == method]
        _line(held_out, mine, "validation_loss", marker="o", label=names[method], **style)
        if method != HARD:
            _line(losses, mine, "loss", label=names[method], **style)
        figures = result.students[method]
        rest = figures["step_ms"] - figures["loss_ms"]
        times.barh(names[method], rest, color="#dfe2e6", height=0.6)
        bar = times.barh(
            names[method], figures["loss_ms"], left=rest, color=style["color"], height=0.6
        )
        label = f"{figures['loss_ms']:.1f} of {figures['step_ms']:.0f} ms"
        times.bar_label(bar, [label], padding=5, color="#555a61")
    teacher = result.teacher["validation_loss"]
    held_out.axhline(teacher, color="black", lw=1, ls=":", label="teacher")
    held_out.set(title="Loss on held-out text", xlabel="step", ylabel="nats per token")
    losses.set(title="Distillation loss in training", xlabel="step")
    times.set(title="Time of a step, the loss coloured", xlabel="ms")
    times.set_xlim(right=1.45 * max(each["step_ms"] for each in result.students.values()))
    times.grid(axis="y", visible=False)
    times.invert_yaxis()
    held_out.legend()
    losses.legend()


def curves(rows: list[Figures]) -> bytes:
    """Training loss, and loss and KL on held-out text, of the user's models."""
    return png(lambda figure: _follow(figure, rows))


def _follow(figure: Any, rows: list[Figures]) -> None:
    figure.set_size_inches(12, 3.6)
    names = {
        "loss": "Distillation loss in training",
        "validation_loss": "Loss on held-out text, nats per token",
        "kl_to_teacher": "KL to the teacher on held-out text",
    }
    for axes, (name, title) in zip(figure.subplots(1, 3), names.items(), strict=True):
        _line(axes, rows, name, marker=".", color=ORANGE)
        axes.set(title=title, xlabel="step")


def _line(axes: Any, rows: list[Figures], name: str, **style: Any) -> None:
    seen = [row for row in rows if name in row]
    axes.plot([row["step"] for row in seen], [row[name] for row in seen], **style)


# --- the terminal ----------------------------------------------------------------------------


def say(text: str) -> None:
    """For the user to read while it runs; results go to standard output."""
    print(text, file=sys.stderr, flush=True)


def evaluation(step: int, figures: Figures) -> str:
    loss, kl, agreement = (
        figures[f"eval_{name}"] for name in ("validation_loss", "kl_to_teacher", "agreement")
    )
    return f"step {step}: held-out loss {loss:.4f}, KL {kl:.4f}, agreement {agreement:.1%}"


def announce(training: Training, folder: Path) -> None:
    """What is about to happen; where there is no terminal, no bar will say so."""
    from rich.console import Console

    corpus, device, (student, *_) = training.corpus, training.device, training.students.values()
    Console(stderr=True, highlight=False).print(
        f"{len(corpus.training):,} tokens to train on, {len(corpus.validation):,} held out; "
        f"teacher of {training.teacher.size():,} parameters, students of {student.size():,}; "
        f"on {device.type}, into {folder}/",
        soft_wrap=True,
    )


def bars() -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description:9}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
        console=Console(stderr=True),
    )


def show(result: Result, folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    grid = Table(title="Held-out text, and what a step costs")
    grid.add_column("")
    for name in ("loss", "KL to\nteacher", "top-1\nagreement", "step\nms", "loss's\nshare"):
        grid.add_column(name, justify="right")
    grid.add_column("loss's peak\nmemory MiB", justify="right")
    grid.add_row("teacher", f"{result.teacher['validation_loss']:.3f}", *("",) * 5)
    for method, figures in result.students.items():
        grid.add_row(
            result.other if method == EAGER else method,
            f"{figures['validation_loss']:.3f}",
            f"{figures['kl_to_teacher']:.3f}",
            f"{figures['agreement']:.1%}",
            f"{figures['step_ms']:.1f}",
            f"{figures['loss_share']:.0%}",
            f"{figures['loss_peak_bytes'] / 2**20:.1f}",
        )
    console.print(grid)
    verdict = "agree" if result.agrees else "DO NOT AGREE"
    console.print(
        f"fastkd and {result.other} {verdict}: in every step, on the same logits, their losses "
        f"differ by at most {result.difference:.0e}; their two curves, by {result.drift:.0e} "
        "(relative).",
        soft_wrap=True,
    )
    gain = "below" if result.margin > 0 else "ABOVE"
    console.print(
        f"After equal steps the student of fastkd is {abs(result.margin):.3f} nats per token "
        f"{gain} the one of hard labels only, on held-out text.",
        soft_wrap=True,
    )
    console.print(f"Saved: {folder}/", soft_wrap=True)


def show_user_models(figures: Figures, student: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    grid = Table(title="Held-out text")
    grid.add_column("student")
    for name in ("loss", "KL to\nteacher", "top-1\nagreement"):
        grid.add_column(name, justify="right")
    for when in ("before", "after"):
        found = figures[when]
        grid.add_row(
            when,
            f"{found['validation_loss']:.3f}",
            f"{found['kl_to_teacher']:.3f}",
            f"{found['agreement']:.1%}",
        )
    console.print(grid)
    console.print(f"Saved: AutoModelForCausalLM.from_pretrained({str(student)!r})", soft_wrap=True)
