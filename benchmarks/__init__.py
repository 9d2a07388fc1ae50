"""The benchmark suite: `python -m benchmarks`. README.md beside this says how to use it."""
