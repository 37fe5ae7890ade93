"""What an operator's machine has running for a fleet: Flower's commands, and perhaps the server."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from fedlora_flwr.config import RunConfig
from fedlora_flwr.deploy.control import Control, Untrusted
from fedlora_flwr.deploy.fleet import CONNECTION, read_fleet
from fedlora_flwr.deploy.supernode import SCRIPT
from fedlora_flwr.errors import FedLoRAError
from fedlora_flwr.processes.lifeline import Lifeline, scratch
from fedlora_flwr.server.run_dir import AT_REST
from fedlora_flwr.simulations.app import write_app
from fedlora_flwr.simulations.connection import (
    COMPLETED,
    FINISHED,
    Connection,
    SuperLinkError,
    UnknownRun,
)
from fedlora_flwr.simulations.superlink import QUIET
from fedlora_flwr.terminal import uninterrupted

LOG = "superlink.log"
Say = Callable[[str], object]
_OWN_WORDS = "ServerApp failed with exception: "
"""How Flower begins what it tells of a run that ended with an error of its own."""
_STOPPED = "finished:stopped"
_ASK, _ASK_AT_END = 60.0, 2.0
"""Seconds between two questions for a run's state, each of which starts a process."""
_PATIENCE = 60.0  # Seconds until a server has to be ready.


class RunEnded(FedLoRAError):
    """A fleet's run has ended without its result, and is not started again."""


class RunDied(FedLoRAError):
    """A run has ended and could not say why, as one does that was killed."""


class Operator:
    """What an operator's machine has running for a fleet: commands, and perhaps the server.

    All of it ends with this context.

    Parameters
    ----------
    folder : Path
        The fleet's folder.
    server : bool
        Whether to start the server where none answers.
    say : callable
        Shows one sentence.

    Attributes
    ----------
    attached : bool
        Whether the server belongs to another process, and stays when this one ends.
    """

    def __init__(self, folder: Path, server: bool, say: Say) -> None:
        self._fleet, self._folder = read_fleet(folder)[0], folder.resolve()
        self._server = self._folder / "server"
        self._control = Control(self._address, self._folder / "operator" / "ca.pem")
        self._may_start, self._say, self.attached = server, say, True
        self._process: subprocess.Popen[bytes] | None = None
        own = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        self._env = {**os.environ, **QUIET, "PATH": own, "PYTHONUNBUFFERED": "1"}

    def __enter__(self) -> Operator:
        """Nothing is started yet."""
        address, authority = self._control.address, self._control.authority
        lines = f'address = "{address}"\nroot-certificates = "{authority}"\n'
        with ExitStack() as stack:
            self._home = stack.enter_context(scratch())
            self._lifeline = stack.enter_context(Lifeline())
            self._connection = Connection(CONNECTION, lines, self._home, self._lifeline, self._env)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """End every process."""
        with uninterrupted():
            self._stack.close()

    @property
    def logs(self) -> str:
        """Where to read what happened."""
        if self.attached:
            return "the server's log (`journalctl -u fedlora-superlink` there)"
        return str(self._server / LOG)

    @property
    def may_go_on(self) -> bool:
        """Whether a run may still be at work: its server belongs to another, or is alive."""
        return self.attached or self._alive()

    def find_server(self) -> None:
        """See that the server answers; start it if that is asked for.

        Raises
        ------
        SuperLinkError
            It does not answer.
        RunEnded
            Its certificate cannot be trusted.
        """
        if self._answers():
            return
        if self._alive() or not self._may_start:
            raise SuperLinkError(f"No SuperLink answers at {self._address}.")
        new = not (self._server / "state.sqlite").exists()
        self.attached = False
        self._start_server()
        if new:
            # Keys that are known already stay known; without them no device is admitted.
            registering = self._connection.start([str(self._folder / "operator" / "register.sh")])
            if registering.wait():
                self._say("Not every device is registered: run operator/register.sh again.")

    def submit(self, config: RunConfig) -> str:
        """Submit the run; return Flower's id of it."""
        app, recipe = self._home / "app", self._home / "recipe.toml"
        write_app(app, dict(config.own))
        recipe.write_text(config.to_toml(), encoding="utf-8")
        try:
            return self._connection.submit(app, recipe)
        except SuperLinkError as error:
            if self._answers():
                raise RunEnded(str(error)) from error
            raise

    def follow(self, run: str) -> None:
        """Show a run's log until it has completed.

        Raises
        ------
        RunEnded
            It said why it failed, or was stopped.
        RunDied
            It ended without a word, or the server has lost its database and with it the run.
        SuperLinkError
            The server is gone.
        """
        self._connection.follow(run)
        asked = time.monotonic()
        while True:
            if not self.attached and not self._alive():
                raise SuperLinkError("The SuperLink has ended.")
            interval = _ASK_AT_END if self._connection.log_ended else _ASK
            if time.monotonic() - asked > interval:
                status, details = self._status(run)
                asked = time.monotonic()
                if status == COMPLETED:
                    return
                if status.startswith(FINISHED):
                    raise self._ending(status, details)
            time.sleep(0.2)

    def stop(self, run: str | None) -> None:
        """Ask another's server to end the run; one that was started here ends with this process."""
        if run and self.attached:
            with uninterrupted(), suppress(SuperLinkError):
                self._connection.stop(run)

    def _status(self, run: str) -> tuple[str, str]:
        try:
            return self._connection.status(run)
        except UnknownRun as error:
            register = self._folder / "operator" / "register.sh"
            raise RunDied(
                f"The SuperLink at {self._address} does not know the run, so its database is new. "
                f"Run {register} again, or it admits no device."
            ) from error

    def _ending(self, status: str, details: str) -> FedLoRAError:
        if status == _STOPPED:
            return RunEnded("The run was stopped. Continue it with --resume.")
        said = details.partition(_OWN_WORDS)[2]
        # A server process that lost its SuperLink may still be on its way out.
        if said and AT_REST not in said:
            return RunEnded(f"The run failed and was not started again: {said}")
        return RunDied(f"The run ended without saying why ({details or status}).")

    @property
    def _address(self) -> str:
        return f"{self._fleet.host}:{self._fleet.port}"

    def _alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _answers(self) -> bool:
        try:
            return self._control.answers()
        except Untrusted as error:
            todo = f"`fedlora deploy check {self._folder}` says what to do."
            raise RunEnded(f"{error} {todo}") from error

    def _start_server(self) -> None:
        with (self._server / LOG).open("ab") as log:
            self._process = self._lifeline.start(
                [str(self._server / SCRIPT)], cwd=self._server, env=self._env,
                stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        deadline = time.monotonic() + _PATIENCE
        while not self._answers():
            if not self._alive() or time.monotonic() > deadline:
                raise SuperLinkError(f"The SuperLink did not start: {self._server / LOG} says why.")
            time.sleep(0.2)
        self._say(f"The SuperLink is started. Its log is {self._server / LOG}.")
