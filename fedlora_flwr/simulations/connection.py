"""Flower's command line, as an operator uses it: submit a run, follow its log, ask how it is."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from fedlora_flwr.errors import FedLoRAError, one_line
from fedlora_flwr.files import replace_file
from fedlora_flwr.processes.lifeline import Lifeline

COMPLETED, FINISHED = "finished:completed", "finished"
_UNKNOWN = "Run ID not found"
"""How Flower answers a question about a run that is not in its database."""


class SuperLinkError(FedLoRAError):
    """Flower's SuperLink or its command line did not do what was asked."""


class UnknownRun(SuperLinkError):
    """The SuperLink answers, and its database does not have the run."""


class Connection:
    """One connection to a SuperLink, under a configuration of its own.

    Parameters
    ----------
    name : str
        Name of the connection.
    lines : str
        Its lines in Flower's ``config.toml``, address and certificate.
    home : Path
        A folder, in which Flower's own folder and a working folder are made.
    lifeline : Lifeline
        What ends each command.
    env : Mapping
        Variables of each command.
    log : TextIO, optional
        Where the run's own output goes; this process's output by default.
    """

    def __init__(
        self,
        name: str,
        lines: str,
        home: Path,
        lifeline: Lifeline,
        env: Mapping[str, str],
        log: TextIO | None = None,
    ) -> None:
        self._name, self._lifeline, self._log = name, lifeline, log
        self._folder = home / "cwd"
        self._folder.mkdir()
        (home / "flwr").mkdir()
        self.env = {**env, "FLWR_HOME": str(home / "flwr")}
        text = f'[superlink]\ndefault = "{name}"\n\n[superlink.{name}]\n{lines}'
        replace_file(home / "flwr" / "config.toml", text.encode())
        self._stream: subprocess.Popen[bytes] | None = None

    def submit(self, app: Path, run_config: Path, *more: str) -> str:
        """Submit a run; return its id.

        Parameters
        ----------
        app : Path
            Folder of the Flower app.
        run_config : Path
            TOML file of run-config overrides.
        *more : str
            Further arguments of ``flwr run``.

        Raises
        ------
        SuperLinkError
            The SuperLink refused the run, or does not answer.
        """
        answer = self._ask("run", str(app), self._name, "--run-config", str(run_config), *more)
        if not (run := str(answer.get("run-id") or "")):
            raise SuperLinkError(f"flwr run refused the app: {answer}")
        return run

    def follow(self, run: str) -> None:
        """Bring a run's log to this one's: a SuperLink keeps what ServerApp and workers print."""
        self._stream = self.start(("flwr", "log", run, self._name, "--stream"))

    @property
    def log_ended(self) -> bool:
        """Whether the run's log has ended, as it does when the run or its SuperLink ends."""
        return self._stream is None or self._stream.poll() is not None

    def status(self, run: str) -> tuple[str, str]:
        """Return Flower's own status of a run, e.g. ``"finished:completed"``, and what it adds.

        Raises
        ------
        UnknownRun
            The SuperLink does not know the run.
        SuperLinkError
            The SuperLink does not answer.
        """
        runs = self._ask("list", self._name, "--run-id", run).get("runs") or [{}]
        return str(runs[0].get("status", "unknown")), str(runs[0].get("status-details", ""))

    def stop(self, run: str) -> None:
        """Ask for a run's end.

        Raises
        ------
        SuperLinkError
            The run has ended already, or the SuperLink does not answer.
        """
        self._ask("stop", run, self._name)

    def start(
        self, command: Sequence[str], *, clear: Path | None = None, **settings: Any
    ) -> subprocess.Popen[Any]:
        """Start a command that ends with the lifeline; by default it prints to the log."""
        defaults = {"cwd": self._folder, "stdout": self._log, "stderr": subprocess.STDOUT}
        return self._lifeline.start(command, clear=clear, env=self.env, **{**defaults, **settings})

    def _ask(self, *arguments: str) -> dict[str, Any]:
        pipe = subprocess.PIPE
        command = ("flwr", *arguments, "--format", "json")
        asked = self.start(command, stdout=pipe, stderr=pipe, text=True)
        output, errors = asked.communicate()
        try:
            answer: dict[str, Any] = json.loads(output[output.index("{") :])
        except ValueError:
            raise _failure(arguments[0], (errors or output).strip()) from None
        if not answer.get("success"):
            reason = one_line(RuntimeError(answer.get("error-message") or answer))
            raise _failure(arguments[0], reason)
        return answer


def _failure(command: str, reason: str) -> SuperLinkError:
    failed = UnknownRun if _UNKNOWN in reason else SuperLinkError
    return failed(f"flwr {command} failed: {reason}")
