"""Keys that a command does not follow: refused if given, said if the recipe has them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import fedlora_flwr
from fedlora_flwr import RunConfig, audit_run, evaluate, plan_run, simulate
from fedlora_flwr.cli import app
from fedlora_flwr.config.followed import AUDIT, COMPARISON, NOT_FOLLOWED, PLAN, followed
from fedlora_flwr.config.keys import fields_by_key
from fedlora_flwr.config.own_project import PACKAGE_SERVER
from fedlora_flwr.errors import InvalidValue

SET: dict[str, Any] = {
    "trackers": "tensorboard", "run-dir": "/a/run", "state-dir": "/a/ledger", "resume": "/a/run",
    "start": "/an/adapter", "lora-init": "olora", "average-decay": 0.5, "client-ranks": "1,2",
    "eval-every": 2, "early-stopping-patience": 1, "early-stopping-threshold": 0.1,
    "metric-for-best-model": "accuracy", "generation-limit": 3, "ledger-scope": "lifetime",
}  # fmt: skip
WITH: dict[str, dict[str, Any]] = {
    "client-ranks": {"strategy": "flexlora"},
    "early-stopping-threshold": {"early-stopping-patience": 1},
}
SMALL: dict[str, Any] = {
    "partitioner": "iid", "num_clients": 2, "num_rounds": 1, "local_steps": 1, "device": "cpu",
}  # fmt: skip
# What a simulation reads and an audit need not, beside the keys that it does not follow: sizes and
# times of a run of its own, a rule that is off, and what is read only to look for it.
NEED_NOT = {
    "dataset", "dataset-subset", "model", "weights", "trust-model", "round-timeout",
    "share-weights", "largest-noise", "robust-share",
}  # fmt: skip


@pytest.mark.parametrize(
    ("command", "key"), [(command, key) for command, keys in NOT_FOLLOWED.items() for key in keys]
)
def test_such_a_key_is_refused_if_it_is_given_and_said_if_the_recipe_has_it(
    command: str, key: str
) -> None:
    config = RunConfig.of(WITH.get(key, {}), {key: SET[key]})

    with pytest.raises(InvalidValue, match=f"because {command} does not follow this key") as found:
        followed(command, config, [key.replace("-", "_")])
    assert (found.value.key, found.value.value) == (key, SET[key])

    kept, said = followed(command, config)
    assert kept.items()[key] == fields_by_key(RunConfig)[key].default
    assert [line for line in said if line.startswith(f"{key} = {SET[key]!r} is not followed")]


def test_what_is_followed_is_left_as_it_is() -> None:
    config = RunConfig(epsilon=3.0, num_rounds=4)
    for command in NOT_FOLLOWED:
        assert followed(command, config, ["epsilon", "num-rounds"]) == (config, [])


def test_an_audit_says_which_values_of_the_recipe_it_replaces(tmp_path: Path) -> None:
    recipe, output = tmp_path / "recipe.toml", str(tmp_path / "audit.json")
    given = {"task": "digits", "trackers": "tensorboard", "average-decay": 0.5, "device": "cpu"}
    recipe.write_text(RunConfig.of(given).to_toml())
    once = ("--one-run", "--records", "10", "--confidence", "0.9999", "--output", output)

    said = CliRunner().invoke(app, ["audit", str(recipe), *once, "-c", "num-rounds=1"])

    assert said.exit_code == 0, said.output
    (line,) = [line for line in said.output.splitlines() if line.startswith("Settings")]
    for words in ('trackers = "" ("tensorboard")', "average-decay = 0.0 (0.5)", "batch-size = 10"):
        assert words in line
    assert "num-rounds" not in line
    record = json.loads(Path(output).read_text())
    assert record["settings"]["trackers"] == ""
    assert record["recipe"]["trackers"] == "tensorboard"
    refused = CliRunner().invoke(app, ["audit", "digits", "-c", "trackers=wandb"])
    assert "trackers = 'wandb' cannot be used" in refused.output


def test_a_plan_warns_of_what_it_does_not_foresee() -> None:
    changes: dict[str, Any] = {"early_stopping_patience": 2, "average_decay": 0.9}
    found = plan_run("digits", records=200, **SMALL, **changes)

    assert "early-stopping-patience = 2 is not followed by a plan: it counts all rounds" in (
        found.warnings
    )
    assert sum("average-decay" in line for line in found.warnings) == 1
    assert not any("not followed" in line for line in plan_run("digits", records=200).warnings)


def test_a_saved_adapter_refuses_keys_that_it_does_not_read(tmp_path: Path) -> None:
    result = simulate("digits", output=tmp_path, progress=False, **SMALL)

    assert evaluate(result, eval_batch_size=16).records == 360
    changes: list[dict[str, Any]] = [{"epsilon": 3}, {"num_clients": 2}, {"trackers": "wandb"}]
    for change in changes:
        with pytest.raises(InvalidValue, match="a saved adapter does not follow this key"):
            evaluate(result, **change)
    said = CliRunner().invoke(app, ["evaluate", str(result.path), "-c", "rank=2"])
    assert "rank = 2 cannot be used" in said.output


def reads(call: Callable[[], object], patch: pytest.MonkeyPatch) -> set[str]:
    """Return the keys that code outside of `config/` reads of a configuration during a call."""
    names = {entry.name: key for key, entry in fields_by_key(RunConfig).items()}
    root, found, plain = (
        str(Path(fedlora_flwr.__file__).parent),
        set[str](),
        object.__getattribute__,
    )

    def read(self: object, name: str) -> Any:
        if name in names:
            file = sys._getframe(1).f_code.co_filename
            if file.startswith(root) and "/config/" not in file:
                found.add(names[name])
        return plain(self, name)

    with patch.context() as patched:
        patched.setattr(RunConfig, "__getattribute__", read, raising=False)
        call()
    return found


def test_no_key_that_a_run_reads_is_left_out_by_an_audit_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new key of the server must be followed, or be in the list."""
    run = reads(lambda: simulate("digits", output=tmp_path, progress=False, **SMALL), monkeypatch)
    once: dict[str, Any] = {"mode": "one-run", "records": 10, "confidence": 0.9999}
    audit = reads(lambda: audit_run("digits", **once, **SMALL), monkeypatch)

    assert {"epsilon", "clip-norm", "optimizer", "filter"} <= audit
    assert run - audit - NEED_NOT <= set(NOT_FOLLOWED[AUDIT])
    assert set(PACKAGE_SERVER) <= set(NOT_FOLLOWED[AUDIT])
    assert {COMPARISON, PLAN, AUDIT} == set(NOT_FOLLOWED)
