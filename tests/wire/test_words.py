from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedlora_flwr
from fedlora_flwr import wire

PACKAGE = Path(fedlora_flwr.__file__).parent
# Words that nothing else is called by; "plan" or "loss" are also names of other things.
WORDS = sorted(
    value
    for name, value in vars(wire).items()
    if name.isupper() and isinstance(value, str) and "-" in value
)


def literals(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@pytest.mark.parametrize("word", WORDS)
def test_a_word_of_the_wire_is_written_in_one_room(word: str) -> None:
    places = [p for p in PACKAGE.rglob("*.py") if "wire" not in p.relative_to(PACKAGE).parts]
    assert len(places) > 100
    assert [str(place) for place in places if word in literals(place)] == []


def test_there_are_such_words() -> None:
    assert {wire.ROUND, wire.NAMES, wire.STATUS_EXHAUSTED, wire.PEAK_MEMORY} <= set(WORDS)


def test_what_flower_keeps_to_itself_is_imported_in_one_file() -> None:
    private = (
        "flwr.supercore",
        "flwr.common.constant",
        "flwr.common.secure_aggregation",
        "flwr.server.compat",
    )
    found = {
        str(place.relative_to(PACKAGE))
        for place in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(place.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(private)
    }
    assert found == {"flower_internals.py"}
