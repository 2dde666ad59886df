"""Benchmarks of the operators and the training step beside their peers: ``pytest bench/ --benchmark-only``."""

OURS = "patchkernels"  # the contender that the others are compared with
