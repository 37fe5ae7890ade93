"""Short, ordinary sentences in American spelling: habits that a pattern can find stay away."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
CODE = [
    *sorted((ROOT / "fedlora_flwr").rglob("*.py")),
    *sorted((ROOT / "fedlora_flwr").rglob("*.toml")),
    *sorted((ROOT / "examples").rglob("*.py")),
]
NOTEBOOKS = sorted((ROOT / "examples").rglob("*.ipynb"))


def written_in(notebook: Path) -> str:
    """Return what its cells hold, without what they have drawn."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells)


TEXTS = {
    **{str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PAGES + CODE},
    **{str(path.relative_to(ROOT)): written_in(path) for path in NOTEBOOKS},
}

_THING = "batch|block|class|client|core|device|machine|process|record|round|step|thread"
_STEMS = (
    "characteri|discreti|emphasi|factori|finali|generali|initiali|locali|maximi|minimi|normali|"
    "optimi|organi|penali|privati|quanti|randomi|recogni|regulari|seriali|speciali|stabili|"
    "standardi|summari|symmetri|synchroni|tokeni|utili|vectori|visuali"
)
HABITS = {
    "British -ise": (
        rf"\b\w*(?:{_STEMS})s(?:e|ed|es|er|ers|ing|ation|ations)\b",
        "It is re-optimised by an optimiser.",
    ),
    "British -our and -re": (
        r"\b\w*(?:behaviour|cent(?:re|red)|colour|favour|neighbour)\w*",
        "Its neighbours have a colour.",
    ),
    "British doubled l": (
        r"\b(?:cancell|labell|modell|signall|totall|travell)(?:ed|ing)\b",
        "A labelled picture",
    ),
    "another British spelling": (
        r"\b(?:artefact|defence|grey|judgement|learnt|licence)",
        "what was learnt from grey pictures",
    ),
    "a distributive 'a': write 'per'": (
        rf"\b(?:one (?!that|with)[a-z]+|once|clients|modes|rows) an? (?:{_THING})\b(?!'| has)",
        "one row a client, made once a process",
    ),
    "'is no X': write 'is not an X'": (
        r"(?<!there )\b(?:is|was) no (?!better|larger|longer|more|one|other|smaller)[a-z]",
        "A link is no file.",
    ),
    "'anew': write 'again'": (
        r"\banew\b",
        "It is made anew.",
    ),
    "'in one piece': write 'whole' or 'atomically'": (
        r"\bin one piece\b",
        "It is written in one piece.",
    ),
    "'goes on': write 'continues'": (
        r"\b(?:goes|go) on (?:at|where|from|without|bit)\b",
        "It goes on at once, and goes on where it stopped.",
    ),
    "'belongs into': write 'belongs in'": (
        r"\bbelongs? into\b",
        "It belongs into the file.",
    ),
    "'mend': write 'fix'": (
        r"\bmend\b",
        "MEND: 3 to mend first",
    ),
    "'whatever': name what it is": (
        r"\bwhatever\b",
        "Whatever it is",
    ),
    "'for ever': write 'forever'": (
        r"\bfor ever\b",
        "It waits for ever.",
    ),
    "'anyhow': write 'anyway'": (
        r"\banyhow\b",
        "which it has anyhow",
    ),
    "a comment that opens with 'Of'": (
        r"(?-i:(?:#|\"\"\") ?Of )",
        "# Of the arrays of a message.",
    ),
}
"""Each habit: the pattern that finds it, and a sentence that has it."""


def found(habit: str, text: str) -> list[str]:
    """Return where a habit occurs, also across the lines of a sentence."""
    joined = re.sub(r"\n[ #]*(?=[a-z])", " ", text)
    return [
        joined[max(0, hit.start() - 40) : hit.end() + 20]
        for hit in re.finditer(HABITS[habit][0], joined, re.I)
    ]


@pytest.mark.parametrize("habit", HABITS)
def test_no_text_has_the_habit(habit: str) -> None:
    assert {name: hits for name, text in TEXTS.items() if (hits := found(habit, text))} == {}


@pytest.mark.parametrize("habit", HABITS)
def test_the_pattern_finds_the_habit(habit: str) -> None:
    assert found(habit, HABITS[habit][1])


def test_what_is_meant_is_let_through() -> None:
    fine = (
        "There is no such file. It is no longer there. A promise, an optimistic figure. "
        "One row per client; for every round. It is amended. The run goes on."
    )
    assert [habit for habit in HABITS if found(habit, fine)] == []
