"""`fastkd recipe NAME`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

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
    recipe.add_argument("name", choices=RECIPES, metavar="NAME", help=", ".join(RECIPES))
    recipe.add_argument("--out", type=Path, metavar="DIR", help="where to save; default: runs/NAME")
    recipe.add_argument(
        "--quick", action="store_true", help="seconds, and outcomes that say little"
    )
    recipe.set_defaults(run=_recipe)


def _recipe(options: argparse.Namespace) -> int:
    from .report import MissingPackage

    out = options.out or Path("runs") / options.name
    try:
        report = run(options.name, out, options.quick)
    except (MissingPackage, OSError) as error:
        print(f"fastkd recipe: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fastkd recipe: stopped", file=sys.stderr)
        return 130
    print(report)
    print(f"\nSaved: {out}/")
    return 0
