"""Pytest looks for examples in every module, but reads.py needs Triton to be imported at all."""

collect_ignore = ["reads.py"]
