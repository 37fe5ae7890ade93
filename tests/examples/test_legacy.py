from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from tests.examples.projects import (
    ALL_A,
    ALL_B,
    assert_learned_by_rolora,
    copy_of,
    flwr_run,
    local_run,
    moved,
    rounds,
)


@pytest.mark.flower
def test_flwr_run_of_a_legacy_project_obeys_the_plan(tmp_path: Path) -> None:
    app = copy_of("legacy", tmp_path)
    log = flwr_run(app, {"output": tmp_path})
    assert_learned_by_rolora(tmp_path, log)


@pytest.mark.parametrize("strategy", ["la-lora", "as-lora"])
def test_other_methods_in_a_legacy_project(strategy: str, tmp_path: Path) -> None:
    app = copy_of("legacy", tmp_path)
    local_run(app, "legacy_digits", {"strategy": strategy, "output": tmp_path})
    found = rounds(tmp_path)
    changes = [moved(*pair) - {"head"} for pair in pairwise(found)]
    if strategy == "la-lora":
        assert changes == [ALL_A | ALL_B] * 3
    else:
        assert changes[:2] == [ALL_B, ALL_A]
        assert sorted(name[0] for name in changes[2]) == ["0", "1", "2"]
