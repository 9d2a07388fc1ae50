"""The command line: `fastkd`, also `python -m fastkd`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from . import __version__, doctor
from .distill import caching
from .distill import cli as distill
from .distill.errors import Interrupted
from .distill.recipes import cli as recipes

NOBODY_READS = 141  # a shell's code for a process that SIGPIPE ended


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
        code = options.run(options) or 0
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        sys.stderr.write(f"fastkd {options.command}: stopped\n")
        return Interrupted.code
    except BrokenPipeError:  # who reads has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NOBODY_READS


if __name__ == "__main__":
    raise SystemExit(main())
