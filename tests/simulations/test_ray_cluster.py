"""Runs on a Ray cluster of two nodes, both on this machine's loopback."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from benchmarks.running_cluster import running_cluster
from benchmarks.soak_simulation import releases
from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.privacy.ledger import LEDGER
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.simulations.runner import (
    app_folder,
    prepare_run,
    run_in_process,
    run_on_flower,
)
from fedlora_flwr.simulations.superlink import SimulationSuperLink

pytestmark = pytest.mark.flower
HOME, SECOND = "XDG_DATA_HOME", "SECOND_NODE"
SMALL = {
    "num-clients": 4,
    "num-rounds": 2,
    "local-steps": 2,
    "partitioner": "iid",
    "reproducible": True,
}

NOTED = """
from pathlib import Path
from fedlora_flwr.tasks.digits import DigitsTask

class Noted(DigitsTask):
    def build_model(self):
        import ray
        if ray.is_initialized():
            Path({folder!r}, ray.get_runtime_context().get_node_id()).touch()
        return super().build_model()
"""

# The second node dies with its worker, once, in the first step after round 1's row is written.
MORTAL = """
import os, signal
from pathlib import Path
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.tasks.digits import DigitsTask

RUN = RunDirectory(Path({run!r}))

class Mortal(DigitsTask):
    def losses(self, model, batch):
        if {second!r} in os.environ and any(row["round"] == 1 for row in RUN.rows("rounds")):
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().losses(model, batch)
"""


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return the data folder of each node's user."""
    return [tmp_path_factory.mktemp(name) for name in ("home-1", "home-2")]


@pytest.fixture(scope="module")
def nodes(homes: list[Path]) -> Iterator[dict[str, str]]:
    """Start two nodes for all tests here; the last one kills the second."""
    first, second = ({HOME: str(home)} for home in homes)
    with running_cluster([first, {**second, SECOND: "1"}]) as variables:
        yield variables


@pytest.fixture
def cluster(nodes: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run on the two nodes, with tasks of the test's own folder."""
    for name, value in nodes.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("cluster")
def test_two_nodes_give_the_arrays_of_one_process(tmp_path: Path) -> None:
    (tmp_path / "nodes").mkdir()
    (tmp_path / "noted.py").write_text(NOTED.format(folder=str(tmp_path / "nodes")))
    config = RunConfig.of({**SMALL, "task": "noted:Noted"})
    alone, spread = RunDirectory(tmp_path / "alone"), RunDirectory(tmp_path / "spread")
    run_in_process(prepare_run(config), alone, lambda _: None)
    with pytest.raises(InvalidValue, match=r"workers = 2.*RAY_ADDRESS"):
        run_on_flower(prepare_run(config), spread, lambda _: None, workers=2)
    summary = run_on_flower(prepare_run(config), spread, lambda _: None)

    assert summary["failures"] == 0
    assert len(list((tmp_path / "nodes").iterdir())) == 2
    first, second = (load_file(d.adapter / "adapter_model.safetensors") for d in (alone, spread))
    assert first.keys() == second.keys()
    assert all((first[name] == second[name]).all() for name in first)
    assert not list(spread.path.glob(".run-*"))


@pytest.mark.usefixtures("cluster")
def test_a_node_that_has_a_ledger_of_its_own_ends_the_run_before_its_first_round(
    homes: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under plain ``flwr run`` each machine keeps its ledger in its own user's data folder."""
    monkeypatch.setenv(HOME, str(homes[0]))
    run_dir = RunDirectory(tmp_path / "run")
    config = RunConfig.of({**SMALL, "run-dir": str(run_dir.path)})
    with (tmp_path / "log").open("w") as log, SimulationSuperLink(log) as superlink:
        placed = superlink.file("run.toml", config.to_toml())
        federation = "num-supernodes=4 client-resources-num-cpus=1"
        superlink.submit(app_folder(run_dir, config), placed, federation)
        deadline = time.monotonic() + 300
        while not superlink.log_ended and time.monotonic() < deadline:
            time.sleep(0.5)
    summary = run_dir.summary()
    assert summary is not None, (tmp_path / "log").read_text()
    assert summary["status"] == "failed"
    assert summary["error"].startswith("InvalidValue: state-dir = ")
    # One machine is named, by the address that Ray has for it.
    assert re.search(r"but no file of this run is there on [\d.]+\.$", summary["error"])
    assert run_dir.rounds() == []
    assert not [file for home in (*homes, tmp_path) for file in home.rglob(LEDGER)]
    assert not list(homes[0].rglob(".run-*"))


@pytest.mark.usefixtures("cluster")
def test_a_node_that_dies_costs_its_client_one_round(tmp_path: Path) -> None:
    run_dir = RunDirectory(tmp_path / "run")
    (tmp_path / "mortal.py").write_text(MORTAL.format(run=str(run_dir.path), second=SECOND))
    config = RunConfig.of({**SMALL, "task": "mortal:Mortal", "num-clients": 6, "num-rounds": 3})
    run_on_flower(prepare_run(config), run_dir, lambda _: None)

    first, second, third = run_dir.rounds()[1:]
    (line,) = second["failures"]
    client, _, reason = line.partition(": ")
    assert reason.startswith("its worker process on 127.0.0.1 died: ")
    assert second["clients_used"] == 5
    # The first node serves all others in that round, and everybody in the next.
    assert all(row["clients_used"] == 6 and not row["failures"] for row in (first, third))
    # The client had written its row before it was lost, and has spent three rounds as all have.
    ledger = releases(run_dir.path)
    assert [row[1] for row in ledger if row[0] == client] == [1, 2, 3]
    assert len(ledger) == 6 * 3
    told = [row["steps"] for row in run_dir.rows("clients") if row["round"] == 3]
    assert told == [3 * config.local_steps] * 6
