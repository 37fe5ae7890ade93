"""The example of a strategy of one's own: installed, named in both ways, and run on digits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file
from typer.testing import CliRunner

from fedlora_flwr.cli import app
from fedlora_flwr.client_app import respond
from fedlora_flwr.config import RunConfig, read_toml
from fedlora_flwr.config.names import by_short_name
from fedlora_flwr.config.recipes import load_recipe
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.forecast.forecast import forecast
from fedlora_flwr.lora.build import build_adapted
from fedlora_flwr.places import strategy_names
from fedlora_flwr.server.rounds import RoundRow
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.server.strategy import build_strategy
from fedlora_flwr.simulations.local_grid import LocalGrid
from fedlora_flwr.simulations.runner import app_folder, prepare_run, run_in_process
from fedlora_flwr.strategies import DPLoRA
from fedlora_flwr.strategies.replies import to_record
from fedlora_flwr.studies.compare_methods import read_methods
from fedlora_flwr.tasks.registry import build_task
from tests.conftest import QUICK, MakeConfig
from tests.examples.projects import copy_of
from tests.strategies.resumed import assert_goes_on_bit_for_bit

NAME, PLACE = "server-momentum", "server_momentum.strategy:ServerMomentum"
Rounds = list[dict[str, Any]]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the example as a stranger would, into a folder of its own."""
    folder = tmp_path_factory.mktemp("own_method")
    source, site = copy_of("own_method", folder), folder / "site"
    command = [
        *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"),
        *("--no-index", "--disable-pip-version-check", "--target", str(site), str(source)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return site


@pytest.fixture(autouse=True)
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(site))


def rounds_of(strategy: str, folder: Path, *settings: str) -> Rounds:
    """Run two rounds in this process; return the arrays of the start and of each round."""
    quick = [f"{key}={str(value).lower()}" for key, value in QUICK.items()]
    config = load_recipe("digits", [*quick, f"strategy={strategy}", *settings])
    run_dir, rounds = RunDirectory(folder), []

    def keep(_: RoundRow) -> None:
        rounds.append(load_file(run_dir.adapter / "adapter_model.safetensors"))

    summary = run_in_process(prepare_run(config, Console(quiet=True)), run_dir, keep)
    assert summary["status"] == "completed"
    assert summary["strategy"] == strategy
    assert len(rounds) == 3
    return rounds


def test_both_ways_run_and_the_parameter_takes_effect(tmp_path: Path) -> None:
    plain = rounds_of("dp-lora", tmp_path / "plain")
    still = rounds_of(NAME, tmp_path / "still", "server-momentum.beta=0")
    named = rounds_of(NAME, tmp_path / "named", "server-momentum.beta=0.25")
    placed = rounds_of(PLACE, tmp_path / "placed", "server-momentum.beta=0.25")

    start, first, second = plain
    for name, array in second.items():
        # Without momentum it is the mean, and in the first round there is none yet.
        np.testing.assert_allclose(still[2][name], array, rtol=0, atol=1e-6)
        np.testing.assert_allclose(named[1][name], first[name], rtol=0, atol=1e-6)
        expected = array + 0.25 * (first[name] - start[name])
        np.testing.assert_allclose(named[2][name], expected, rtol=0, atol=1e-6)
        assert placed[2][name].tobytes() == named[2][name].tobytes()
    assert any(np.abs(named[2][name] - array).max() > 1e-4 for name, array in second.items())


def test_it_is_listed_planned_and_compared() -> None:
    assert strategy_names()[-1] == NAME
    config = RunConfig.of({"strategy": NAME, "server-momentum.beta": 0.9, "num-clients": 3})
    strategy: Any = build_strategy(config)
    assert strategy.beta == 0.9
    assert forecast(config, records=100).config == config
    shared = RunConfig.of({"strategy": NAME, "server-momentum": {"beta": 0.75}})
    plain, low, other = read_methods([NAME, f"{NAME} {NAME}.beta=0.25", "rolora"], shared)
    found = [dict(row.of(shared).own) for row in (plain, low, other)]
    assert found == [{f"{NAME}.beta": 0.75}, {f"{NAME}.beta": 0.25}, {}]
    assert len({plain.name, low.name}) == 2


@pytest.mark.parametrize("value", [1, -0.5, "much"])
def test_what_beta_cannot_be_is_said_before_any_work(value: Any) -> None:
    with pytest.raises(InvalidValue, match=f"server-momentum.beta = {value!r}"):
        RunConfig.of({"strategy": NAME, "server-momentum.beta": value})


def test_its_setting_is_explained_beside_the_keys() -> None:
    shown = CliRunner().invoke(app, ["keys", f"{NAME}.beta", "--json"])
    (found,) = json.loads(shown.stdout)
    assert (found["key"], found["default"], found["type"]) == (f"{NAME}.beta", 0.5, "a number")
    assert found["allowed"] == "a number from 0 to 0.99"
    assert found["about"].startswith("share of the last round's movement")
    every = json.loads(CliRunner().invoke(app, ["keys", "--json"]).stdout)
    keys, own = [entry["key"] for entry in every], len(RunConfig().items())
    assert keys[:own] == [*RunConfig().items()]
    assert keys[-1] == f"{NAME}.beta"


def test_clients_take_part_without_the_strategy(make_config: MakeConfig) -> None:
    """A client that looked for the strategy of this run would find no such module."""
    config = make_config(num_clients=2)
    adapted = build_adapted(config, build_task(config.task, config))
    told = {**config.items(), "strategy": "nowhere:Nothing", "nowhere.beta": 0.5}
    told |= {"average-decay": 0.5, "server-momentum.beta": "not looked at"}
    with LocalGrid(respond, 2, told).running() as grid:
        result = DPLoRA().start(grid, to_record(adapted.read()), num_rounds=1)
    assert result.train_metrics_clientapp[1]


def test_the_app_of_a_run_on_flower_lists_the_setting(tmp_path: Path) -> None:
    """Flower lets a run override only keys that the app's own file has."""
    run_dir = RunDirectory(tmp_path / "run")
    config = RunConfig.of({"strategy": NAME, "server-momentum.beta": 0.9})
    listed = read_toml(app_folder(run_dir, config) / "pyproject.toml")["tool"]["flwr"]["app"]
    assert listed["config"]["server-momentum"] == {"beta": 0.9}
    assert by_short_name(listed["config"]).keys() >= RunConfig().items().keys()


def test_its_saved_run_goes_on_bit_for_bit() -> None:
    from fedlora_flwr.strategies import strategy_class

    assert_goes_on_bit_for_bit(strategy_class(NAME))
