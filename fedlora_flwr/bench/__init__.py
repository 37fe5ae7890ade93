"""Benchmarks: ratios to what a user would have otherwise, in one run on one machine."""
