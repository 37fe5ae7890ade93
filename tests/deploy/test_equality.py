"""A fleet computes what a simulation does, and its noise follows no server's seed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from safetensors.numpy import load

from fedlora_flwr.config import RunConfig
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.simulations.runner import prepare_run, run_in_process
from tests.deploy.running import running
from tests.deploy.support import NAMES, WARM, adapter, of, prepare, set_up_devices

pytestmark = pytest.mark.deploy
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
