"""The command line: `fastkd`, also `python -m fastkd`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from . import doctor


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="fastkd", description="Fused knowledge-distillation losses for PyTorch."
    )
    commands = parser.add_subparsers(title="commands", metavar="command", required=True)
    command = commands.add_parser("doctor", help=doctor.__doc__, description=doctor.__doc__)
    command.set_defaults(run=doctor.run)
    return parser.parse_args(arguments).run()


if __name__ == "__main__":
    raise SystemExit(main())
