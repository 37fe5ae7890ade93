"""A SuperLink of our own on loopback: started for one run, ended with it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any, TextIO

from fedlora_flwr.errors import FedLoRAError

CONNECTION = "fedlora"
LOCAL = "local"
"""Value of ``RAY_ADDRESS`` that makes Ray start a cluster of its own."""
QUIET = {
    # Flower would build a fresh environment for the app, and ask the network for updates.
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


class SuperLinkError(FedLoRAError):
    """Flower's SuperLink or its command line did not do what was asked."""


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
    """

    def __init__(self, log: TextIO, threads: int = 1, modules: Path | None = None) -> None:
        self._log = log
        self._home = Path(tempfile.mkdtemp(prefix="fedlora-"))
        self._env = {
            # Else Ray joins whatever cluster it finds traces of on this machine, dead ones too.
            "RAY_ADDRESS": LOCAL,
            **os.environ,
            **QUIET,
            "FLWR_HOME": str(self._home / "flwr"),
            "OMP_NUM_THREADS": str(threads),
            "PYTHONUNBUFFERED": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        }
        if modules is not None:
            path = (os.environ.get("PYTHONPATH"), str(modules))
            self._env["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        self._process: subprocess.Popen[bytes] | None = None
        self._stream: subprocess.Popen[bytes] | None = None
        self._run_id: str | None = None
        self._finished = False
        self._port = free_port()

    def __enter__(self) -> SimulationSuperLink:
        """Start the SuperLink without waiting for it."""
        (self._home / "flwr").mkdir()
        (self._home / "cwd").mkdir()
        (self._home / "flwr" / "config.toml").write_text(
            f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
            f'address = "127.0.0.1:{self._port}"\ninsecure = true\n',
            encoding="utf-8",
        )
        address = ("--host", "127.0.0.1", "--port", str(self._port))
        self._process = self._start("flower-superlink", "--insecure", "--simulation", *address)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the run if it still goes on, end every process, remove the folder."""
        if self._run_id is not None and not self._finished and self._alive():
            subprocess.run(
                ["flwr", "stop", self._run_id, CONNECTION],
                env=self._env,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                check=False,
                timeout=60,
            )
        for process in (self._stream, self._process):
            if process is not None:
                _end_group(process)
        shutil.rmtree(self._home, ignore_errors=True)

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
        answer = self._flwr(
            "run",
            str(app),
            CONNECTION,
            "--run-config",
            str(run_config),
            "--federation-config",
            federation,
        )
        self._run_id = str(answer.get("run-id") or "")
        if not answer.get("success") or not self._run_id:
            raise SuperLinkError(f"flwr run refused the app: {answer}")
        # The SuperLink keeps what ServerApp and workers print to itself; this brings it to the log.
        self._stream = self._start("flwr", "log", self._run_id, CONNECTION, "--stream")

    def wait(self) -> str:
        """Wait until the run is over; return Flower's own status of it.

        Each question takes seconds of a processor, so none is asked before the log has ended.

        Raises
        ------
        SuperLinkError
            The SuperLink has ended or does not answer.
        """
        while self._alive() and self._stream is not None and self._stream.poll() is None:
            time.sleep(0.2)
        while not (status := self.status()).startswith("finished"):
            time.sleep(0.5)
        return status

    def status(self) -> str:
        """Return Flower's own status of the run, e.g. ``"finished:completed"``.

        Raises
        ------
        SuperLinkError
            The SuperLink has ended or does not answer.
        """
        if not self._alive():
            raise SuperLinkError("The SuperLink has ended.")
        answer = self._flwr("list", CONNECTION, "--run-id", str(self._run_id))
        runs = answer.get("runs") or [{}]
        status = str(runs[0].get("status", "unknown"))
        self._finished = status.startswith("finished")
        return status

    def _start(self, *command: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command,
            cwd=self._home / "cwd",
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

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

    def _flwr(self, *arguments: str) -> dict[str, Any]:
        done = subprocess.run(
            ["flwr", *arguments, "--format", "json"],
            cwd=self._home / "cwd",
            env=self._env,
            capture_output=True,
            text=True,
            check=False,
        )
        try:
            start = done.stdout.index("{")
            answer: dict[str, Any] = json.loads(done.stdout[start:])
        except ValueError:
            text = (done.stderr or done.stdout).strip()
            raise SuperLinkError(f"flwr {arguments[0]} failed: {text}") from None
        return answer


def free_port() -> int:
    """Return a port of the loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it started, asking first."""
    for sign, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            break
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
