"""The options of `fastkd distill` and `fastkd tune`, and how they end."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from . import config, devices, settings, storage
from .errors import Interrupted, RunError, Usage

DISTILL = "Distil a teacher into a student, and show what came of it."
ABOUT_DISTILL = """
Without arguments: trains a small teacher on text that Python carries, then a student on hard
labels, with F.kl_div, and with fastkd, on the same batches, and compares them. With --teacher and
--student: distils Hugging Face causal language models on --data.
"""
TUNE = "Search over temperature, alpha and divergence, over several seeds."
ABOUT_TUNE = """
Trains a student of `fastkd distill` for each trial and seed, of the default job or, with --teacher
and --student, of the user's models. What it finds is compared with the settings as given and with
hard labels only, on seeds that the search has not seen. The default takes about ten minutes.
"""


class Parser(argparse.ArgumentParser):
    """One line for a wrong option, not the usage of thirty."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def, override]
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            near = _near(unknown[0].partition("=")[0], self._option_string_actions)
            hint = f"; did you mean {near}?" if near else ""
            self.error(f"unknown option {unknown[0]}{hint}")
        return namespace, unknown


def _near(name: str, names: Iterable[str]) -> str:
    """The shortest of the names that begin so; or else the one most like it; or none."""
    longer = [each for each in names if each.startswith(name)]
    return min(longer, key=len, default="") or "".join(difflib.get_close_matches(name, names, n=1))


def add(commands: Any) -> None:
    """Adds `distill` and `tune` to the commands of `fastkd`."""
    distill = commands.add_parser(
        "distill", help=DISTILL, description=ABOUT_DISTILL, allow_abbrev=False
    )
    distill.set_defaults(run=partial(run, _distill))
    distill.add_argument("--out", metavar="DIR", help="where to save; default: runs/<date>")
    distill.add_argument("--resume", metavar="DIR", help="go on with the run that stopped there")
    tune = commands.add_parser("tune", help=TUNE, description=ABOUT_TUNE, allow_abbrev=False)
    tune.set_defaults(run=partial(run, _tune))
    tune.add_argument(
        "--out", metavar="DIR", default="runs/tune", help="where to save; default: runs/tune"
    )
    kinds = get_type_hints(settings.Search)
    for item in dataclasses.fields(settings.Search):
        option(tune, item, kinds[item.name])
    for parser in (distill, tune):
        _settings_options(parser)


def _settings_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="settings as TOML; options override it")
    groups = (
        (settings.Common, "settings"),
        (settings.DefaultJob, "settings of the default job"),
        (settings.UserModels, "settings of --teacher"),
    )
    seen: set[str] = set()
    for owner, title in groups:
        group, kinds = parser.add_argument_group(title), get_type_hints(owner)
        for item in dataclasses.fields(owner):
            if item.name not in seen:
                option(group, item, kinds[item.name])
        seen |= {item.name for item in dataclasses.fields(owner)}


def option(group: Any, item: dataclasses.Field[Any], kind: Any, **others: Any) -> None:
    default = "" if item.default in ((), "") else f"; default: {item.default}"
    of_users = getattr(settings.UserModels, item.name, item.default)
    if of_users != item.default:
        default += f", with --teacher: {of_users}"
    common = {"help": item.metadata["help"] + default, "default": argparse.SUPPRESS, **others}
    name = "--" + item.name.replace("_", "-")
    if kind is bool:
        group.add_argument(name, action=argparse.BooleanOptionalAction, **common)
    elif kind == tuple[str, ...]:
        metavar = "NAME" if item.name in ("teacher", "report_to") else "FILE"
        group.add_argument(name, nargs="+", action="extend", metavar=metavar, **common)
    else:
        group.add_argument(name, type=kind, metavar=kind.__name__.upper(), **common)


def run(command: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> int:
    """Runs the command; 0, or the code of the one line it says about what went wrong."""
    try:
        with devices.enough_memory():
            command(options)
    except RunError as error:
        _tell_torchrun(error)
        if isinstance(error, Interrupted) and os.environ.get("RANK", "0") != "0":
            return error.code  # one of several processes has said it
        print(f"fastkd {options.command}: {error}", file=sys.stderr)
        return error.code
    return 0


def _tell_torchrun(error: RunError) -> None:
    """torchrun repeats it below its own traceback, where it is read."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def _distill(options: argparse.Namespace) -> None:
    given = _given(options)
    if options.resume:
        if given or options.config or options.out:
            raise Usage("--resume takes its settings from the folder: leave the other options out")
        with _one_process_locks(storage.old_folder, options.resume) as folder:
            _start(_of_run(folder / storage.CONFIG), folder, resume=True)
        return
    chosen = _settings(_from_file(options), given)
    if not options.out and _processes() > 1:
        raise Usage("several processes need one --out that all of them know")
    with _one_process_locks(storage.new_folder, options.out) as folder:
        _start(chosen, folder, resume=False)


def _one_process_locks(
    folder: Callable[[str], AbstractContextManager[Path]], name: str
) -> AbstractContextManager[Path]:
    """The folder of a run of several processes, which the first checks and locks for all."""
    return folder(name) if os.environ.get("RANK", "0") == "0" else nullcontext(Path(name))


def _tune(options: argparse.Namespace) -> None:
    names = {item.name for item in dataclasses.fields(settings.Search)}
    search = settings.Search(**{name: vars(options)[name] for name in names & set(vars(options))})
    search.check()
    chosen = _settings(_from_file(options), _given(options))
    if _processes() > 1:
        raise Usage("the search trains in one process")
    with storage.new_folder(options.out, ours="study.db") as folder:
        from . import tune

        print(tune.run(chosen, search, folder))
        print(f"\nSaved: {folder}/")


def _given(options: argparse.Namespace) -> dict[str, Any]:
    kinds = (settings.DefaultJob, settings.UserModels)
    names = {item.name for kind in kinds for item in dataclasses.fields(kind)}
    return {name: value for name, value in vars(options).items() if name in names}


def _from_file(options: argparse.Namespace) -> dict[str, Any]:
    return config.read(Path(options.config)) if options.config else {}


def _of_run(path: Path) -> settings.DefaultJob | settings.UserModels:
    """The settings that a run wrote when it began: all of them, or it might be of the other job."""
    values = config.read(path)
    chosen = _settings(values, {})
    mend = "put back what it said when the run began"
    for name in config.values(chosen):
        if name not in values:
            raise Usage(f"{path} says nothing of {name}: {mend}")
    other = storage.CHECKPOINT if isinstance(chosen, settings.UserModels) else storage.INPUTS
    if (path.parent / other).exists():
        raise Usage(f"{path} is of the other job, and {other} of this run is not: {mend}")
    return chosen


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def _settings(
    values: dict[str, Any], given: dict[str, Any]
) -> settings.DefaultJob | settings.UserModels:
    """The settings of the job that is meant: options win over the file, and that over defaults."""
    both = settings.absolute({**values, **given})
    if both.keys() & {"teacher", "teacher_cache", "student"}:
        return settings.build(settings.UserModels, both)
    return settings.build(settings.DefaultJob, both)


def _start(
    chosen: settings.DefaultJob | settings.UserModels, folder: Path, *, resume: bool
) -> None:
    if isinstance(chosen, settings.UserModels):
        from . import user_models

        user_models.run(chosen, folder, resume=resume)
    else:
        from . import default_job

        default_job.run(chosen, folder, resume=resume)
