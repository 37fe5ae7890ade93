"""Lists of names in one value of the configuration."""

from __future__ import annotations


def names(text: str) -> tuple[str, ...]:
    """Split names with commas between them."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
