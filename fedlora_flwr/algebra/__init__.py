"""Means, factors and gains of named NumPy arrays: pure functions."""
