"""Results as text: the tables, the summary, and what changed between two files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest

from .measure import Times
from .results import ABSENT, Results, Row

Table = Sequence[Sequence[str]]
COLUMNS = (
    "case", "N x V", "dtype", "pass", "provider", "ms", "20 %", "80 %", "MiB", "of copy",
    "loss err", "grad err", "x eager", "x best peer",
)  # fmt: skip
NONE = "-"
# Marks a time whose rounds differ by more than this factor.
NOISY, LOUD = " ~", 1.1


def markdown(results: Results) -> str:
    """Header, a table per operator and divergence, and who is missing."""
    parts = ["\n".join(_header(results))]
    kept = [row for row in results.rows if row.status != ABSENT]
    for title in dict.fromkeys(f"{row.operator}: {row.divergence}" for row in kept):
        rows = [row for row in kept if f"{row.operator}: {row.divergence}" == title]
        parts += [f"## {title}", table((COLUMNS, *_lines(rows, results)))]
    if relative := _relative_to_forward_kl(results.rows):
        parts += ["## Divergences relative to forward KL, fastkd", table(relative)]
    if absent := _absent(results.rows):
        parts += ["Not measured:", "\n".join(f"- {line}" for line in absent)]
    return "\n\n".join(parts) + "\n"


def _header(results: Results) -> list[str]:
    header = results.header
    device, versions = header["device"], header["versions"]
    return [
        f"# {device['name']}, {header['date']}",
        "",
        *(["A rehearsal: these figures measure nothing.", ""] if header["rehearsal"] else []),
        *_items(f"{key}: {value}" for key, value in device.items() if key != "name"),
        *_items(f"{name} {number}" for name, number in versions.items() if number),
        f"- fastkd at commit {header['commit'] or 'unknown'}",
        f"- `{header['command']}`",
        *_items(f"{name}: {value:.4g}" for name, value in results.ceilings.items()),
        *_items(f"afterwards {key}: {value}" for key, value in header.get("after", {}).items()),
    ]


def _items(texts: Iterable[str]) -> list[str]:
    line = ", ".join(texts)
    return [f"- {line}"] if line else []


def table(lines: Table) -> str:
    """A Markdown table that reads well as it is; the last cell of a shorter line runs on."""
    cells = [line if len(line) == len(lines[0]) else line[:-1] for line in lines]
    columns = zip_longest(*cells, fillvalue="")
    widths = [max(3, *map(len, column)) for column in columns]
    padded = [
        "| "
        + " | ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=False))
        + " |"
        for line in lines
    ]
    return "\n".join([padded[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *padded[1:]])


def _lines(rows: Sequence[Row], results: Results) -> list[list[str]]:
    return [_line(row, rows, results.ceilings.get("copy_gb_s")) for row in rows]


def _line(row: Row, rows: Sequence[Row], copy: float | None) -> list[str]:
    key = [row.case, f"{row.rows} x {row.vocab}", row.dtype, row.part, row.provider]
    if row.times is None:
        return [*key, row.note]
    rivals = [other for other in rows if other.key.group == row.key.group and other.times]
    return [
        *key,
        f"{row.times.median:.4g}{NOISY if noisy(row.times) else ''}",
        f"{row.times.p20:.4g}",
        f"{row.times.p80:.4g}",
        NONE if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f}",
        NONE if (share := share_of_copy(row, copy)) is None else f"{share:.0%}",
        *([NONE, NONE] if row.errors is None else [f"{error:.0e}" for error in row.errors]),
        _speedup(row, [other for other in rivals if other.provider == "eager"]),
        _speedup(row, [other for other in rivals if not is_ours(other)]),
    ]


def noisy(times: Times) -> bool:
    return max(times.medians) > LOUD * min(times.medians)


def is_ours(row: Row) -> bool:
    return row.provider.startswith("fastkd")


def share_of_copy(row: Row, copy: float | None) -> float | None:
    """Bytes that must move over the time taken, as a share of the measured copy's rate."""
    if copy is None or row.times is None or row.traffic_bytes is None:
        return None
    return row.traffic_bytes / row.times.median / 1e6 / copy


def _speedup(row: Row, rivals: Sequence[Row]) -> str:
    """Over the fastest of the others."""
    times = [rival.times.median for rival in rivals if rival.times and rival is not row]
    if not times or row.times is None:
        return NONE
    return f"{min(times) / row.times.median:.2f}"


def _absent(rows: Sequence[Row]) -> list[str]:
    """Each reason once."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.status == ABSENT:
            where = found.setdefault(f"{row.provider}: {row.note}", [])
            where += [name for name in (f"{row.operator} {row.divergence}",) if name not in where]
    return [f"{reason} ({', '.join(where)})" for reason, where in found.items()]


def _relative_to_forward_kl(rows: Sequence[Row]) -> list[list[str]]:
    ours = [row for row in rows if is_ours(row) and row.operator == "logits"]
    base = {row.key: row.times for row in ours if row.divergence == "forward_kl"}
    lines = []
    for row in ours:
        known = base.get(row.key._replace(divergence="forward_kl"))
        if row.divergence != "forward_kl" and known and row.times:
            key = [row.divergence, row.case, row.dtype, row.part, row.provider]
            lines.append([*key, f"{row.times.median / known.median:.2f}"])
    return [["divergence", "case", "dtype", "pass", "provider", "time"], *lines] if lines else []


# --- two files -----------------------------------------------------------------------------------


def comparison(old: Results, new: Results) -> str:
    """What changed, row by row, beyond the noise: where the 20 % to 80 % ranges do not meet."""
    before = {row.key: row for row in old.rows}
    lines, same = [], 0
    for row in new.rows:
        was = before.get(row.key)
        if was is None or (was.times is None and row.times is None):
            continue
        if was.times is None or row.times is None:
            change = "has figures now" if row.times else f"had figures: {row.note}"
        elif row.times.p20 > was.times.p80 or row.times.p80 < was.times.p20:
            change = f"{was.times.median:.4g} -> {row.times.median:.4g} ms"
            change += f", x {row.times.median / was.times.median:.2f}"
        else:
            same += 1
            continue
        lines.append([*row.key, change])
    unmatched = len(new.rows) - sum(row.key in before for row in new.rows)
    parts = [f"{same} rows unchanged within their noise, {unmatched} not in the old file."]
    if different := _differences(old, new):
        parts = [f"Measured under different conditions: {different}.", *parts]
    if lines:
        parts.append(
            table((("op", "divergence", *"case", "dtype", "pass", "provider", "change"), *lines))
        )
    return "\n\n".join(parts) + "\n"


def _differences(old: Results, new: Results) -> str:
    pairs = [("device", old.header["device"]["name"], new.header["device"]["name"])]
    names = old.header["versions"].keys() | new.header["versions"].keys()
    pairs += [
        (name, old.header["versions"].get(name), new.header["versions"].get(name))
        for name in sorted(names)
    ]
    return "; ".join(f"{name} {was}, now {now}" for name, was, now in pairs if was != now)
