"""The breaks name tests that exist, and the runner tells what is noticed from what is not."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.breaks.__main__ import every_break
from tests.breaks.breaks import Break
from tests.breaks.runner import ROOT, Ran, Report, not_caught

BREAKS = every_break()
LEAST = 50


def test_each_break_has_a_name_of_its_own_and_there_are_enough() -> None:
    assert [name for name, count in Counter(one.name for one in BREAKS).items() if count > 1] == []
    assert len(BREAKS) >= LEAST


@pytest.mark.parametrize("one", BREAKS, ids=lambda one: one.name)
def test_a_break_says_what_is_wrong_and_which_test_notices(one: Break) -> None:
    assert one.fault.endswith(".")
    assert len(one.fault.splitlines()) == 1
    file, _, test = one.test.partition("::")
    tree = ast.parse((ROOT / file).read_text("utf-8"))
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert test.partition("[")[0] in names


@pytest.mark.parametrize("one", BREAKS, ids=lambda one: one.name)
def test_what_a_break_replaces_is_there(one: Break) -> None:
    """A fault in a function that has another name by now would break nothing."""
    with pytest.MonkeyPatch.context() as patch:
        one.apply(patch)


RUN = """
import sys
from tests.breaks.__main__ import every_break, main
from tests.breaks.breaks import Break

bogus = Break("bogus", "Nothing is wrong.", {test!r}, lambda patch: None)
sys.exit(main(sys.argv[1:], [*every_break(), bogus]))
"""


def test_the_runner_misses_a_break_that_nothing_notices(tmp_path: Path) -> None:
    cheap, file = ["noise_without_a_clip_norm", "secure_noise_halved"], tmp_path / "rows.json"
    sound = "tests/privacy/test_noise.py::test_noise_is_standard_normal[os]"
    words = ["--only", *cheap, "bogus", "--workers", "2", "--json", str(file)]
    done = subprocess.run(
        [sys.executable, "-c", RUN.format(test=sound), *words],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )

    assert done.returncode == 1, done.stdout + done.stderr
    assert "bogus: NOT caught: its test passes" in done.stdout
    assert done.stdout.strip().splitlines()[-1].startswith("2 of 3 breaks are caught")
    found = {row["name"]: row["found"] for row in json.loads(file.read_text())}
    assert found == {cheap[0]: "caught", cheap[1]: "caught", "bogus": "NOT caught"}


@pytest.mark.parametrize(
    ("status", "reports", "why"),
    [
        (1, [Report("t", "call", "failed", "AssertionError")], ""),
        (1, [Report("t", "call", "failed", "Failed")], ""),
        (0, [Report("t", "call", "passed", "")], "its test passes"),
        (0, [Report("t", "setup", "skipped", "Skipped")], "skipped in its setup"),
        (1, [Report("t", "setup", "failed", "KeyError")], "failed in its setup"),
        (1, [Report("t", "call", "failed", "ImportError")], "not with an assertion"),
        (2, [], "did not run"),
        (-9, [], "was killed"),
    ],
)
def test_only_a_failed_assertion_of_the_test_counts(
    status: int, reports: list[Report], why: str
) -> None:
    found = not_caught(Ran(status, reports, 1.0, "an error in the collection"))
    assert why in found
    assert bool(why) == bool(found)
