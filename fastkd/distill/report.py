"""What a run of the default job found: on the terminal, in files, as a picture."""

from __future__ import annotations

import csv
import io
import platform
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastkd.doctor import versions

from . import storage
from .methods import EAGER, FASTKD, FIGURES, HARD, LONGER, other_name
from .picture import BLUE, GRAY, ORANGE, png

if TYPE_CHECKING:
    from rich.progress import Progress

    from .default_job import Experiment

Figures = dict[str, Any]
COLUMNS = ("step", "way", "temperature", "loss", *FIGURES)
EXPERIMENT = (*COLUMNS, "seed", "learning_rate")


@dataclass(frozen=True)
class Result:
    """The figures at the end.

    Attributes:
        students: by name, means over the seeds; `losses` has them one by one, `spread` their
            standard deviation.
        other: what fastkd is compared with.
        difference: of the two losses on the same logits: relative, the largest of all steps.
        drift: likewise, of the two students, each with the weights that its method gave it.
        margin: nats of held-out text by which fastkd is below the better of the hard labels, in
            the mean over the seeds; `margin_error` is its standard error, None of a single seed.
        equal_time: steps on hard labels that take as long as all of fastkd's.
        samples: what each says after `prompt`.
    """

    students: dict[str, Figures]
    teacher: Figures
    other: str
    difference: float
    drift: float
    agrees: bool
    margin: float
    margin_error: float | None
    equal_time: int
    prompt: str
    samples: dict[str, str]

    @classmethod
    def of(cls, experiment: Experiment, tolerance: float) -> Result:
        from tokenizers import Tokenizer

        students = {
            name: _means(experiment.chosen(name)) | experiment.costs(name)
            for name in (HARD, LONGER, EAGER, FASTKD)
        }
        (teacher,) = experiment.of("teacher")
        first = experiment.chosen(FASTKD)[0]
        best = min((HARD, LONGER), key=lambda name: students[name]["validation_loss"])
        pairs = zip(students[best]["losses"], students[FASTKD]["losses"], strict=True)
        margins = [hard - fastkd for hard, fastkd in pairs]
        error = statistics.stdev(margins) / len(margins) ** 0.5 if len(margins) > 1 else None
        decode = Tokenizer.from_str(experiment.text.tokenizer).decode
        spoken = {"teacher": teacher, best: experiment.chosen(best)[0], FASTKD: first}
        return cls(
            students,
            {name: teacher[name] for name in (*FIGURES, "steps")}
            | {"parameters": experiment.training.teacher.size()},
            other_name(experiment.settings.loss(step=0, steps=1)),
            first["difference"],
            first["drift"],
            first["difference"] <= tolerance,
            statistics.mean(margins),
            error,
            round(
                students[FASTKD]["steps"] * students[FASTKD]["step_ms"] / students[HARD]["step_ms"]
            ),
            decode(experiment.text.validation[:8].tolist()),
            {name: decode(each["sample"]) for name, each in spoken.items()},
        )


def _means(seeds: list[Figures]) -> Figures:
    """The means over students that differ in their seed."""
    losses = [each["validation_loss"] for each in seeds]
    return {
        **{name: statistics.mean(each[name] for each in seeds) for name in FIGURES},
        "spread": statistics.stdev(losses) if len(losses) > 1 else 0.0,
        "losses": losses,
        **{name: seeds[0][name] for name in ("learning_rate", "steps")},
    }


# --- files -----------------------------------------------------------------------------------


def save(result: Result, experiment: Experiment, folder: Path) -> None:
    """All files of the run. metrics.json comes last: where it is, the run is whole.

    metrics.csv, the student and the tokenizer are the same to the bit in every run of these
    settings on this machine; times are in metrics.json and curves.png alone.
    """
    from safetensors.torch import save as safetensors

    storage.write(folder / "student.safetensors", safetensors(experiment.student))
    storage.write(folder / "tokenizer.json", experiment.text.tokenizer)
    storage.write(folder / "metrics.csv", table(experiment.rows(), EXPERIMENT))
    storage.write(folder / "curves.png", picture(result, experiment))
    values = {
        **asdict(result),
        "settings": asdict(experiment.settings),
        "machine": machine(experiment.device),
    }
    storage.write(folder / storage.METRICS, storage.json_text(values))


def machine(device: torch.device) -> Figures:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        **versions("torch"),
        "device": f"{device}: {name}",
        "threads": torch.get_num_threads(),
    }


def table(rows: list[Figures], columns: Sequence[str] = COLUMNS, *, header: bool = True) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def rows(path: Path) -> list[Figures]:
    """The rows of a metrics.csv, without what was not logged."""
    with open(path, newline="") as file:
        return [
            {name: value if name == "way" else float(value) for name, value in row.items() if value}
            for row in csv.DictReader(file)
        ]


def picture(result: Result, experiment: Experiment) -> bytes:
    """Held-out loss, the two curves that must be one, and where the time of a step goes."""
    rows = [row for name in (HARD, EAGER, FASTKD) for row in experiment.chosen(name)[0]["rows"]]
    return png(lambda figure: _compare(figure, result, rows))


