"""`fastkd recipe NAME` and `fastkd tune`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import RECIPES, SAMPLERS

if TYPE_CHECKING:
    from .report import Report


def add(commands: Any) -> None:
    """Adds both to the commands of `fastkd`."""
    about = "Recipes:\n" + "\n".join(f"  {name:12}  {line}" for name, line in RECIPES.items())
    recipe = commands.add_parser(
        "recipe",
        help="Run one experiment on distillation, and compare it with what was expected.",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    recipe.add_argument("name", choices=RECIPES, metavar="NAME", help=", ".join(RECIPES))
    _common(recipe, "runs/NAME")
    recipe.set_defaults(run=lambda options: _run(options, _recipe))

    tune = commands.add_parser(
        "tune", help="Search over temperature, alpha and divergence, over several seeds."
    )
    tune.add_argument("--sampler", choices=SAMPLERS, default="tpe", help="default: tpe")
    tune.add_argument("--trials", type=int, default=30, metavar="N", help="default: 30")
    tune.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampler; default: 0")
    _common(tune, "runs/tune")
    tune.set_defaults(run=lambda options: _run(options, _tune))


def _common(parser: argparse.ArgumentParser, out: str) -> None:
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"where to save; default: {out}")
    parser.add_argument(
        "--quick", action="store_true", help="seconds, and outcomes that say little"
    )


def _recipe(options: argparse.Namespace) -> Report:
    from . import run

    return run(options.name, options.out or Path("runs") / options.name, options.quick)


def _tune(options: argparse.Namespace) -> Report:
    from .tune import tune

    out = options.out or Path("runs/tune")
    return tune(out, options.sampler, options.trials, options.seed, options.quick)


def _run(options: argparse.Namespace, start: Any) -> int:
    from .report import MissingPackage

    try:
        report = start(options)
    except (MissingPackage, OSError) as error:
        print(f"fastkd: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fastkd: stopped", file=sys.stderr)
        return 130
    print(report)
    return 0
