"""The command line: `fastkd`, also `python -m fastkd`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import __version__, doctor
from .distill import caching
from .distill import cli as distill
from .distill.errors import Interrupted
from .distill.recipes import cli as recipes


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="fastkd", description="Fused knowledge-distillation losses for PyTorch."
    )
    parser.add_argument("--version", action="version", version=f"fastkd {__version__}")
    parser.set_defaults(run=lambda options: parser.print_help())
    commands = parser.add_subparsers(
        title="commands",
        dest="command",
        metavar="command",
        parser_class=distill.Parser,
    )
    command = commands.add_parser("doctor", help=doctor.__doc__, description=doctor.__doc__)
    command.set_defaults(run=lambda options: doctor.run())
    distill.add(commands)
    caching.add(commands)
    recipes.add(commands)
    options = parser.parse_args(arguments)
    try:
        return options.run(options) or 0
    except KeyboardInterrupt:
        sys.stderr.write(f"fastkd {options.command}: stopped\n")
        return Interrupted.code


if __name__ == "__main__":
    raise SystemExit(main())
