"""Who is refused by a running fleet, and what its owner sees."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from fedlora_flwr.deploy import identities
from fedlora_flwr.deploy.fleet import CONNECTION, Fleet, make_fleet
from fedlora_flwr.simulations.superlink import free_port
from tests.deploy.running import RunningFleet, running

pytestmark = pytest.mark.deploy
DEVICE = "device-01"


@pytest.fixture(scope="module")
def alive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningFleet]:
    folder = tmp_path_factory.mktemp("refused")
    make_fleet(folder / "fleet", Fleet(1, port=free_port()))
    make_fleet(folder / "other", Fleet(1))
    with running(folder / "fleet", folder / "operator", []) as fleet:
        yield fleet


def unregistered(device: Path, other: Path) -> None:
    shutil.copy(other / "devices" / DEVICE / "device.key", device)


def of_another_ca(device: Path, other: Path) -> None:
    shutil.copy(other / "server" / "ca.pem", device)


def in_plain_text(device: Path, other: Path) -> None:
    script = device / "start.sh"
    text = script.read_text().replace("--root-certificates ca.pem", "--insecure")
    script.write_text(text.replace("--auth-supernode-private-key device.key ", ""))


@pytest.mark.parametrize(
    ("fault", "seen"),
    [
        (unregistered, "[code: 2004] Failed to activate SuperNode."),
        (of_another_ca, "certificate verify failed"),
        # It goes on trying, and is never let in.
        (in_plain_text, "Connection attempt failed, retrying"),
    ],
)
def test_a_device_that_is_not_of_the_fleet_stays_out(
    alive: RunningFleet, fault: Callable[[Path, Path], None], seen: str, tmp_path: Path
) -> None:
    device = alive.folder / "devices" / DEVICE
    kept = shutil.copytree(device, tmp_path / "kept")
    alive.log(DEVICE).unlink(missing_ok=True)
    fault(device, alive.folder.parent / "other")
    try:
        alive.start(DEVICE)
        for _ in range(120):
            time.sleep(0.5)
            if seen in alive.log(DEVICE).read_text():
                break
        assert seen in alive.log(DEVICE).read_text()
        nodes = alive.operator("flwr", "supernode", "list", CONNECTION)
    finally:
        alive.stop([DEVICE])
        shutil.copytree(kept, device, dirs_exist_ok=True)
    assert "registered" in nodes
    assert "online" not in nodes


def test_a_registered_device_is_let_in(alive: RunningFleet) -> None:
    alive.start(DEVICE)
    try:
        for _ in range(120):
            time.sleep(0.5)
            nodes = alive.operator("flwr", "supernode", "list", CONNECTION)
            if "online" in nodes:
                break
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
    assert "certificate has expired" in fleet.log(DEVICE).read_text()
    assert "successful" not in said
