"""Benchmarks: ratios measured side by side in one run, results checked before they are timed."""
