"""What a project reads where something is missing for a strategy: one sentence, in full."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, RecordDict
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp

from fedlora_flwr.errors import FedLoRAError
from fedlora_flwr.simulations.local_grid import LocalGrid
from fedlora_flwr.strategies import ASLoRA, FedLoRA, RoLoRA
from tests.strategies.tiny import Arrays, Asked, Tiny, record_of, reply_of, start_arrays


def sentence(strategy: FedLoRA, tiny: Tiny, start: Arrays | None = None) -> str:
    with tiny.grid() as grid, pytest.raises(FedLoRAError) as caught:
        strategy.start(grid, record_of(start or start_arrays()), num_rounds=1)
    return str(caught.value)


def test_arrays_that_do_not_look_like_lora() -> None:
    arrays = {"conv.weight": np.zeros((3, 3), np.float32)}
    assert sentence(RoLoRA(), Tiny(2), arrays) == (
        "array names = ['conv.weight'] cannot be used: expected LoRA factors with the "
        "names that peft.get_peft_model_state_dict gives them: '<layer>.lora_A.weight' and "
        "'<layer>.lora_B.weight'."
    )


def test_a_client_that_ignores_the_plan() -> None:
    def everything(asked: Asked) -> RecordDict:
        return reply_of(asked.arrays, asked.partition)

    found = sentence(RoLoRA(), Tiny(2, everything))
    assert found.startswith(
        "Round 1: 0 of 2 clients answered, fewer than min-completion = 0.5. Reasons: "
        "partition-000000: uploaded arrays = ['blocks.0.fc.lora_A.weight', "
    )
    assert (
        "cannot be used: expected those that B trains; wrong: ['blocks.0.fc.lora_A.weight', "
        "'blocks.1.fc.lora_A.weight']. Let the client obey the plan, e.g. by follow_plan." in found
    )


def test_a_model_without_named_blocks() -> None:
    start = {name.replace("blocks.", "stage"): array for name, array in start_arrays().items()}
    assert sentence(ASLoRA(), Tiny(2), start) == (
        "layer = 'stage0.fc' cannot be used: expected a layer inside a named block. Set blocks to "
        "a regular expression that matches each layer's name up to the end of its block's name, "
        r"e.g. '.*\.stages\.\d+'."
    )


def test_a_pattern_of_blocks_is_what_such_a_model_needs() -> None:
    start = {name.replace("blocks.", "stage"): array for name, array in start_arrays().items()}
    with Tiny(2).grid() as grid:
        strategy = ASLoRA(blocks=r"stage\d")
        strategy.start(grid, record_of(start), num_rounds=1)
    assert strategy.last_round is not None
    assert len(strategy.last_round.uploads) == 2


def test_a_numpy_client_without_the_bridge() -> None:
    class Client(NumPyClient):
        def fit(self, parameters: Any, config: Mapping[str, Any]) -> Any:
            return parameters, 1, {}

    def client_fn(_: Context) -> Any:
        return Client().to_client()

    with (
        LocalGrid(ClientApp(client_fn), 2, {}).running() as grid,
        pytest.raises(FedLoRAError) as caught,
    ):
        RoLoRA().start(grid, record_of(start_arrays()), num_rounds=1)
    assert (
        "it is a NumPyClient: serve it with ClientApp(client_fn, mods=[fedlora_flwr.bridge])"
        in str(caught.value)
    )
