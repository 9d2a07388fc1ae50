"""The command `fastkd`, away from the package, whose import takes the seconds that PyTorch's does.

Ctrl-C would be a traceback there, or be lost to whoever catches it.
"""

import os
import signal
import sys
from typing import Any


def main() -> int:
    """Runs the command; until it is imported Ctrl-C ends the process in one line."""
    own = signal.getsignal(signal.SIGINT)
    if own is signal.default_int_handler:  # not where a shell has it ignored
        signal.signal(signal.SIGINT, _stop)
    from fastkd.__main__ import main as command

    signal.signal(signal.SIGINT, own)
    return command()


def _stop(*call: Any) -> None:
    sys.stderr.write("fastkd: stopped\n")
    sys.stderr.flush()
    os._exit(130)
