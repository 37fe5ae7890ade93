"""Examples in docstrings give what they show, and every public name has one or is listed here."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import fedlora_flwr

PACKAGE = Path(fedlora_flwr.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted > 0
    assert found.failed == 0
