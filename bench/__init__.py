"""Benchmarks: ``pytest bench/ --benchmark-only``, then ``python -m bench.report FILE``."""
