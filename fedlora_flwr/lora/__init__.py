"""Adapters on a backbone, and what happens to its frozen weights."""
