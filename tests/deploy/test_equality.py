"""A fleet computes what a simulation does, and its noise follows no server's seed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.numpy import load

from fedlora_flwr.config import RunConfig
from fedlora_flwr.deploy.fleet import Fleet, make_fleet, stated
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.simulations.runner import prepare_run, run_in_process
from fedlora_flwr.simulations.superlink import free_port
from tests.backbones.checkpoints import write_split
from tests.deploy.running import running
from tests.tasks.texts import make_checkpoint, reviews, text_config

pytestmark = pytest.mark.deploy

NAMES = ["device-01", "device-02"]
WARM = NAMES[0]
SIZES = [30, 50]
SIMULATED, SEEDED = "simulated", "seeded"
SHORT, FIRST, SECOND = "short", "first", "second"  # of one round


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, RunDirectory]]:
    base = tmp_path_factory.mktemp("equality")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(base / "cache"))
        config = prepare(base)
        names = (SIMULATED, SEEDED, SHORT, FIRST, SECOND)
        found = {name: RunDirectory(base / name) for name in names}
        for name, rounds in ((SIMULATED, 2), (SHORT, 1)):
            plan = prepare_run(RunConfig.of(config.items(), {"num-rounds": rounds}))
            run_in_process(plan, found[name], lambda row: None)
        with running(base / "fleet", base / "operator", NAMES) as fleet:
            set_up_devices(base, reproducible=True)
            fleet.run(of(config, found[SEEDED], 2))
            set_up_devices(base, reproducible=False)
            fleet.run(of(config, found[FIRST], 1))
            fleet.run(of(config, found[SECOND], 1))
        yield found


def prepare(base: Path) -> RunConfig:
    """Write all records in one place, and each home's in its device's."""
    model = make_checkpoint("bert", base / "model")
    homes = [home for home, size in enumerate(SIZES) for _ in range(size)]
    rows = [{**row, "home": home} for row, home in zip(reviews(sum(SIZES)), homes, strict=True)]
    write_split(base / "all", "train", rows)
    write_split(base / "all", "validation", reviews(40, seed=1))
    config = planned(base, model)
    make_fleet(base / "fleet", Fleet(len(NAMES), port=free_port()), config)
    for home, name in enumerate(NAMES):
        folder = base / "fleet" / "devices" / name / "data"
        write_split(folder, "train", [row for row in rows if row["home"] == home])
    return config


def planned(base: Path, model: Path) -> RunConfig:
    return text_config(
        model, base / "all", num_classes=2, strategy="dp-lora", partitioner="natural-id",
        partition_column="home", num_clients=2, input_columns="text", batch_size=8, local_steps=2,
        num_rounds=2, weighting="inverse-noise", delta=1e-3, seed=7,
        reproducible=True, exact_passes=True,
    )  # fmt: skip


def set_up_devices(base: Path, reproducible: bool) -> None:
    """Give devices the names that simulated clients have: their random streams follow from it.

    One keeps a process between messages.
    """
    for home, name in enumerate(NAMES):
        lines = [
            f'client-id = "partition-{home:06d}"', 'dataset = "data"', 'state-dir = "state"',
            "epsilon = 8.0", "delta = 1e-3", 'ledger-scope = "run"',
            'weighting = "inverse-noise"', stated(planned(base, base / "model")),
            *["reproducible = true"] * reproducible, f"keep-warm = {60 * (name == WARM)}",
        ]  # fmt: skip
        (base / "fleet" / "devices" / name / "device.toml").write_text("\n".join(lines))


def of(config: RunConfig, run_dir: RunDirectory, num_rounds: int) -> RunConfig:
    return RunConfig.of(config.items(), {"run-dir": str(run_dir.path), "num-rounds": num_rounds})


def adapter(run_dir: RunDirectory) -> bytes:
    return (run_dir.adapter / "adapter_model.safetensors").read_bytes()


def test_a_fleet_gives_the_arrays_of_the_simulation_bit_for_bit(
    runs: dict[str, RunDirectory],
) -> None:
    assert adapter(runs[SEEDED]) == adapter(runs[SIMULATED])
    devices = runs[SEEDED].path.parent / "fleet" / "devices"
    assert [path.parents[1].name for path in devices.glob("*/state/warm-????????")] == [WARM]


def test_a_fleet_reports_the_figures_of_the_simulation(runs: dict[str, RunDirectory]) -> None:
    keys = {"round", "client", "epsilon", "steps", "weight", "accountant"}

    def figures(name: str) -> list[dict[str, object]]:
        return [{k: row[k] for k in keys} for row in runs[name].rows("clients")]

    assert len(figures(SEEDED)) == 4
    assert figures(SEEDED) == figures(SIMULATED)
    losses = [[row["loss"] for row in runs[name].rows("rounds")] for name in (SEEDED, SIMULATED)]
    assert losses[0] == losses[1]


def test_a_runs_seed_draws_no_devices_noise(runs: dict[str, RunDirectory]) -> None:
    for name in (FIRST, SECOND):
        assert "reproducible = true" in (runs[name].path / "config.toml").read_text()
    short, first, second = (load(adapter(runs[name])) for name in (SHORT, FIRST, SECOND))
    assert short.keys() == first.keys() == second.keys()
    for one, other in ((first, second), (first, short), (second, short)):
        assert not any((one[name] == other[name]).all() for name in one)
