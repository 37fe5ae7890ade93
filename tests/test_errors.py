from __future__ import annotations

import pickle

from fedlora_flwr.errors import FedLoRAError, InvalidValue, one_of


def test_an_invalid_value_names_key_value_and_what_is_allowed() -> None:
    error = InvalidValue("rank", -1, "a number >= 1")
    assert str(error) == "rank = -1 cannot be used: expected a number >= 1."
    assert isinstance(error, FedLoRAError)
    assert isinstance(error, ValueError)


def test_an_invalid_value_crosses_processes() -> None:
    error = pickle.loads(pickle.dumps(InvalidValue("epsilon", 0.0, "a number above 0")))
    assert (error.key, error.value, error.allowed) == ("epsilon", 0.0, "a number above 0")
    assert str(error) == "epsilon = 0.0 cannot be used: expected a number above 0."


def test_the_nearest_name_is_suggested() -> None:
    assert one_of(["rolora", "ffa-lora"], "rolor") == (
        "one of 'ffa-lora', 'rolora' (did you mean 'rolora'?)"
    )


def test_nothing_is_suggested_for_a_name_like_no_other() -> None:
    assert one_of(["rolora", "ffa-lora"], "xyz") == "one of 'ffa-lora', 'rolora'"
