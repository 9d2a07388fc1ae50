"""The options of `fastkd distill`, and how it ends."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import os
import sys
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from . import settings, storage
from .problems import Interrupted, Problem, Usage

HELP = "Distil a teacher into a student, and show what came of it."
ABOUT = """
Without arguments: trains a small teacher on text that Python carries, then a student on hard
labels, with F.kl_div, and with fastkd, on the same batches, and compares them. With --teacher and
--student: distils Hugging Face causal language models on --data.
"""


class Parser(argparse.ArgumentParser):
    """One line for a wrong option, not the usage of thirty."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def, override]
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            near = difflib.get_close_matches(unknown[0], self._option_string_actions, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            self.error(f"unknown option {unknown[0]}{hint}")
        return namespace, unknown


def add(commands: Any) -> None:
    """Adds `distill` to the commands of `fastkd`."""
    parser = commands.add_parser("distill", help=HELP, description=ABOUT, allow_abbrev=False)
    parser.set_defaults(run=run)
    parser.add_argument("--config", metavar="FILE", help="settings as TOML; options override it")
    parser.add_argument("--out", metavar="DIR", help="where to save; default: runs/<date>")
    parser.add_argument("--resume", metavar="DIR", help="go on with the run that stopped there")
    kinds = (
        (settings.Common, ""),
        (settings.Small, "the default job"),
        (settings.Own, "--teacher"),
    )
    seen: set[str] = set()
    for kind, of in kinds:
        group = parser.add_argument_group(f"settings of {of}" if of else "settings")
        for item in dataclasses.fields(kind):
            if item.name not in seen:
                _option(group, item, get_type_hints(kind)[item.name])
        seen |= {item.name for item in dataclasses.fields(kind)}


def _option(group: Any, item: dataclasses.Field[Any], kind: Any) -> None:
    default = "" if item.default in ((), "") else f"; default: {item.default}"
    of_own = getattr(settings.Own, item.name, item.default)
    if of_own != item.default:
        default += f", with --teacher: {of_own}"
    common = {"help": item.metadata["help"] + default, "default": argparse.SUPPRESS}
    name = "--" + item.name.replace("_", "-")
    if kind is bool:
        group.add_argument(name, action=argparse.BooleanOptionalAction, **common)
    elif kind == tuple[str, ...]:
        group.add_argument(name, nargs="+", metavar="FILE", **common)
    else:
        group.add_argument(name, type=kind, metavar=kind.__name__.upper(), **common)


def run(options: argparse.Namespace) -> int:
    """Runs what was asked for; 0, or the code of the one line it says about what went wrong."""
    try:
        _run(options)
    except Problem as problem:
        if isinstance(problem, Interrupted) and os.environ.get("RANK", "0") != "0":
            return problem.code  # one of several processes has said it
        print(f"fastkd distill: {problem}", file=sys.stderr)
        return problem.code
    except KeyboardInterrupt:
        print("fastkd distill: stopped", file=sys.stderr)
        return Interrupted.code
    return 0


def _run(options: argparse.Namespace) -> None:
    kinds = (settings.Small, settings.Own)
    names = {item.name for kind in kinds for item in dataclasses.fields(kind)}
    given = {name: value for name, value in vars(options).items() if name in names}
    if options.resume:
        if given or options.config or options.out:
            raise Usage("--resume takes its settings from the folder: leave the other options out")
        folder = storage.old_folder(options.resume)
        _start(_settings(settings.read(folder / storage.CONFIG), {}), folder, resume=True)
        return
    values = settings.read(Path(options.config)) if options.config else {}
    chosen = _settings(values, given)
    if not options.out and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise Usage("several processes need one --out that all of them know")
    folder = storage.new_folder(options.out)
    try:
        _start(chosen, folder, resume=False)
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # if nothing came of it


def _settings(values: dict[str, Any], given: dict[str, Any]) -> settings.Small | settings.Own:
    """The settings of the job that is meant: options win over the file, and that over defaults."""
    both = {**values, **given}
    for name in ("data", "teacher", "student"):
        if name in both:
            both[name] = settings.absolute(name, both[name])
    if "teacher" in both or "student" in both:
        return settings.build(settings.Own, both)
    return settings.build(settings.Small, both)


def _start(chosen: settings.Small | settings.Own, folder: Path, *, resume: bool) -> None:
    if isinstance(chosen, settings.Own):
        from . import own

        own.run(chosen, folder, resume=resume)
    else:
        from . import small

        small.run(chosen, folder, resume=resume)
