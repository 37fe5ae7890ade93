"""A private SuperLink on loopback that is started for one run and ended with it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

import httpx

import fedlora_flwr
from fedlora_flwr import flower_internals as flower
from fedlora_flwr.files import replace_file
from fedlora_flwr.processes.lifeline import Lifeline
from fedlora_flwr.simulations.connection import Connection, SuperLinkError
from fedlora_flwr.terminal import uninterrupted

_ANSWER = 10.0  # Seconds in which the SuperLink has to answer.
CONNECTION = "fedlora"
LOCAL = "local"
"""Value of ``RAY_ADDRESS`` that makes Ray start a cluster of its own."""
QUIET = {
    # Without these, Flower builds a new environment for the app and asks the network for updates.
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

LOOPBACK = {
    # By default Ray asks the network for this machine's address and listens on all interfaces. With
    # this setting it expects no other machines and listens on loopback only.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}


class SimulationSuperLink:
    """A context in which Flower's simulation engine takes runs.

    It lives in a folder of its own, since Flower keeps state and app bundles in ``FLWR_HOME`` and
    Ray workers import from the folder that they are started in.

    Parameters
    ----------
    log : TextIO
        Where the SuperLink, the ServerApp and Ray write.
    threads : int
        CPU threads that numerical libraries use in each process.
    modules : Path, optional
        Folder with modules of the user's that every process can import.
    environment : Mapping, optional
        Variables that every process gets.
    """

    def __init__(
        self,
        log: TextIO,
        threads: int = 1,
        modules: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._log = log
        self._env = {
            # Without this, Ray joins any cluster of which it finds traces on this machine, even a
            # dead one.
            "RAY_ADDRESS": LOCAL,
            **os.environ,
            **QUIET,
            **(environment or {}),
            "OMP_NUM_THREADS": str(threads),
            "PYTHONUNBUFFERED": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        }
        if self._env["RAY_ADDRESS"] == LOCAL:
            self._env |= LOOPBACK
        # A repository's package need not be installed.
        source = Path(fedlora_flwr.__file__).resolve().parent.parent
        places = (modules, source if (source / "pyproject.toml").exists() else None)
        path = (os.environ.get("PYTHONPATH"), *(str(place) for place in places if place))
        if any(path):
            self._env["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        self._process: subprocess.Popen[bytes] | None = None
        self._run_id = ""

    def __enter__(self) -> SimulationSuperLink:
        """Start the SuperLink without waiting for it."""
        self._lifeline = Lifeline()
        self._home = Path(tempfile.mkdtemp(prefix="fedlora-"))
        try:
            self._begin()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _begin(self) -> None:
        self._port = free_port()
        address = f'address = "127.0.0.1:{self._port}"\ninsecure = true\n'
        self._connection = Connection(
            CONNECTION, address, self._home, self._lifeline, self._env, self._log
        )
        listen = ("--host", "127.0.0.1", "--port", str(self._port))
        command = ("flower-superlink", "--insecure", "--simulation", *listen)
        self._process = self._connection.start(command, clear=self._home)

    def __exit__(self, *_: object) -> None:
        """End every process, including those of an unfinished run, and remove the folder."""
        with uninterrupted():
            self._lifeline.cut()
            shutil.rmtree(self._home, ignore_errors=True)

    def file(self, name: str, text: str) -> Path:
        """Write a file that exists as long as the SuperLink does, and return its path."""
        path = self._home / name
        replace_file(path, text.encode())
        return path

    def submit(self, app: Path, run_config: Path, federation: str) -> None:
        """Submit a run.

        Parameters
        ----------
        app : Path
            Folder of the Flower app.
        run_config : Path
            TOML file of run-config overrides.
        federation : str
            Federation settings, as ``flwr run --federation-config`` takes them.

        Raises
        ------
        SuperLinkError
            The SuperLink did not start, or it refused the run.
        """
        self._wait_until_healthy(60.0)
        more = ("--federation-config", federation)
        self._run_id = self._connection.submit(app, run_config, *more)
        self._connection.follow(self._run_id)

    @property
    def log_ended(self) -> bool:
        """Whether Flower has closed the run's log, which it does when the run is over."""
        return self._connection.log_ended

    def status(self) -> str:
        """Return Flower's own status of the run, e.g. ``"finished:completed"``.

        Raises
        ------
        SuperLinkError
            The SuperLink has ended.
        """
        if not self._alive():
            raise SuperLinkError("The SuperLink has ended.")
        url, run = f"http://127.0.0.1:{self._port}", int(self._run_id)
        try:
            # `flwr list` asks the same, and takes a second of a processor, which the run needs.
            with flower.ControlHttpClient(url, timeout=_ANSWER) as client:
                found = client.ListRuns(flower.ListRunsRequest(run_id=run)).run_dict[run].status
        except httpx.HTTPError:  # It is alive, and may be too busy to answer in time.
            return "unknown"
        return ":".join(filter(None, (found.status, found.sub_status)))

    def _alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _wait_until_healthy(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if not self._alive():
                raise SuperLinkError("The SuperLink ended while starting.")
            try:
                url = f"http://127.0.0.1:{self._port}/health"
                with urllib.request.urlopen(url, timeout=2):
                    return
            except OSError:
                time.sleep(0.2)
        raise SuperLinkError(f"The SuperLink did not answer within {timeout:g} s.")


def free_port() -> int:
    """Return a loopback port that no process listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
