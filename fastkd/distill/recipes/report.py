"""What a recipe hands over: tables over seeds, claims, a picture, results.json."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fastkd.distill.errors import RunError
from fastkd.distill.picture import BLUE, png
from fastkd.distill.storage import write
from fastkd.doctor import versions

# What an expected difference may be off by besides the standard error of this run: it came from
# another implementation with other random numbers, whose standard errors were up to this.
EXPECTED_ERROR = 0.6


class MissingPackage(RunError, ImportError):
    """A package that only the recipes need is not installed."""


def need(module: str, package: str) -> Any:
    """The module, imported now."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackage(
            f"the recipes need {package}: pip install 'fastkd[recipes]', or {package} alone"
        ) from error


@dataclass
class Table:
    """Scores by setting, one per seed each, and their paired differences to a baseline.

    Attributes:
        scores: setting to scores [seeds].
        baseline: the setting that the others are compared with.
        expected: setting to the difference that was expected.
        decimals, unit: of the scores, as they are shown.
    """

    title: str
    scores: dict[str, Tensor]
    baseline: str
    expected: dict[str, float] = field(default_factory=dict)
    decimals: int = 2
    unit: str = "points"

    def difference(self, setting: str) -> tuple[float, float]:
        """Mean and standard error over seeds of the paired differences to the baseline."""
        return mean_and_error(self.scores[setting] - self.scores[self.baseline])

    def agrees(self, setting: str) -> bool | None:
        """Whether it is within two standard errors of what was expected; None: nothing was."""
        if setting not in self.expected:
            return None
        mean, error = self.difference(setting)
        return abs(mean - self.expected[setting]) <= 2 * math.hypot(error, EXPECTED_ERROR)

    def rows(self) -> list[dict[str, Any]]:
        rows = []
        for setting, scores in self.scores.items():
            mean, error = mean_and_error(scores)
            row = {"setting": setting, "mean": mean, "error": error, "seeds": scores.tolist()}
            if setting != self.baseline:
                row["difference"], row["difference_error"] = self.difference(setting)
                if setting in self.expected:
                    row["expected"] = self.expected[setting]
                    row["agrees"] = self.agrees(setting)
            rows.append(row)
        return rows

    def __str__(self) -> str:
        width, places = max(len(setting) for setting in self.scores), self.decimals
        head = f"{'':{width}}   score           difference"
        if self.expected:
            head += "      expected"
        lines = [f"{self.title} (differences to {self.baseline!r}, paired by seed)", head]
        for row in self.rows():
            line = (
                f"{row['setting']:{width}}  {row['mean']:6.{places}f} ± {row['error']:.{places}f}"
            )
            if "difference" in row:
                line += f"  {row['difference']:+6.{places}f} ± {row['difference_error']:.{places}f}"
            if "expected" in row:
                off = row["difference"] - row["expected"]
                line += f"  {row['expected']:+6.1f}  "
                line += "agrees" if row["agrees"] else f"off by {off:+.1f}"
            lines.append(line)
        return "\n".join(lines)


@dataclass
class Report:
    """All that a recipe found.

    Attributes:
        claims: sentence to whether this run bears it out.
        notes: figures that are not scores over seeds.
        draw: draws the picture on a matplotlib figure; by default, the tables side by side.
    """

    title: str
    tables: list[Table] = field(default_factory=list)
    claims: dict[str, bool] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    draw: Callable[[Any], None] | None = None

    def agrees(self) -> bool:
        """Whether every claim and every expected difference is borne out."""
        verdicts = [table.agrees(s) for table in self.tables for s in table.expected]
        return all(self.claims.values()) and all(verdicts)

    def __str__(self) -> str:
        parts = [self.title, *map(str, self.tables)]
        if self.text:
            parts.append(self.text)
        if self.claims:
            lines = [
                f"  {'yes' if held else 'NO '}  {claim}" for claim, held in self.claims.items()
            ]
            parts.append("\n".join(["Expected, and seen here:", *lines]))
        return "\n\n".join(parts)

    def save(self, out: Path, **about: Any) -> None:
        """Write results.json and plot.png into `out`, each whole or not at all."""
        content = {
            "title": self.title, **about, "agrees": self.agrees(), "claims": self.claims,
            "tables": [
                {"title": t.title, "baseline": t.baseline, "rows": t.rows()} for t in self.tables
            ],
            "notes": self.notes,
            "versions": versions("torch"),
        }  # fmt: skip
        write(out / "results.json", json.dumps(content, indent=1))
        write(out / "plot.png", png(self.draw or self._bars))

    def _bars(self, figure: Any) -> None:
        figure.set_size_inches(12 if len(self.tables) > 1 else 8, 4)
        for place, table in enumerate(self.tables, 1):
            bars(figure.add_subplot(1, len(self.tables), place), table)


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error over the seeds."""
    values = values.double()
    return values.mean().item(), (values.std() / math.sqrt(len(values))).item()


def bars(axes: Any, table: Table) -> None:
    """The paired differences with their standard errors, and crosses where they were expected."""
    settings = [setting for setting in table.scores if setting != table.baseline]
    means, errors = zip(*map(table.difference, settings), strict=True)
    places = range(len(settings))
    axes.barh(places, means, xerr=errors, color=BLUE, alpha=0.75, height=0.65)
    axes.grid(axis="y", visible=False)
    known = [(table.expected[s], i) for i, s in enumerate(settings) if s in table.expected]
    if known:
        axes.plot(*zip(*known, strict=True), "kx")
    axes.set_yticks(places, settings)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(
        title=table.title,
        xlabel=f"{table.unit} above {table.baseline!r}{', x: expected' * bool(known)}",
    )
