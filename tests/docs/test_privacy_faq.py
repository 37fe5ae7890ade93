"""The answers to a privacy researcher point at tests that exist, or say what is not covered."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

from tests.docs.pages import DOCS, NAMES, ROOT

PAGE = (DOCS / "privacy_faq.md").read_text("utf-8")
ANSWERS: dict[str, str] = dict(re.findall(r"^### (.*?)\n(.*?)(?=^##|\Z)", PAGE, re.M | re.S))
ID = re.compile(r"tests/[\w/]+\.py::\w+")
IDS = sorted({one for page in NAMES for one in ID.findall((DOCS / page).read_text("utf-8"))})


@cache
def functions_of(file: str) -> frozenset[str]:
    tree = ast.parse((ROOT / file).read_text("utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def test_there_are_enough_questions_and_each_is_one() -> None:
    assert len(ANSWERS) >= 30
    assert [title for title in ANSWERS if not title.rstrip("`").endswith("?")] == []


@pytest.mark.parametrize("one", IDS)
def test_a_named_test_exists(one: str) -> None:
    file, name = one.split("::")
    assert name.startswith("test_")
    assert name in functions_of(file)


@pytest.mark.parametrize("title", ANSWERS)
def test_an_answer_has_a_test_or_a_number_or_says_not_covered(title: str) -> None:
    text = " ".join(ANSWERS[title].split())
    assert ID.search(text) or "not covered" in text or re.search(r"\d\.\d|\d %", text)
    sentences = re.split(r"(?<=[.?!:])\s+(?=[A-Z`(])", text)
    assert 2 <= len(sentences) <= 8, sentences


def test_the_page_is_reached_from_the_contract() -> None:
    assert "privacy_faq.md" in (DOCS / "privacy.md").read_text("utf-8")
