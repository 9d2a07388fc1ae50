"""`fastkd recipe NAME`."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from fastkd.distill import cli, storage

from . import RECIPES, run


def add(commands: Any) -> None:
    """Adds `recipe` to the commands of `fastkd`."""
    about = "Recipes:\n" + "\n".join(f"  {name:12}  {line}" for name, line in RECIPES.items())
    recipe = commands.add_parser(
        "recipe",
        help="Run one experiment on distillation, and compare it with what was expected.",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    recipe.add_argument(
        "name", choices=RECIPES, metavar="NAME", nargs="?", help="without one: this help"
    )
    recipe.add_argument(
        "--out", type=Path, metavar="DIR", help="where to save; default: runs/<date>_NAME"
    )
    recipe.add_argument(
        "--quick", action="store_true", help="seconds, and outcomes that say little"
    )
    recipe.set_defaults(run=partial(cli.run, partial(_recipe, recipe)))


def _recipe(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.name is None:
        parser.print_help()
        return
    out = options.out or storage.dated(f"_{options.name}")
    print(run(options.name, out, options.quick))
    print(f"\nSaved: {out}/")
