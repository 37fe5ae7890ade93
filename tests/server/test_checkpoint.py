from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from fedlora_flwr.cli import app
from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.server.checkpoint import (
    Checkpoint,
    Checkpoints,
    ConfigurationChanged,
    OtherVersion,
)
from tests.server.resuming import begin, bits, tiny
from tests.server.support import digests

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


def test_keys_that_another_version_had_are_named(tmp_path: Path) -> None:
    items = RunConfig().items()
    fewer = {key: value for key, value in items.items() if key not in ("rslora", "seed")}
    with pytest.raises(OtherVersion) as caught:
        replace(made(), config=fewer).check(RunConfig())
    assert "it lacks the keys rslora, seed, which this version has" in str(caught.value)
    with pytest.raises(OtherVersion, match="it has the key gone, which this version does not know"):
        replace(made(), config={**items, "gone": 1}).check(RunConfig())


def test_a_run_of_another_version_is_one_sentence_in_the_terminal(tmp_path: Path) -> None:
    run = tmp_path / "run"
    begin(tiny(tmp_path, num_rounds=2, num_clients=2), run)
    kept = Checkpoints(run)
    last, _ = kept.last()
    fewer = {key: value for key, value in last.config.items() if key != "rslora"}
    kept.save(replace(last, config=fewer))
    before = digests(run)
    result = CliRunner().invoke(app, ["simulate", "--resume", str(run)])
    assert result.exit_code == 1
    assert " ".join(result.output.split()) == (
        "Error: Another version of fedlora-flwr wrote this run's checkpoint: it lacks the key "
        "rslora, which this version has. Continue the run with that version, or begin a new run "
        "from its adapter with -c start=RUN/adapter."
    )
    assert digests(run) == before


def test_a_whole_file_with_other_parts_is_of_another_version_and_not_damaged(
    tmp_path: Path,
) -> None:
    @dataclass(frozen=True)
    class Earlier(Checkpoint):
        weather: str = "fine"

    kept = Checkpoints(tmp_path)
    kept.save(Earlier(**vars(made())))
    with pytest.raises(OtherVersion, match="it has the part weather, which this version does not"):
        kept.last()
    content = made().to_bytes()
    (kept.folder / "round-0000004").write_bytes(content.replace(b"checkpoint-1", b"checkpoint-0"))
    with pytest.raises(OtherVersion, match="its form is fedlora-checkpoint-0"):
        kept.last()
