"""Backbones: models with frozen weights, which are loaded or pretrained here on public data."""
