"""Which settings the server's optimizer and gradient checkpointing work with."""

from __future__ import annotations

from typing import Any

import pytest

from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import InvalidValue


@pytest.mark.parametrize(
    "strategy",
    ["fedsvd", "flexlora", "flora", "fedex-lora", "fedsa-lora", "fedavgm", "fedadam", "fedyogi"],
)
def test_the_servers_optimizer_is_refused_where_uploads_have_no_mean(strategy: str) -> None:
    with pytest.raises(InvalidValue, match=f"'none' where strategy = '{strategy}': ") as caught:
        RunConfig.of({"strategy": strategy, "server-optimizer": "momentum"})
    assert caught.value.key == "server-optimizer"


@pytest.mark.parametrize("strategy", ["rolora", "la-lora", "as-lora", "dp-lora", "fedprox"])
def test_the_servers_optimizer_works_where_uploads_are_averaged(strategy: str) -> None:
    own = {"server-optimizer": "yogi", "server-lr": 0.5, "robust": "median", "weighting": "size"}
    assert RunConfig.of({"strategy": strategy, **own}).server_lr == 0.5


@pytest.mark.parametrize(
    ("other", "key"),
    [
        ({"share-head": False}, "server-optimizer"),
        ({"curvature": "secant", "strategy": "as-lora"}, "curvature"),
        ({"server-optimizer": "none", "server-lr": 0.5}, "server-lr"),
        ({"gradient-checkpointing": True, "compile": "inductor"}, "compile"),
    ],
)
def test_what_cannot_be_used_together_is_named(other: dict[str, Any], key: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        RunConfig.of({"server-optimizer": "adam", **other})
    assert caught.value.key == key
