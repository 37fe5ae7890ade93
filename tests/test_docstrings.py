"""Examples in docstrings give what they show, and every public name has one."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

import fedlora_flwr

PACKAGE = Path(fedlora_flwr.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)
PUBLIC = [name for name in fedlora_flwr.__all__ if name != "__version__"]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted > 0
    assert found.failed == 0


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_has_an_example_with_a_result(name: str) -> None:
    docstring = getattr(fedlora_flwr, name).__doc__
    examples = doctest.DocTestParser().get_examples(docstring)
    assert "Examples\n" in docstring
    assert any(re.search(rf"\b{name}\b", example.source) for example in examples)
    assert any(example.want for example in examples)
