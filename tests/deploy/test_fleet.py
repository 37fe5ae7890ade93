from __future__ import annotations

import os
import shutil
import socket
import ssl
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fedlora_flwr.cli.deploy import renew
from fedlora_flwr.deploy.check import check_fleet
from fedlora_flwr.deploy.fleet import Fleet, make_fleet, read_fleet
from fedlora_flwr.errors import InvalidValue
from tests.deploy.support import answer_once, findings

pytestmark = pytest.mark.usefixtures("activated")


def test_private_keys_are_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        make_fleet(tmp_path / "fleet", Fleet(3))
    finally:
        os.umask(before)
    keys = list((tmp_path / "fleet").rglob("*.key"))
    assert len(keys) == 5
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}
    texts = [file.read_bytes() for file in (tmp_path / "fleet").rglob("*") if file.is_file()]
    assert sum(b"PRIVATE KEY" in text for text in texts) == 5
    # Each folder is carried to a machine of its own, where the one around it protects nothing.
    for folder in ("server", "operator", "ca", "devices", *(f"devices/device-0{i}" for i in "123")):
        assert stat.S_IMODE((tmp_path / "fleet" / folder).stat().st_mode) == 0o700, folder


@pytest.mark.parametrize(
    ("folder", "program"),
    [("server", "fedlora"), ("devices/device-01", "fedlora")],
)
def test_what_a_script_starts_writes_for_its_user_alone(
    fleet: Path, tmp_path: Path, folder: str, program: str
) -> None:
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin" / program
    stand_in.write_text("#!/bin/sh\ntouch state.sqlite\nmkdir state\n")
    stand_in.chmod(0o755)
    subprocess.run(
        ["sh", "-c", 'umask 000; exec "$0"', fleet / folder / "start.sh"],
        env={"PATH": f"{stand_in.parent}{os.pathsep}{os.environ['PATH']}"},
        check=True,
    )
    made = [
        stat.S_IMODE((fleet / folder / name).stat().st_mode) for name in ("state.sqlite", "state")
    ]
    assert made == [0o600, 0o700]


def test_other_programs_accept_certificates_and_keys(fleet: Path) -> None:
    server = fleet / "server"
    openssl = subprocess.run(
        ["openssl", "verify", "-CAfile", server / "ca.pem", server / "server.pem"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert openssl.stdout.strip().endswith("OK")
    address = answer_once(server, 0)
    device = ssl.create_default_context(cafile=str(fleet / "devices" / "device-01" / "ca.pem"))
    with (
        socket.create_connection(address) as plain,
        device.wrap_socket(plain, server_hostname="127.0.0.1") as made,
    ):
        assert made.recv(5) == b"hello"
    key = fleet / "devices" / "device-01" / "device.key"
    public = subprocess.run(
        ["ssh-keygen", "-y", "-f", key], capture_output=True, text=True, check=True
    ).stdout
    kept = (fleet / "operator" / "keys" / "device-01.pub").read_text()
    assert kept.split()[:2] == public.split()[:2]
    assert kept.split()[2] == "device-01"


@pytest.mark.skipif(shutil.which("sh") is None, reason="needs a shell")
def test_scripts_are_a_shells(fleet: Path) -> None:
    scripts = list(fleet.rglob("*.sh"))
    assert len(scripts) == 4
    for script in scripts:
        assert os.access(script, os.X_OK)
        subprocess.run(["sh", "-n", script], check=True)


def test_a_folder_in_use_is_left_alone(fleet: Path, tmp_path: Path) -> None:
    before = sorted(fleet.rglob("*"))
    with pytest.raises(InvalidValue, match="an empty folder"):
        make_fleet(fleet, Fleet(1))
    assert sorted(fleet.rglob("*")) == before
    assert read_fleet(fleet)[0].devices == 2
    assert [path.name for path in tmp_path.iterdir()] == ["fleet"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"devices": 0}, "devices = 0"),
        ({"port": 70_000}, "port = 70000"),
        ({"days": 0}, "days = 0"),
        ({"host": "a b"}, "host = 'a b'"),
        ({"host": "$(x)"}, "host"),
        ({"host": "server:1"}, "without a port"),
    ],
)
def test_a_fleet_that_cannot_be_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidValue, match=message.replace("$", r"\$").replace("(", r"\(")):
        Fleet(**{"devices": 2, **changes})  # type: ignore[arg-type]


