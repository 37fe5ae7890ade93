"""Results that are kept in files, and what becomes of damaged ones."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fedlora_flwr.privacy import budget
from fedlora_flwr.privacy.budget import (
    Segment,
    Spent,
    calibrate,
    epsilon_spent,
)
from tests.privacy.support import forget

HISTORY = [Segment(1.1, 0.05, 50)]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    return tmp_path / "fedlora" / "accounting"


def test_cached_results_equal_fresh_ones(cache: Path) -> None:
    fresh = epsilon_spent(HISTORY, 1e-4), calibrate(2.0, 1e-4, 0.05, 50)
    assert len(list(cache.iterdir())) == 2

    forget()

    assert (epsilon_spent(HISTORY, 1e-4), calibrate(2.0, 1e-4, 0.05, 50)) == fresh
    assert len(list(cache.iterdir())) == 2


def test_a_whole_file_is_used(cache: Path) -> None:
    epsilon_spent(HISTORY, 1e-4)
    (path,) = cache.iterdir()
    budget._save(path, json.loads(path.read_text())["key"], (123.0, "prv"))

    forget()

    assert epsilon_spent(HISTORY, 1e-4) == Spent(123.0, "prv")


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[1, 2]",
        lambda text: "\x00\xff" * 10,
        lambda text: "[" * 100_000,
        lambda text: json.dumps(json.loads(text) | {"value": 0.5}),
        lambda text: json.dumps(json.loads(text) | {"value": math.nan}),
        lambda text: json.dumps(json.loads(text) | {"accountant": "rdp"}),
    ],
)
def test_a_damaged_file_is_ignored_and_mended(cache: Path, damage: object) -> None:
    assert callable(damage)
    fresh = epsilon_spent(HISTORY, 1e-4)
    (path,) = cache.iterdir()
    whole = path.read_text()
    path.write_text(damage(whole))

    forget()

    assert epsilon_spent(HISTORY, 1e-4) == fresh
    assert path.read_text() == whole


def test_a_file_with_another_question_is_ignored(cache: Path) -> None:
    fresh = epsilon_spent(HISTORY, 1e-4)
    (path,) = cache.iterdir()
    budget._save(path, "another question", (0.1, "prv"))

    forget()

    assert epsilon_spent(HISTORY, 1e-4) == fresh


def test_other_code_or_libraries_have_other_files(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    epsilon_spent(HISTORY, 1e-4)
    stamp = budget._stamp()
    monkeypatch.setattr(budget, "_stamp", lambda: [*stamp[:-1], "0.0"])

    forget()
    epsilon_spent(HISTORY, 1e-4)

    assert len(list(cache.iterdir())) == 2


def test_an_unusable_cache_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    forget()

    assert 0 < epsilon_spent(HISTORY, 1e-4).epsilon < math.inf
