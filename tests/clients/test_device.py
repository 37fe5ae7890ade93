from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict

from fedlora_flwr.client_app import make_client
from fedlora_flwr.clients.device import Device, client_identity
from fedlora_flwr.clients.trainer import process_trainer
from fedlora_flwr.config import OWN, RunConfig
from fedlora_flwr.environment import simulating
from fedlora_flwr.errors import InvalidValue
from tests.backbones.checkpoints import write_split
from tests.tasks.texts import make_checkpoint, reviews, text_config

MakeDevice = Callable[..., Path]
BUDGET = "client-id = 'a'\ntask = 'digits'\nepsilon = 1\ndelta = 1e-5\n"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    """Return a run whose data a server has, and no device."""
    model = make_checkpoint("bert", tmp_path / "model")
    write_split(tmp_path / "all", "train", [{**row, "home": i % 2} for i, row in enumerate(ROWS)])
    write_split(tmp_path / "all", "validation", ROWS[:4])
    return text_config(
        model, tmp_path / "all", num_clients=2, partitioner="natural-id", partition_column="home",
        input_columns="text", batch_size=8, local_steps=2, delta=1e-3, seed=7,
        state_dir=str(tmp_path / "state"),
    )  # fmt: skip


ROWS = reviews(60)


@pytest.fixture
def make_device(tmp_path: Path) -> MakeDevice:
    """Return a function that sets up a device with every second record, and gives its file."""

    def make(number: int, **settings: Any) -> Path:
        folder = tmp_path / f"device-{number}"
        write_split(folder / "records", "train", ROWS[number::2])
        lines: dict[str, Any] = {
            "client-id": f"home-{number}",
            "task": "text-classification",
            "model": str(tmp_path / "model"),
            "dataset": "records",
            "input-columns": "text",
            "num-classes": 2,
            "state-dir": "state",
            "epsilon": 8.0,
            "delta": 1e-3,
        }
        lines |= {key.replace("_", "-"): value for key, value in settings.items()}
        # Texts, numbers and flags are the same in JSON and in TOML.
        text = "\n".join(f"{key} = {json.dumps(value)}" for key, value in lines.items())
        (folder / "device.toml").write_text(text)
        return folder / "device.toml"

    return make


def context(run: RunConfig, **node: Any) -> Context:
    names = {key.replace("_", "-"): value for key, value in node.items()}
    return Context(77, 1, names, RecordDict(), run.items())


def fit(where: Context) -> Any:
    process_trainer.cache_clear()
    with simulating():
        client = make_client(where)
    return client.fit(client.get_parameters({}), {"server-round": 1, "plan": "*"})


def test_a_device_trains_as_its_simulated_partition_does(
    run: RunConfig, make_device: MakeDevice
) -> None:
    for number in (0, 1):
        file = make_device(number, reproducible=True)
        simulated = context(run, client_id=f"home-{number}", partition_id=number, num_partitions=2)
        here, there = fit(context(run, device=str(file))), fit(simulated)
        assert len(here[0]) == len(there[0]) > 0
        assert all((a == b).all() for a, b in zip(here[0], there[0], strict=True))
        assert here[2]["epsilon"] == there[2]["epsilon"]


def test_noise_follows_no_servers_seed_unless_the_device_says_so(
    run: RunConfig, make_device: MakeDevice
) -> None:
    file = make_device(0)
    assert run.reproducible
    first, second = fit(context(run, device=str(file))), fit(context(run, device=str(file)))
    assert not any((a == b).all() for a, b in zip(first[0], second[0], strict=True))


@pytest.mark.parametrize("reports", [False, True])
def test_figures_without_privacy_leave_only_a_device_that_says_so(
    run: RunConfig, make_device: MakeDevice, reports: bool
) -> None:
    asked = RunConfig.of(run.items(), {"report-unprotected-metrics": True})
    changes = {"report_unprotected_metrics": True} if reports else {}
    metrics = fit(context(asked, device=str(make_device(0, **changes))))[2]
    assert any("unprotected" in name for name in metrics) is reports


def test_a_device_has_its_own_identity_data_budget_and_ledger(
    run: RunConfig, make_device: MakeDevice, tmp_path: Path
) -> None:
    file = make_device(1, epsilon=2.0)
    where = context(run, device=str(file), partition_id=5)
    assert client_identity(where) == "home-1"
    client = make_client(where)
    assert len(client._open()) == 30
    reply = client.fit(client.get_parameters({}), {"server-round": 1, "plan": "*"})
    assert reply[2]["epsilon-budget"] == 2.0
    assert (tmp_path / "device-1" / "state" / "ledger.sqlite").exists()
    assert not (tmp_path / "state").exists()


def test_a_budget_for_life_covers_all_runs(run: RunConfig, make_device: MakeDevice) -> None:
    def ask(file: Path, run_id: int) -> Any:
        where = Context(run_id, 1, {"device": str(file)}, RecordDict(), run.items())
        client = make_client(where)
        return client.fit(client.get_parameters({}), {"server-round": 1, "plan": "*"})[2]

    file = make_device(1, epsilon=2.0, run_epsilon=0.5)
    first, second = ask(file, 77), ask(file, 78)
    assert second["steps"] == 2 * first["steps"]
    assert first["epsilon"] < second["epsilon"] <= 2.0
    assert second["accountant"] == "rdp-filter"
    # The first run reserves all that it has planned, and the second is told at its start.
    file = make_device(0, epsilon=2.0)
    assert ask(file, 77)["accountant"] == "prv"
    assert ask(file, 78)["status"] == "budget-exhausted"


def test_a_device_whose_data_cannot_keep_the_promise_says_why(
    run: RunConfig, make_device: MakeDevice
) -> None:
    with pytest.raises(InvalidValue, match=r"delta = 0\.1.*30"):
        fit(context(run, device=str(make_device(0, delta=0.1))))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "client-id = ''"),
        ("client-id = 3", "client-id = 3"),
        ("client-id = ' '", "client-id = ' '"),
        ("client-id = 'a'", "epsilon = None"),
        ("client-id = 'a'\nepsilon = 1", "delta = None"),
        (BUDGET + "rank = 9", "key of device.toml = 'rank'.*'dataset'"),
        (BUDGET + "seed = 9", "key of device.toml = 'seed'"),
        (BUDGET + "datset = 'x'", "key of device.toml = 'datset'.*'dataset'"),
        ("client-id = 'a", "readable TOML file"),
    ],
)
def test_what_a_device_cannot_say_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "device.toml").write_text(text)
    with pytest.raises(InvalidValue, match=message):
        Device.read(tmp_path / "device.toml")


def test_a_missing_file_and_a_bad_value_are_named(run: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="readable TOML file"):
        make_client(context(run, device=str(tmp_path / "none.toml")))
    (tmp_path / "device.toml").write_text(BUDGET.replace("= 1\n", "= -1\n"))
    with pytest.raises(InvalidValue, match="epsilon = -1"):
        make_client(context(run, device=str(tmp_path / "device.toml")))


def test_every_key_of_a_device_is_one_of_the_run_config() -> None:
    assert set(OWN) <= set(RunConfig().items())
