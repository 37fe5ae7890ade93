"""A run on a Ray cluster of two nodes, both on this machine's loopback."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.numpy import load_file

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
from fedlora_flwr.simulations.superlink import SimulationSuperLink, free_port

pytestmark = pytest.mark.flower
RAY = str(Path(sys.executable).parent / "ray")


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


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start two nodes; return their cluster's address."""
    with two_nodes(tmp_path_factory.mktemp("ray")) as address:
        yield address


@contextmanager
def two_nodes(folder: Path, second: Mapping[str, str] | None = None) -> Iterator[str]:
    """Start a head and a second node with one CPU each, as `ray start` does; end both.

    ``second`` has variables of the second node's environment.
    """
    address, log = f"127.0.0.1:{free_port()}", folder / "ray.log"
    # A short path, for sockets lie below it; and not Ray's own, where all runs look for a cluster.
    traces = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    common = ("--num-cpus=1", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1")
    port = address.split(":")[1]
    commands = (
        f"--head --port={port} --include-dashboard=false --temp-dir={traces} "
        f"--ray-client-server-port={free_port()}",
        f"--address={address}",
    )
    processes = []
    try:
        with log.open("w") as stream:
            for command, more in zip(commands, ({}, second or {}), strict=True):
                processes.append(
                    subprocess.Popen(
                        [RAY, "start", *command.split(), *common],
                        env={**os.environ, **more},
                        stdout=stream,
                        stderr=stream,
                        start_new_session=True,
                    )
                )
                # A node can join only when the head is there.
                for _ in range(120):
                    if log.read_text().count("--block") >= len(processes):
                        break
                    assert processes[-1].poll() is None, log.read_text()
                    time.sleep(0.5)
        yield address
    finally:
        for process in reversed(processes):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        for process in processes:
            process.wait(timeout=60)
        shutil.rmtree(traces, ignore_errors=True)


def test_two_nodes_give_the_arrays_of_one_process(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nodes").mkdir()
    (tmp_path / "noted.py").write_text(NOTED.format(folder=str(tmp_path / "nodes")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = RunConfig.of(
        {
            "task": "noted:Noted",
            "num-clients": 4,
            "num-rounds": 2,
            "local-steps": 2,
            "reproducible": True,
        }
    )
    alone = RunDirectory(tmp_path / "alone")
    run_in_process(prepare_run(config), alone, lambda _: None)
    monkeypatch.setenv("RAY_ADDRESS", cluster)
    spread = RunDirectory(tmp_path / "spread")
    with pytest.raises(InvalidValue, match=r"workers = 2.*RAY_ADDRESS"):
        run_on_flower(prepare_run(config), spread, lambda _: None, workers=2)
    summary = run_on_flower(prepare_run(config), spread, lambda _: None)

    assert summary["failures"] == 0
    assert len(list((tmp_path / "nodes").iterdir())) == 2
    first, second = (load_file(d.adapter / "adapter_model.safetensors") for d in (alone, spread))
    assert first.keys() == second.keys()
    assert all((first[name] == second[name]).all() for name in first)
    assert not list(spread.path.glob(".run-*"))


def test_a_node_that_has_a_ledger_of_its_own_ends_the_run_before_its_first_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under plain ``flwr run`` each machine keeps its ledger in its own user's data folder."""
    homes = [tmp_path / "home-1", tmp_path / "home-2"]
    monkeypatch.setenv("XDG_DATA_HOME", str(homes[0]))
    run_dir = RunDirectory(tmp_path / "run")
    config = RunConfig.of({"num-clients": 4, "num-rounds": 2, "run-dir": str(run_dir.path)})
    with two_nodes(tmp_path, {"XDG_DATA_HOME": str(homes[1])}) as address:
        monkeypatch.setenv("RAY_ADDRESS", address)
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
    assert not list(tmp_path.rglob(LEDGER))
    assert not list(homes[0].rglob(".run-*"))
