"""Time against V, memory against N, and the share of the copy's rate, as PNG files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .cases import DTYPES
from .report import share_of_copy
from .results import Results, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MIB = 2**20


def draw(results: Results, folder: Path) -> list[Path]:
    """The files written; ImportError where matplotlib is not installed."""
    import matplotlib

    matplotlib.use("Agg")
    rows = [
        row
        for row in results.rows
        if row.times and row.part == "full" and row.operator == "logits"
        and row.divergence == "forward_kl" and row.dtype == _main_dtype(results)
    ]  # fmt: skip
    if not rows:
        return []
    return [
        _figure(folder / "time.png", results, rows, _time),
        _figure(folder / "memory.png", results, rows, _memory),
        _figure(folder / "roofline.png", results, rows, lambda a, r: _share(a, r, results)),
    ]


def _main_dtype(results: Results) -> str:
    """That of the first row: a plot compares like with like."""
    return results.rows[0].dtype if results.rows else ""


def _figure(
    path: Path, results: Results, rows: Sequence[Row], plot: Callable[[Axes, Sequence[Row]], None]
) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    plot(axes, rows)
    device = results.header["device"]
    threads = f", {device['threads']} threads" if "threads" in device else ""
    axes.set_title(f"forward KL, loss and gradient, {rows[0].dtype}, {device['name']}{threads}")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=150)
    return path


def _by_provider(rows: Sequence[Row]) -> dict[str, list[Row]]:
    return {
        name: [row for row in rows if row.provider == name]
        for name in dict.fromkeys(row.provider for row in rows)
    }


def _time(axes: Axes, rows: Sequence[Row]) -> None:
    for name, its in _by_provider(rows).items():
        points = sorted(
            (row.vocab, 1e6 * row.times.median / (row.rows * row.vocab)) for row in its if row.times
        )
        axes.loglog(*zip(*points, strict=True), marker="o", linestyle="", label=name)
    axes.set_xlabel("V")
    axes.set_ylabel("ns per logit")


def _memory(axes: Axes, rows: Sequence[Row]) -> None:
    for name, its in _by_provider(rows).items():
        points = sorted((r.rows, r.peak_bytes / MIB) for r in its if r.peak_bytes is not None)
        if points:
            axes.loglog(*zip(*points, strict=True), marker="o", linestyle="", label=name)
    sizes = {(r.rows, r.rows * r.vocab * DTYPES[r.dtype].itemsize / MIB) for r in rows}
    axes.loglog(*zip(*sizes, strict=True), "k_", markersize=14, label="the gradient alone")
    axes.set_xlabel("N")
    axes.set_ylabel("peak MiB beyond the inputs")


def _share(axes: Axes, rows: Sequence[Row], results: Results) -> None:
    cases = list(dict.fromkeys(row.case for row in rows))
    providers = _by_provider(rows)
    width = 0.8 / len(providers)
    for i, (name, its) in enumerate(providers.items()):
        shares = {row.case: share_of_copy(row, results.ceilings.get("copy_gb_s")) for row in its}
        heights = [100 * (shares.get(case) or 0.0) for case in cases]
        axes.bar(
            [x + (i + 0.5) * width - 0.4 for x in range(len(cases))], heights, width, label=name
        )
    axes.set_xticks(range(len(cases)), cases, rotation=20, fontsize="small")
    axes.set_ylabel("% of the measured copy bandwidth")
