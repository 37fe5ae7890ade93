from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora_flwr.tasks.squad import exact_match, f1, normalize


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat", "cat"),
        ("an apple, a day!", "apple day"),
        ("U.S.A.", "usa"),
        ("Theatre and banana", "theatre and banana"),
        ("“quoted” – café", "“quoted” – café"),
        ("a\tb\n the  c ", "b c"),
        ("don't", "dont"),
        ("a-b", "ab"),  # Punctuation goes first: this is no article.
        ("the", ""),
        ("?!", ""),
        ("", ""),
    ],
)
def test_what_is_left_of_a_text(text: str, expected: str) -> None:
    assert normalize(text) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "overlap"),
    [
        ("The cat!", ["cat"], 1, 1),
        ("black cat", ["cat"], 0, 2 / 3),  # Precision 1/2, recall 1.
        ("cat", ["the big black cat"], 0, 1 / 2),  # Precision 1, recall 1/3.
        ("big dog", ["big black cat"], 0, 2 / 5),
        ("cat black", ["black cat"], 0, 1),
        ("dog", ["cat"], 0, 0),
        ("cat cat", ["cat"], 0, 2 / 3),  # A word counts as often as it occurs.
        ("cat cat dog", ["cat cat cat"], 0, 2 / 3),
        ("black cat", ["dog", "black", "black cat sat"], 0, 4 / 5),
        ("cat", ["dog", "Cat."], 1, 1),
        ("", [], 1, 1),
        ("the", [], 1, 1),  # Nothing but an article says nothing.
        ("cat", [], 0, 0),
        ("", ["cat"], 0, 0),
        ("", ["a"], 1, 1),
        ("", ["a", "cat"], 0, 0),
        ("cat", ["!", "cat"], 1, 1),
    ],
)
def test_hand_worked_answers(
    prediction: str, answers: list[str], exact: float, overlap: float
) -> None:
    assert exact_match(prediction, answers) == exact
    assert f1(prediction, answers) == pytest.approx(overlap)


words = st.lists(st.sampled_from(["cat", "dog", "sat", "The", "a"]), max_size=6).map(" ".join)


@given(words, st.lists(words, max_size=3))
def test_f1_is_between_exact_match_and_one_and_each_answer_is_as_good(
    prediction: str, answers: list[str]
) -> None:
    assert exact_match(prediction, answers) <= f1(prediction, answers) <= 1
    assert f1(prediction, answers) == f1(prediction, answers[::-1])
    assert exact_match(prediction, [*answers, prediction]) == 1 or not normalize(prediction)
