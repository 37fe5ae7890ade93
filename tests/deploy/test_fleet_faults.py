"""`fedlora deploy check` on a fleet: each fault is found, and named with its fix."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from fedlora_flwr.config import RunConfig
from fedlora_flwr.deploy import expiry
from fedlora_flwr.deploy.fleet import Fleet, make_fleet, read_fleet
from fedlora_flwr.privacy.budget import Segment
from fedlora_flwr.privacy.ledger import Account, Ledger
from fedlora_flwr.simulations.superlink import free_port
from tests.deploy.support import answer_once, findings
from tests.tasks.texts import make_checkpoint

pytestmark = pytest.mark.usefixtures("activated")


def world_readable(fleet: Path) -> None:
    (fleet / "devices" / "device-02" / "device.key").chmod(0o644)


def swapped_keys(fleet: Path) -> None:
    one, two = (fleet / "devices" / f"device-0{i}" / "device.key" for i in (1, 2))
    one.write_bytes(two.read_bytes())


def other_ca(fleet: Path) -> None:
    make_fleet(fleet.parent / "other", Fleet(1))
    shutil.copy(fleet.parent / "other" / "server" / "ca.pem", fleet / "devices" / "device-01")


def other_server(fleet: Path) -> None:
    make_fleet(fleet.parent / "other", Fleet(1))
    for name in ("server.pem", "server.key"):
        shutil.copy(fleet.parent / "other" / "server" / name, fleet / "server" / name)


def broken_certificate(fleet: Path) -> None:
    (fleet / "server" / "server.pem").write_text("nothing")


def other_host(fleet: Path) -> None:
    manifest = json.loads((fleet / "fleet.json").read_text())
    manifest["fleet"]["host"] = "10.1.2.3"
    (fleet / "fleet.json").write_text(json.dumps(manifest))


def other_version(fleet: Path) -> None:
    manifest = json.loads((fleet / "fleet.json").read_text())
    manifest["versions"]["flwr"] = "1.0.0"
    (fleet / "fleet.json").write_text(json.dumps(manifest))


def unreadable_settings(fleet: Path) -> None:
    (fleet / "devices" / "device-02" / "device.toml").write_text("client-id = ")


def old_script(fleet: Path) -> None:
    script = fleet / "devices" / "device-01" / "start.sh"
    script.write_text(script.read_text().replace("fedlora deploy start", "flower-supernode"))


def key_with_a_passphrase(fleet: Path) -> None:
    key = fleet / "devices" / "device-01" / "device.key"
    subprocess.run(["ssh-keygen", "-q", "-p", "-N", "secret", "-f", key], check=True)


def key_of_another_kind(fleet: Path) -> None:
    key = fleet / "devices" / "device-01" / "device.key"
    key.unlink()
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    key.with_suffix(".key.pub").unlink()


def folder_for_a_certificate(fleet: Path) -> None:
    authority = fleet / "devices" / "device-01" / "ca.pem"
    authority.unlink()
    authority.mkdir()


def script_that_is_no_text(fleet: Path) -> None:
    (fleet / "devices" / "device-01" / "start.sh").write_bytes(b"\xff\xfe\x00")


@pytest.mark.parametrize(
    ("fault", "subject", "text"),
    [
        (key_with_a_passphrase, "devices/device-01/device.key", "cannot be read: .*assword"),
        (key_of_another_kind, "devices/device-01/device.key", "does not match"),
        (folder_for_a_certificate, "server certificate", "IsADirectoryError"),
        (script_that_is_no_text, "device-01", "UnicodeDecodeError"),
        (world_readable, "devices/device-02/device.key", "mode 644"),
        (swapped_keys, "devices/device-01/device.key", "does not match"),
        (other_ca, "ca.pem", "on device-01"),
        (other_server, "server certificate", "not signed by the CA"),
        (broken_certificate, "server certificate", "cannot be read"),
        (other_host, "server certificate", "valid for 127.0.0.1"),
        (other_version, "versions", "flwr .* here, 1.0.0 in the fleet"),
        (old_script, "device-01", "a server's code would run"),
        (unreadable_settings, "device-02", "readable TOML file"),
    ],
)
def test_each_fault_is_found_with_its_fix(
    fleet: Path, fault: Callable[[Path], None], subject: str, text: str
) -> None:
    fault(fleet)
    found = findings(fleet)
    bad = found[False]
    assert any(f.subject == subject and re.search(text, f.text) and f.fix for f in bad), bad
    # One fault hides no other: all that comes after it is looked at, too.
    subjects = {f.subject for f in (*bad, *found[True])}
    assert {"versions", "device-01", "device-02"} <= subjects


def test_certificates_that_end_soon_are_found(fleet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expiry, "SOON", timedelta(days=400))
    bad = findings(fleet)[False]
    assert [f.subject for f in bad] == ["server certificate"]
    assert all("about to expire" in f.text and "fedlora deploy renew" in f.fix for f in bad)
    monkeypatch.setattr(expiry, "SOON", timedelta(days=4000))
    assert [f.subject for f in findings(fleet)[False]] == ["CA certificate", "server certificate"]


def test_a_port_in_use_is_found(fleet: Path) -> None:
    port = read_fleet(fleet)[0].port
    with socket.create_server(("127.0.0.1", port)):
        (bad,) = findings(fleet)[False]
    assert bad.subject == f"port {port}"


def test_a_port_that_this_fleets_own_server_uses_is_in_order(fleet: Path, tmp_path: Path) -> None:
    port = read_fleet(fleet)[0].port
    answer_once(fleet / "server", port)
    found = findings(fleet)
    assert found[False] == []
    assert [f.text for f in found[True] if f.subject == f"port {port}"] == [
        "this fleet's server is running here"
    ]
    make_fleet(tmp_path / "other", Fleet(1, port=free_port()))
    _, port = answer_once(fleet / "server", read_fleet(tmp_path / "other")[0].port)
    (bad,) = findings(tmp_path / "other")[False]
    assert bad.subject == f"port {port}"


def test_with_the_run_records_budget_and_model_are_looked_at(
    fleet: Path, planned: RunConfig
) -> None:
    found = findings(fleet, planned)
    assert found[False] == []
    texts = [f.text for f in found[True] if f.subject == "device-02"]
    assert any(text.startswith("40 records, ε ≤ 3 for each at δ = 0.001 with") for text in texts)
    assert any(text.startswith("nothing spent yet; 3 of 3 after this run") for text in texts)
    assert any(text.startswith("backbone ") for text in texts)


def test_a_spent_budget_too_few_records_and_another_model_are_found(
    fleet: Path, planned: RunConfig, tmp_path: Path
) -> None:
    first, second = (fleet / "devices" / name for name in ("device-01", "device-02"))
    ledger = Ledger(first / "state" / "ledger.sqlite")
    spent = Segment(1.0, 0.2, 9)
    ledger.record(Account("device-01", "earlier", 99.0, 1e-3, "lifetime"), 1, spent, spent)
    make_checkpoint("roberta", second / "other")
    (second / "device.toml").write_text(
        (second / "device.toml")
        .read_text()
        .replace("delta = 1e-3", "delta = 0.1")
        .replace(f'model = "{tmp_path / "model"}"', 'model = "other"')
    )

    bad = {f.subject: [g.text for g in findings(fleet, planned)[False] if g.subject == f.subject]
           for f in findings(fleet, planned)[False]}  # fmt: skip

    assert "budget exhausted" in " ".join(bad["device-01"])
    assert "delta = 0.1" in " ".join(bad["device-02"])
    assert any("the server's is" in text or "lora-targets" in text for text in bad["device-02"])


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("no ledger"),
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: path.unlink(),
        lambda path: path.with_name(f"{path.name}.witness").unlink(),
    ],
)
def test_a_damaged_ledger_is_a_finding(
    fleet: Path, planned: RunConfig, damage: Callable[[Path], object]
) -> None:
    path = fleet / "devices" / "device-01" / "state" / "ledger.sqlite"
    spent = Segment(1.0, 0.2, 9)
    Ledger(path).record(Account("device-01", "r", 99.0, 1e-3, "lifetime"), 1, spent, spent)
    damage(path)

    bad = [f for f in findings(fleet, planned)[False] if f.subject == "device-01"]

    assert len(bad) == 1
    assert str(path) in bad[0].text