def _compare(figure: Any, result: Result, rows: list[Figures]) -> None:
    figure.set_size_inches(12, 4)
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
            _line(losses, mine, "loss", **style)
        figures = result.students[method]
        rest = figures["step_ms"] - figures["loss_ms"]
        times.barh(names[method], rest, color="#dfe2e6", height=0.6)
        bar = times.barh(
            names[method], figures["loss_ms"], left=rest, color=style["color"], height=0.6
        )
        label = f"{figures['loss_ms']:.1f} of {figures['step_ms']:.0f} ms"
        times.bar_label(bar, [label], padding=5, color="#555a61")
    teacher, longer = result.teacher["validation_loss"], result.students[LONGER]["validation_loss"]
    held_out.axhline(longer, color=GRAY, lw=1, ls="--", label=LONGER)
    held_out.axhline(teacher, color="black", lw=1, ls=":", label="teacher")
    held_out.set(title="Loss on held-out text", xlabel="step", ylabel="nats per token")
    losses.set(title="Distillation loss in training", xlabel="step")
    times.set(title="Time of a step, the loss coloured", xlabel="ms")
    times.set_xlim(right=1.45 * max(each["step_ms"] for each in result.students.values()))
    times.grid(axis="y", visible=False)
    times.invert_yaxis()
    figure.legend(*held_out.get_legend_handles_labels(), loc="outside lower center", ncols=5)


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
    loss, kl, agreement = (figures[f"eval_{name}"] for name in FIGURES)
    return f"step {step}: held-out loss {loss:.4f}, KL {kl:.4f}, agreement {agreement:.1%}"


def announce(experiment: Experiment, folder: Path) -> None:
    """What is about to happen; where there is no terminal, no bar will say so."""
    chosen, text = experiment.settings, experiment.text
    lesson = experiment.text.share(chosen.student_share)
    say(
        f"a teacher of {experiment.training.teacher.size():,} parameters learns from "
        f"{len(text.training):,} tokens, {chosen.students} seeds of students from "
        f"{len(lesson.training):,} of these; {len(text.validation):,} are held out; "
        f"on {experiment.device.type}, into {folder}/"
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
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    grid = Table(
        title="Held-out text, and what training costs",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    grid.add_column("", no_wrap=True)
    for name in (
        "loss", "KL to\nteacher", "top-1\nagreed", "steps", "seconds", "loss's\nshare",
        "loss's\nMiB",
    ):  # fmt: skip
        grid.add_column(name, justify="right", no_wrap=True)
    teacher = result.teacher
    loss = f"{teacher['validation_loss']:.3f}"
    grid.add_row("teacher", loss, "", "", str(teacher["steps"]))
    for name, figures in result.students.items():
        seeds = len(figures["losses"])
        spread = f" ± {figures['spread']:.3f}" if seeds > 1 else ""
        grid.add_row(
            result.other if name == EAGER else name,
            f"{figures['validation_loss']:.3f}{spread}",
            f"{figures['kl_to_teacher']:.3f}",
            f"{figures['agreement']:.1%}",
            str(figures["steps"]),
            f"{figures['steps'] * figures['step_ms'] / 1e3:.1f}",
            f"{figures['loss_share']:.0%}",
            f"{figures['loss_peak_bytes'] / 2**20:.1f}",
        )
    console.print(grid)
    for line in _verdicts(result):
        console.print(line, soft_wrap=True, markup=False)
    console.print(f"Saved: {folder}/", soft_wrap=True)


def _verdicts(result: Result) -> Iterator[str]:
    verdict = "agree" if result.agrees else "DO NOT AGREE"
    yield (
        f"fastkd and {result.other} {verdict}: in every step, on the same logits, their losses "
        f"differ by at most {result.difference:.0e}; their two curves, by {result.drift:.0e} "
        "(relative)."
    )
    gain = "below" if result.margin > 0 else "ABOVE"
    error = f" ± {result.margin_error:.3f}" if result.margin_error is not None else ""
    yield (
        f"The student of fastkd is {abs(result.margin):.3f}{error} nats per token {gain} the "
        f"better one of hard labels only, over {len(result.students[FASTKD]['losses'])} seeds. "
        f"Hard labels had the best of three learning rates; as long as fastkd's "
        f"{result.students[FASTKD]['steps']} steps take {result.equal_time} of theirs, which had "
        f"{result.students[HARD]['steps']} and {result.students[LONGER]['steps']}. Of "
        f"{result.other} there is one seed."
    )
    for name, text in result.samples.items():
        yield f"{name}: {result.prompt}|{text}".replace("\n", " ")


def show_user_models(figures: Figures, student: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    grid = Table(title="Held-out text")
    grid.add_column("student")
    measure = "distance to" if figures["settings"]["cross_tokenizer"] else "KL to"
    for name in ("loss", f"{measure}\nteacher", "top-1\nagreement"):
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
