"""README's account of the default job, from a run of it on a machine with nothing else to do:
`python -m benchmarks.default_job`.

README.md gets the table, the margin and the time, docs/distilling.md the steps of equal time, and
docs/distill.png the run's picture.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
README, PAGE, PICTURE = (
    ROOT / name for name in ("README.md", "docs/distilling.md", "docs/distill.png")
)


def table(found: dict[str, Any]) -> str:
    """As the terminal shows it, in lines that fit a page."""
    head = f"{'loss':>21}           KL (nats) agreed  steps  seconds   share     MiB\n {'─' * 78}\n"
    teacher = found["teacher"]
    lines = [f" {'teacher':15} {teacher['validation_loss']:.3f} {teacher['steps']:>23}"]
    for name, of in found["students"].items():
        spread = f"± {of['spread']:.3f}" if len(of["losses"]) > 1 else ""
        lines.append(
            f" {name:15} {of['validation_loss']:.3f} {spread:7}    {of['kl_to_teacher']:.3f}"
            f" {of['agreement']:>7.1%}  {of['steps']:>5} {of['steps'] * of['step_ms'] / 1e3:>8.1f}"
            f" {of['loss_share']:>7.0%} {of['loss_peak_bytes'] / 2**20:>7.1f}"
        )
    return head + "\n".join(line.rstrip() for line in lines) + "\n"


def changed(text: str, pattern: str, new: str) -> str:
    """The text with the one place that the pattern finds written anew."""
    text, count = re.subn(pattern, lambda match: new, text, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{pattern!r} is there {count} times, where one was expected")
    return text


def publish(folder: Path, seconds: float | None) -> None:
    found = json.loads((folder / "metrics.json").read_text())
    readme, page = README.read_text(), PAGE.read_text()
    readme = changed(readme, r" +loss +KL \(nats\).*?(?=```)", table(found))
    margin = f"{found['margin']:.3f} ± {found['margin_error']:.3f} nats"
    readme = changed(readme, r"\d\.\d+ ± \d\.\d+ nats", margin)
    if seconds is not None:
        readme = changed(readme, r"after \d+ seconds", f"after {seconds:.0f} seconds")
    steps = found["students"]["fastkd"]["steps"]
    page = changed(page, r"\(\d+ for\s\d+ in", f"({found['equal_time']} for {steps} in")
    README.write_text(readme)
    PAGE.write_text(page)
    PICTURE.write_bytes((folder / "curves.png").read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.default_job", description=__doc__)
    parser.add_argument(
        "folder", nargs="?", type=Path, help="a run that is there, without its time"
    )
    if (given := parser.parse_args().folder) is not None:
        if not (given / "metrics.json").exists():
            parser.error(f"{given} is no run of fastkd distill: it has no metrics.json")
        publish(given, None)
        return
    folder, began = ROOT / "runs" / f"readme-{time.strftime('%Y-%m-%d_%H-%M-%S')}", time.monotonic()
    subprocess.run([sys.executable, "-m", "fastkd", "distill", "--out", folder], check=True)
    publish(folder, time.monotonic() - began)


if __name__ == "__main__":
    main()
