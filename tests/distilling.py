"""`fastkd distill` in the process of a test."""

from unittest.mock import patch

from fastkd import __main__


def distil(*arguments):
    """Its exit code. The picture, which takes as long as the rest of a tiny run, is left empty."""
    from fastkd.distill import report

    with patch.object(report, "png", lambda draw: b""):
        return __main__.main(["distill", *map(str, arguments)])
