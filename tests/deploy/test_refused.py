"""Who is refused by a running fleet, and what its owner sees."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from benchmarks.running_fleet import RunningFleet, running
from fedlora_flwr.deploy import identities
from fedlora_flwr.deploy.check import check_device
from fedlora_flwr.deploy.fleet import CONNECTION, Fleet, make_fleet, read_fleet
from fedlora_flwr.simulations.superlink import free_port
from tests.deploy.support import texts, until

pytestmark = pytest.mark.deploy
DEVICE = "device-01"
Fault = Callable[[Path, Path], None]


@pytest.fixture(scope="module")
def alive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningFleet]:
    folder = tmp_path_factory.mktemp("refused")
    make_fleet(folder / "fleet", Fleet(1, port=free_port()))
    make_fleet(folder / "other", Fleet(1))
    with running(folder / "fleet", folder / "operator", []) as fleet:
        yield fleet


def unregistered(device: Path, other: Path) -> None:
    shutil.copy(other / "devices" / DEVICE / "device.key", device)


def of_another_authority(device: Path, other: Path) -> None:
    shutil.copy(other / "server" / "ca.pem", device)


def edited(device: Path, *changes: tuple[str, str]) -> None:
    script = device / "start.sh"
    text = script.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    script.write_text(text)


def at_another_port(device: Path, other: Path) -> None:
    edited(device, (f":{read_fleet(device)[0].port} --root", f":{free_port()} --root"))


def in_plain_text(device: Path, other: Path) -> None:
    changes = ("--root-certificates ca.pem", "--insecure"), (" --auth-supernode-private-key", " #")
    edited(device, *changes)


def nothing(device: Path, other: Path) -> None:
    pass


CLOCK = "FEDLORA_TEST_CLOCK"
# Python imports it at its start: this process's clock is then as many seconds ahead.
SET_CLOCK = f"""
import datetime, os, time
ahead, right = float(os.environ.get({CLOCK!r}, 0)), time.time
time.time = lambda: right() + ahead
class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(time.time(), tz)
datetime.datetime = Clock
"""
AHEAD = "This device's clock is 60 minutes ahead of that of the server at 127.0.0.1:"
BEHIND = AHEAD.replace("ahead of", "behind")


@pytest.mark.parametrize(
    ("fault", "clock", "seen", "fix"),
    [
        (nothing, 3600, AHEAD, "set the clock that is wrong, for instance with `timedatectl"),
        (nothing, -3600, BEHIND, "set the clock that is wrong"),
        (
            unregistered,
            0,
            "does not know this device's key",
            "ask the operator to put device.pub into operator/keys",
        ),
        (
            of_another_authority,
            0,
            "is not signed by the authority of ca.pem",
            "copy the fleet's ca.pem",
        ),
        (in_plain_text, 0, "does not answer without TLS", "instead of --insecure into start.sh"),
        # The server may start later: the device waits for it.
        (at_another_port, 0, "Nothing answers at 127.0.0.1:", "This device keeps trying."),
    ],
)
def test_a_device_that_is_not_admitted_says_why_and_what_to_do(
    alive: RunningFleet, tmp_path: Path, fault: Fault, clock: int, seen: str, fix: str
) -> None:
    device = alive.folder / "devices" / DEVICE
    kept = shutil.copytree(device, tmp_path / "kept")
    alive.log(DEVICE).unlink(missing_ok=True)
    (tmp_path / "sitecustomize.py").write_text(SET_CLOCK)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    fault(device, alive.folder.parent / "other")
    try:
        started = alive.start(DEVICE, PYTHONPATH=path, **{CLOCK: str(clock)})
        for _ in range(240):
            time.sleep(0.25)
            if started.poll() is not None or seen in alive.log(DEVICE).read_text():
                break
        if fault is not at_another_port:
            assert started.wait(60) == 1
        said = " ".join(alive.log(DEVICE).read_text().split())
        found = [] if clock else texts(check_device(device), good=False)[f"server {address(said)}"]
    finally:
        alive.stop([DEVICE])
        shutil.copytree(kept, device, dirs_exist_ok=True)
    assert seen in said
    assert fix in said
    # The look before the start says the same.
    assert all(seen.lower() in text.lower() for text in found)


def address(said: str) -> str:
    found = re.search(r"127\.0\.0\.1:\d+", said)
    assert found, said
    return found[0]


def test_a_registered_device_is_let_in(alive: RunningFleet) -> None:
    device = alive.folder / "devices" / DEVICE

    def look() -> dict[str, list[str]]:
        return texts(check_device(device), good=True)

    subject = f"server 127.0.0.1:{read_fleet(device)[0].port}"
    assert look()[subject] == ["admits this device"]
    # Asking changes nothing on the server: the device is still not online.
    assert "online" not in alive.operator("flwr", "supernode", "list", CONNECTION)
    alive.start(DEVICE)
    try:
        until(lambda: alive.online() == {DEVICE}, alive.log(DEVICE).read_text)
        assert look()[subject] == ["admits this device"]
        nodes = alive.operator("flwr", "supernode", "list", CONNECTION)
    finally:
        alive.stop([DEVICE])
    assert "online" in nodes


def test_an_expired_certificate_is_refused_by_device_and_operator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_fleet(tmp_path / "fleet", Fleet(1, port=free_port()))
    monkeypatch.setattr(identities, "_EARLIER", timedelta(days=9))
    server = tmp_path / "fleet" / "server"
    for name in ("ca", "server"):
        (server / f"{name}.key").unlink(missing_ok=True)
    identities.make_certificates(server, "127.0.0.1", -1)
    for place in (tmp_path / "fleet" / "operator", tmp_path / "fleet" / "devices" / DEVICE):
        shutil.copy(server / "ca.pem", place)
    home = tmp_path / "operator"
    home.mkdir()
    shutil.copy(tmp_path / "fleet" / "operator" / "connection.toml", home / "config.toml")
    fleet = RunningFleet(tmp_path / "fleet", home)
    try:
        fleet.start("server")
        fleet.wait_for_server()
        said = fleet.operator(tmp_path / "fleet" / "operator" / "register.sh")
        fleet.start(DEVICE)
        for _ in range(120):
            time.sleep(0.5)
            if "expired" in fleet.log(DEVICE).read_text():
                break
    finally:
        fleet.stop(list(fleet.processes))
    assert "has expired by this device's clock" in fleet.log(DEVICE).read_text()
    assert "successful" not in said
