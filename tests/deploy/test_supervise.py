"""What `fedlora deploy run` does where nothing works: pauses, limits and its last sentence."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Self

import pytest

from fedlora_flwr.config import RunConfig
from fedlora_flwr.deploy.operator import Operator
from fedlora_flwr.deploy.supervise import Restarts, supervise
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.simulations.connection import SuperLinkError

RECIPE = '[run]\nrun-dir = "/srv/run"\n'


def deploy_run(fleet: Path, *more: str, recipe: str = RECIPE) -> subprocess.CompletedProcess[str]:
    file = fleet.parent / "recipe.toml"
    file.write_text(recipe)
    command = [
        "fedlora",
        "deploy",
        "run",
        str(fleet),
        str(file),
        "--pause",
        "0",
        "--restarts",
        "1",
        *more,
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_pauses_double_and_end_with_the_limit() -> None:
    restarts = Restarts(most=9, within=3600.0, pause=5.0)
    found = [restarts.next_pause() for _ in range(10)]
    assert found == [5, 10, 20, 40, 80, 160, 300, 300, 300, None]
    assert restarts.count == "restart 9 of 9 within 60 minutes"


def test_what_is_long_ago_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 50.0, 101.0, 102.0, 103.0])
    monkeypatch.setattr("fedlora_flwr.deploy.supervise.time.monotonic", lambda: next(times))
    restarts = Restarts(most=2, within=100.0, pause=5.0)
    assert [restarts.next_pause() for _ in range(5)] == [5, 10, 10, None, None]


@pytest.mark.parametrize("name", ["most", "within", "pause"])
def test_limits_below_zero_are_refused(name: str) -> None:
    with pytest.raises(InvalidValue, match="expected 0 or more"):
        Restarts(**{name: -1})  # type: ignore[arg-type]


class Scripted(Operator):
    """An operator that loses touch with a run once. Real ones do so after minutes."""

    def __init__(self, lives: bool) -> None:
        self.attached, self.lives, self.submitted, self.followed = False, lives, 0, 0
        self._server = Path()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def _alive(self) -> bool:
        return self.lives

    def find_server(self) -> None:
        pass

    def submit(self, config: RunConfig) -> str:
        self.submitted += 1
        return str(self.submitted)

    def follow(self, run: str) -> None:
        self.followed += 1
        if self.followed == 1:
            raise SuperLinkError("flwr list failed: it was killed")


@pytest.mark.parametrize(("lives", "submitted"), [(True, 1), (False, 2)])
def test_a_run_is_submitted_again_only_if_its_server_has_died(
    lives: bool, submitted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator = Scripted(lives)
    monkeypatch.setattr("fedlora_flwr.deploy.supervise.Operator", lambda *_: operator)
    supervise(Path(), RunConfig(run_dir="/srv/run"), Restarts(pause=0.0), str, server=True)
    assert (operator.submitted, operator.followed) == (submitted, 2)


@pytest.mark.usefixtures("activated")
def test_a_server_that_never_answers_ends_the_command(fleet: Path) -> None:
    ended = deploy_run(fleet)
    first, last = ended.stdout.strip(), ended.stderr.strip()
    assert ended.returncode == 1
    assert first.startswith("No SuperLink answers at 127.0.0.1:")
    assert first.endswith("in 0 s (restart 1 of 1 within 60 minutes).")
    assert "The limit of restarts, 1 within 60 minutes, is reached. Read the server's log" in last
    assert last.endswith("then continue with --resume /srv/run.")


@pytest.mark.usefixtures("activated")
def test_a_server_that_does_not_start_is_named_with_its_log(fleet: Path) -> None:
    script = fleet / "server" / "start.sh"
    script.write_text("#!/bin/sh\necho it is broken >&2\nexit 3\n")
    ended = deploy_run(fleet, "--server")
    log = fleet / "server" / "superlink.log"
    assert ended.returncode == 1
    assert f"The SuperLink did not start: {log} says why." in ended.stdout
    assert f"Read {log}, then continue" in ended.stderr
    assert log.read_text() == "it is broken\n" * 2


@pytest.mark.usefixtures("activated")
def test_a_run_without_a_folder_is_refused_before_any_work(fleet: Path) -> None:
    ended = deploy_run(fleet, recipe="")
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert "run-dir = '' cannot be used: expected an absolute folder on the server" in ended.stderr
