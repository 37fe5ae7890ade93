"""The reason of a client's failure begins with what is wrong."""

from __future__ import annotations

import traceback

import pytest
import torch
from flwr.app import RecordDict
from torch import nn

from fedlora_flwr import RoLoRA
from fedlora_flwr.errors import FederationAborted
from fedlora_flwr.strategies.reasons import reason_of
from tests.strategies.tiny import Asked, Tiny


def other_names(asked: Asked) -> RecordDict:
    """Load the server's arrays as the loop of another project would."""
    arrays = {name: torch.tensor(array) for name, array in asked.arrays.items()}
    nn.Linear(2, 2).load_state_dict(arrays)
    raise AssertionError("the names do not fit")


def test_a_model_that_does_not_fit_says_what_is_missing() -> None:
    with pytest.raises(FederationAborted) as caught:
        Tiny(2, other_names).run(RoLoRA(), num_rounds=1)
    assert (
        ": RuntimeError: Error(s) in loading state_dict for Linear: "
        'Missing key(s) in state_dict: "weight", "bias".'
    ) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "no reason given"),
        ("<class 'OSError'>:<'disk is full\\nfree some'>".replace("\\n", "\n"),
         "disk is full free some"),
        ("ray::Actor.run()\n  File \"a.py\", line 3, in f\n    f()\nValueError: one\n\ttwo",
         "ValueError: one two"),
        ('  File "a.py", line 3, in f\n    raise', "raise"),
        ("a\n" * 90, "a a a a a a"),
    ],
)  # fmt: skip
def test_a_reason_has_the_message_and_no_frames(text: str | None, reason: str) -> None:
    assert reason_of(text) == reason


def test_of_a_chain_the_last_error_counts() -> None:
    try:
        try:
            raise KeyError("first")
        except KeyError:
            raise ValueError("second\nand more") from None
    except ValueError:
        assert reason_of(traceback.format_exc()) == "ValueError: second and more"