def test_what_listens_is_as_open_as_the_host() -> None:
    assert Fleet(1, "127.0.0.1").listen == Fleet(1, "localhost").listen == "127.0.0.1"
    assert Fleet(1, "10.0.0.5").listen == Fleet(1, "fleet.example.org").listen == "0.0.0.0"


def test_a_new_fleet_is_fit(fleet: Path) -> None:
    assert findings(fleet)[False] == []


def test_a_folder_that_is_no_fleets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="deploy init"):
        list(check_fleet(tmp_path))


def test_a_renewed_certificate_serves_devices_that_have_the_old_ca(fleet: Path) -> None:
    server, device = fleet / "server", fleet / "devices" / "device-01"
    before = (server / "server.pem").read_bytes()
    done = subprocess.run(
        ["fedlora", "deploy", "renew", fleet, "--days", "30"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "is valid until" in done.stdout
    assert (server / "server.pem").read_bytes() != before
    assert stat.S_IMODE((server / "server.key").stat().st_mode) == 0o600
    signed = str(server / "server.pem")
    verify = ["openssl", "verify", "-CAfile", str(device / "ca.pem"), signed]
    assert subprocess.run(verify, check=False).returncode == 0
    soon = ["openssl", "x509", "-in", signed, "-noout", "-checkend"]
    assert subprocess.run([*soon, str(29 * 86_400)], check=False).returncode == 0
    assert subprocess.run([*soon, str(31 * 86_400)], check=False).returncode == 1
    assert answered(server, device / "ca.pem")


def answered(server: Path, authority: Path) -> bool:
    """Tell whether a client that trusts a CA agrees on TLS with the server's certificate."""
    there, here = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    there.load_cert_chain(server / "server.pem", server / "server.key")
    here.load_verify_locations(authority)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = here.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
    other = there.wrap_bio(outgoing, incoming, server_side=True)
    for _ in range(4):
        for side in (client, other):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return client.version() is not None and client.getpeercert() != {}


@pytest.mark.parametrize(
    ("spoil", "days", "reason"),
    [
        (lambda ca: (ca / "ca.key").unlink(), 30, "a folder with the fleet's ca.pem and ca.key"),
        (lambda ca: (ca / "ca.pem").write_text("nonsense"), 30, "a folder with the fleet's"),
        (
            lambda ca: shutil.copy(ca.parent / "server" / "server.key", ca / "ca.key"),
            30,
            "ca.key and ca.pem match",
        ),
        (lambda ca: None, 4_000, "days = 4000.*Make a new fleet"),
        (lambda ca: None, 0, "days = 0"),
    ],
)
def test_what_cannot_be_renewed_leaves_the_certificate(
    fleet: Path, spoil: Callable[[Path], object], days: int, reason: str
) -> None:
    before = {path: path.read_bytes() for path in (fleet / "server").iterdir()}
    spoil(fleet / "ca")
    with pytest.raises(InvalidValue, match=reason):
        renew(fleet, days)
    assert {path: path.read_bytes() for path in (fleet / "server").iterdir()} == before


def test_a_unit_says_of_its_own_program_why_it_starts_again(fleet: Path) -> None:
    server = (fleet / "server" / "fedlora-superlink.service").read_text()
    device = (fleet / "devices" / "device-01" / "fedlora-supernode.service").read_text()
    assert "SuperNode" not in server
    assert "A SuperNode exits with code 0 when its server no longer admits it." in device
    assert "$" not in server + device


def test_the_list_of_registered_devices_has_a_line_for_each(fleet: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    flwr = tmp_path / "bin" / "flwr"
    flwr.write_text('#!/bin/sh\necho "Loading …"\necho "SuperNode 17 of $3 is registered."\n')
    flwr.chmod(0o755)
    env = {**os.environ, "PATH": f"{flwr.parent}:{os.environ['PATH']}"}
    subprocess.run([fleet / "operator" / "register.sh"], env=env, check=True, capture_output=True)
    assert (fleet / "operator" / "registered.txt").read_text().splitlines() == [
        f"{name}: Loading … SuperNode 17 of keys/{name}.pub is registered."
        for name in ("device-01", "device-02")
    ]
