"""The page on methods names a test behind each element; those tests exist."""

from __future__ import annotations

import re
from pathlib import Path

from fedlora_flwr.strategies import STRATEGIES

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")


def test_every_test_that_the_page_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    written: set[str] = set()
    for file in (ROOT / "tests").rglob("test_*.py"):
        written |= set(re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.M))

    assert len(named) > 20
    assert named <= written


def test_every_strategy_is_on_the_page() -> None:
    first_column = set(re.findall(r"^\| `([\w-]+)` \|", PAGE, re.M))
    assert set(STRATEGIES) <= first_column
