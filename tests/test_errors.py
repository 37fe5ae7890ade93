from __future__ import annotations

import pickle

import pytest

from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import FedLoRAError, InvalidValue, near_names, unknown


def test_an_invalid_value_names_key_value_and_what_is_allowed() -> None:
    error = InvalidValue("rank", -1, "a number >= 1")
    assert str(error) == "rank = -1 cannot be used: expected a number >= 1."
    assert isinstance(error, FedLoRAError)
    assert isinstance(error, ValueError)


def test_an_invalid_value_crosses_processes() -> None:
    error = pickle.loads(pickle.dumps(InvalidValue("epsilon", 0.0, "a number above 0")))
    assert (error.key, error.value, error.allowed) == ("epsilon", 0.0, "a number above 0")
    assert str(error) == "epsilon = 0.0 cannot be used: expected a number above 0."


def test_the_nearest_name_comes_before_the_list() -> None:
    assert str(unknown("strategy", "rolor", ["rolora", "ffa-lora"])) == (
        "strategy = 'rolor' cannot be used: did you mean 'rolora'? "
        "Expected one of 'ffa-lora', 'rolora'."
    )


def test_words_stand_around_the_list_and_the_whole_value_is_shown() -> None:
    error = unknown("columns", "b", ["a", "c"], before="a text, ", after=", or none", value="a,b")
    assert str(error) == (
        "columns = 'a,b' cannot be used: expected a text, one of 'a', 'c', or none."
    )
    again = pickle.loads(pickle.dumps(unknown("key", "lr", ["lr-a", "lr-b"])))
    assert again.near == ("lr-a", "lr-b")
    assert "did you mean 'lr-a' or 'lr-b'? Expected" in str(again)


def test_of_many_names_the_similar_ones_or_the_command_that_lists_them_are_shown() -> None:
    names = [f"layers.{i}" for i in range(100)]
    text = str(unknown("head", "layer.7", names))
    assert "did you mean 'layers.7'? Expected one of 100 names, such as 'layers.7', " in text
    assert text.count("'layers.") == 9
    listed = str(unknown("key", "layer.7", names, listed_by="fedlora keys"))
    assert listed.endswith("Expected one of the 100 that `fedlora keys` lists.")
    with pytest.raises(InvalidValue) as caught:
        RunConfig.of({"epsilom": 3.0})
    assert len(str(caught.value)) < 150
    assert "did you mean 'epsilon'?" in str(caught.value)


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ("lr", ("lr-a", "lr-b", "lr-head")),
        ("LR_A", ("lr-a",)),
        ("num_round", ("num-rounds",)),
        ("epsilom", ("epsilon",)),
        ("r", ()),
        ("", ()),
        ("quick", ()),
        ("rank", tuple(f"rank-{number}" for number in range(1, 9))),
    ],
)
def test_names_that_begin_so_are_near_or_else_the_most_similar(
    given: str, near: tuple[str, ...]
) -> None:
    names = [
        "epsilon",
        "lr-a",
        "lr-b",
        "lr-head",
        "num-rounds",
        *(f"rank-{i}" for i in range(1, 9)),
    ]
    assert near_names(given, names) == near
