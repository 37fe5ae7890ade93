from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.server.checkpoint import Checkpoint, Checkpoints, ConfigurationChanged
from tests.server.resuming import bits

STATE: dict[str, Any] = {
    "array": np.arange(6.0).reshape(2, 3).T,
    "nothing": np.zeros((4, 0), np.float32),
    "step": np.array(7.0, np.float32),
    "map": {"array": "a client may be called so", "map": {"": None}},
    "list": [1, -0.1, float("inf"), True, [np.array([1], np.int64)]],
}


def made(number: int = 3, config: RunConfig | None = None) -> Checkpoint:
    arrays = {"b": np.ones((2, 2), np.float32), "a": np.array([np.nan], np.float32)}
    items = (config or RunConfig()).items()
    return Checkpoint(number, "17", items, "f", {"rounds": (0, "")}, 1.5, arrays, STATE, {}, {})


def test_everything_comes_back_in_its_bits_and_order() -> None:
    before, after = made(), Checkpoint.from_bytes(made().to_bytes())
    assert bits(after.strategy) == bits(STATE)
    assert list(after.arrays) == ["b", "a"]
    assert bits(dict(after.arrays)) == bits(dict(before.arrays))
    assert (after.round, after.run, after.seconds) == (3, "17", 1.5)
    after.check(RunConfig())


def test_any_damage_is_noticed() -> None:
    content, draw = made().to_bytes(), random.Random(0)
    for _ in range(200):
        place = draw.randrange(len(content))
        damaged = bytearray(content)
        damaged[place] ^= 1 << draw.randrange(8)
        for broken in (bytes(damaged), content[:place], content + b"x"):
            with pytest.raises(ValueError, match="changed since it was written"):
                Checkpoint.from_bytes(broken)


def test_the_last_two_are_kept_and_the_newest_that_is_whole_is_used(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)
    for number in range(5):
        kept.save(made(number))
    assert sorted(path.name[-1] for path in kept.folder.iterdir()) == ["3", "4"]
    assert (kept.last()[0].round, kept.last()[1]) == (4, [])
    (kept.folder / "round-0000004").write_bytes(b"")
    found, damaged = kept.last()
    assert (found.round, len(damaged)) == (3, 1)
    (kept.folder / "round-0000003").write_bytes(b"x")
    with pytest.raises(InvalidValue, match=r"are damaged\. Begin a new run"):
        kept.last()


def test_a_folder_without_a_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match=f"^resume = '{tmp_path}' cannot be used: .*new run"):
        Checkpoints(tmp_path).last()


def test_another_configuration_is_refused_with_the_keys_that_differ() -> None:
    before = made(config=RunConfig(num_rounds=10, strategy="rolora"))
    before.check(
        RunConfig(num_rounds=10, strategy="rolora", run_dir="/a", resume="/b", device="cpu")
    )
    with pytest.raises(ConfigurationChanged) as caught:
        before.check(RunConfig(num_rounds=10, strategy="la-lora", lr_b=7.0, run_dir="/a"))
    assert "lr-b = 7.0, was " in str(caught.value)
    assert "strategy = 'la-lora', was 'rolora'" in str(caught.value)
    assert "run-dir" not in str(caught.value)


def test_more_rounds_may_follow_where_the_plan_of_a_client_stays() -> None:
    capped: dict[str, Any] = {"max_rounds": 2}
    made(config=RunConfig(num_rounds=5, **capped)).check(RunConfig(num_rounds=9, **capped))
    made(config=RunConfig(num_rounds=5, epsilon=float("inf"))).check(
        RunConfig(num_rounds=9, epsilon=float("inf"))
    )
    with pytest.raises(InvalidValue, match=r"num-rounds = 9 .* spend all of ε"):
        made(config=RunConfig(num_rounds=5)).check(RunConfig(num_rounds=9))
    with pytest.raises(
        InvalidValue, match=r"num-rounds = 2 .* at least 3, the number of rounds that are done"
    ):
        made(config=RunConfig(num_rounds=5, **capped)).check(RunConfig(num_rounds=2, **capped))
