"""The instruction task of the benchmarks: its conversations, its model's start, and a run of it."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import skills
from fedlora_flwr import simulate


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return skills.make(tmp_path_factory.mktemp("skills"), steps=2)


def test_an_answer_is_what_the_question_asks_for(recipe: Path) -> None:
    rows = [json.loads(line) for line in (recipe.parent / "data/train.jsonl").open()]
    assert Counter(row["source"] for row in rows) == dict.fromkeys(
        (f"client-{client}" for client in range(skills.CLIENTS)), skills.RECORDS
    )
    meanings = {word: skill for skill, words in skills.ASKED.items() for word in words}
    assert len(meanings) == sum(map(len, skills.ASKED.values()))
    for row in rows:
        question, answer = (message["content"].split() for message in row["messages"])
        asked, words = question[0], question[1:]
        expected = {
            "copy": words, "reverse": list(reversed(words)), "first": [words[0]],
            "last": [words[-1]],
        }[meanings[asked]]  # fmt: skip
        assert answer == expected, row


def test_public_text_does_not_tell_what_the_other_words_ask_for() -> None:
    """Beside each word, each skill is as frequent as any other."""
    draw, seen = random.Random(3), Counter[tuple[str, str]]()
    texts = skills.public(draw)
    for _ in range(20_000):
        other, skill = next(texts).split()[2:4]
        seen[other, skill] += 1
    mean = 20_000 / len(seen)
    assert len(seen) == 16 * 4
    assert max(seen.values()) < 1.3 * mean
    assert min(seen.values()) > 0.7 * mean


def test_a_private_run_of_it_is_measured_by_written_answers(recipe: Path, tmp_path: Path) -> None:
    run = simulate(
        str(recipe), num_rounds=1, local_steps=1, batch_size=16, generation_limit=8, eval_every=1,
        run_dir=str(tmp_path / "run"), progress=False,
    )  # fmt: skip
    assert run.summary["epsilon_max"] <= 3
    assert 0 <= run.summary["final_exact_match"] <= 1
