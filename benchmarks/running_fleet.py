"""A fleet that runs: the real SuperLink and SuperNodes, started by the scripts of its folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fedlora_flwr.config import RunConfig
from fedlora_flwr.deploy.control import ONLINE, Control
from fedlora_flwr.deploy.fleet import CONNECTION, read_fleet
from fedlora_flwr.simulations.superlink import free_port

BIN = Path(sys.executable).parent


@dataclass
class RunningFleet:
    """What a test can do with a fleet."""

    folder: Path
    home: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def env(self) -> dict[str, str]:
        """What everybody's shell knows."""
        return {
            **os.environ,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(self.home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "OMP_NUM_THREADS": "1",
        }

    def start(self, name: str, **env: str) -> subprocess.Popen[bytes]:
        """Start ``server`` or a device by its own script, which also knows ``env``."""
        folder = self.folder / ("server" if name == "server" else f"devices/{name}")
        with self.log(name).open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [folder / "start.sh"],
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**self.env, "FEDLORA_NODE_PORT": str(free_port()), **env},
                cwd="/",
            )
        return self.processes[name]

    def log(self, name: str) -> Path:
        """Where a process's output goes."""
        return self.home / f"{name}.log"

    def wait_for_server(self) -> None:
        """Wait until the server's port is open."""
        port = read_fleet(self.folder)[0].port
        for _ in range(240):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            assert self.processes["server"].poll() is None, self.log("server").read_text()
            time.sleep(0.25)
        raise TimeoutError("The SuperLink's port stays closed.")

    def online(self) -> set[str]:
        """Return the devices that are connected, without a process for the question."""
        fleet = read_fleet(self.folder)[0]
        control = Control(f"{fleet.host}:{fleet.port}", self.folder / "operator" / "ca.pem")
        return {node.name for node in control.nodes() if node.state == ONLINE}

    def operator(self, *command: str | Path, timeout: float = 600) -> str:
        """Run a command as the operator does; return what it prints."""
        run = subprocess.run(
            command, env=self.env, capture_output=True, text=True, timeout=timeout, cwd=self.home
        )
        return run.stdout + run.stderr

    def run(self, config: RunConfig, timeout: float = 600, app: Path | None = None) -> str:
        """Submit the fleet's app, or another one, and follow it to its end."""
        recipe = self.home / "recipe.toml"
        recipe.write_text(config.to_toml())
        shipped = app or self.folder / "operator" / "app"
        return self.operator(
            "flwr", "run", shipped, CONNECTION, "--run-config", recipe, "--stream", timeout=timeout
        )

    def stop(self, names: Sequence[str]) -> None:
        """End processes that this fleet has started, with all of theirs."""
        ended = [self.processes.pop(name) for name in names]
        # A SuperNode that ends leaves its SuperExec behind, in the same group.
        for sign, patience in ((signal.SIGTERM, 20.0), (signal.SIGKILL, 5.0)):
            for process in ended:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, sign)
            for process in ended:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(patience)


@contextmanager
def running(folder: Path, home: Path, devices: Sequence[str]) -> Iterator[RunningFleet]:
    """Start a fleet: the server, its operator's connection and keys, and devices."""
    home.mkdir()
    shutil.copy(folder / "operator" / "connection.toml", home / "config.toml")
    fleet = RunningFleet(folder, home)
    try:
        fleet.start("server")
        fleet.wait_for_server()
        registered = fleet.operator(folder / "operator" / "register.sh")
        assert registered.count("success") >= len(read_fleet(folder)[0].names), registered
        for name in devices:
            fleet.start(name)
        yield fleet
    finally:
        fleet.stop([name for name in list(fleet.processes) if name != "server"])
        fleet.stop(list(fleet.processes))
