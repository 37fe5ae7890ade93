"""Checks whether a fleet can start, before anything does. Each finding is one line."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization

from fedlora_flwr.clients.device import Device
from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.authority import in_force
from fedlora_flwr.deploy import ports
from fedlora_flwr.deploy.admission import Caller, NotAdmitted
from fedlora_flwr.deploy.device_check import Backbone, device_findings
from fedlora_flwr.deploy.expiry import NEW_FLEET, expiries
from fedlora_flwr.deploy.findings import Finding, whole
from fedlora_flwr.deploy.fleet import SETTINGS, Fleet, read_fleet
from fedlora_flwr.deploy.flower import NotSealed
from fedlora_flwr.deploy.identities import PRIVATE
from fedlora_flwr.deploy.supernode import (
    BIN,
    OTHER_PORT,
    SCRIPT,
    arguments_of,
    check_script,
    installed_code,
)
from fedlora_flwr.environment import versions
from fedlora_flwr.errors import FedLoRAError

_MUST_AGREE = ("fedlora-flwr", "flwr")


def check_fleet(folder: Path, run: RunConfig | None = None) -> Iterator[Finding]:
    """Look at everything in a fleet's folder that can be known before it starts.

    Parameters
    ----------
    folder : Path
        As `make_fleet` made it.
    run : RunConfig, optional
        The planned run. With it, each device's records are read, its noise is calibrated, its
        ledger is asked, and its backbone is compared with the server's.

    Raises
    ------
    InvalidValue
        It is not a fleet's folder.
    """
    fleet, made_with = read_fleet(folder)
    yield _versions(made_with)
    yield from whole("server certificate", _certificates(folder, fleet))
    keys = [
        folder / "ca" / "ca.key",
        folder / "server" / "server.key",
        *(folder / "devices" / name / "device.key" for name in fleet.names),
    ]
    yield from whole("private keys", _private_keys(folder, keys))
    yield _port(folder, fleet)
    backbone = Backbone(run) if run else None
    for name in fleet.names:
        device = folder / "devices" / name
        yield from whole(name, _own_code(name, device / SCRIPT, check_script))
        yield from whole(name, device_findings(device, name, run, backbone))


def check_device(folder: Path, run: RunConfig | None = None) -> Iterator[Finding]:
    """Look, on the device, at everything that can be known before its SuperNode starts.

    Parameters
    ----------
    folder : Path
        The device's folder, as `make_fleet` made it.
    run : RunConfig, optional
        The planned run. With it, the device's records are read, its noise is calibrated, its ledger
        is asked and its backbone is built. Without it, the check only looks whether records and
        model are where the device's file says.

    Raises
    ------
    InvalidValue
        It is not a device's folder.
    """
    _, made_with = read_fleet(folder)
    yield _versions(made_with)
    yield from whole("private keys", _private_keys(folder, [folder / "device.key"]))
    yield from whole(SCRIPT, _own_code(SCRIPT, folder / SCRIPT, installed_code))
    yield from whole("port", node_port(folder))
    yield from whole("server", _admitted(folder))
    yield from whole(folder.name, device_findings(folder, folder.name, run, None, here=True))


def keys_in_force(folder: Path) -> Iterator[Finding]:
    """List every key with the value that is in force on a device, or who gives it.

    Parameters
    ----------
    folder : Path
        The device's folder. If its file cannot be read, nothing is listed: `check_device` says why.
    """
    try:
        device = Device.read(folder / SETTINGS)
    except FedLoRAError:
        return
    for key, text in in_force(device.settings, device.limits):
        yield Finding(key, True, text)


def _own_code(subject: str, script: Path, look: Callable[[Path], Path | None]) -> Iterator[Finding]:
    """Check that only installed code would run on a device, and none that a server ships."""
    try:
        package = look(script)
    except NotSealed as error:
        yield Finding(subject, False, error.what, error.fix)
        return
    where = f" in {package}" if package else ""
    yield Finding(subject, True, f"runs only the code that is installed{where}")


def _admitted(folder: Path) -> Iterator[Finding]:
    """Ask the server that the start script names whether it admits this device."""
    caller = Caller.of(arguments_of(folder / SCRIPT), folder)
    if caller is None:
        return
    subject = f"server {caller.address}"
    try:
        caller.ask()
    except NotAdmitted as error:
        yield Finding(subject, False, error.what, error.fix)
    else:
        yield Finding(subject, True, "admits this device")


def _versions(made_with: dict[str, str]) -> Finding:
    here = versions()
    other = [
        f"{name} {here.get(name)} here, {made_with.get(name)} in the fleet"
        for name in _MUST_AGREE
        if here.get(name) != made_with.get(name)
    ]
    text = ", ".join(f"{name} {here.get(name)}" for name in _MUST_AGREE)
    if other:
        return Finding("versions", False, "; ".join(other), "install the same versions everywhere")
    return Finding("versions", True, text)


def _certificates(folder: Path, fleet: Fleet) -> Iterator[Finding]:
    fix = NEW_FLEET
    try:
        authority, server = (
            x509.load_pem_x509_certificate((folder / "server" / f"{name}.pem").read_bytes())
            for name in ("ca", "server")
        )
    except (OSError, ValueError) as error:
        yield Finding("server certificate", False, f"cannot be read: {error}", fix)
        return
    for one in expiries(folder / "server", str(folder)):
        yield one.finding
    try:
        server.verify_directly_issued_by(authority)
        yield Finding("server certificate", True, "signed by the fleet's CA")
    except (ValueError, TypeError, InvalidSignature):
        yield Finding("server certificate", False, "not signed by the CA beside it", fix)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    known = {str(getattr(name, "value", name)) for name in names}
    yield Finding(
        "server certificate",
        fleet.host in known,
        f"valid for {', '.join(sorted(known))}",
        f"it lacks {fleet.host!r}, the name that devices call: {fix}",
    )
    copies = [folder / "devices" / name / "ca.pem" for name in fleet.names]
    own = (folder / "server" / "ca.pem").read_bytes()
    other = [c.parent.name for c in copies if not c.exists() or c.read_bytes() != own]
    text = f"missing or of another CA on {', '.join(other)}" if other else "the same on all devices"
    yield Finding("ca.pem", not other, text, "copy server/ca.pem there")


def _private_keys(folder: Path, keys: Sequence[Path]) -> Iterator[Finding]:
    good = 0
    for key in keys:
        name = str(key.relative_to(folder))
        if not key.exists():
            # Keys are carried to their machines and need not stay here.
            continue
        if (mode := key.stat().st_mode & 0o777) != PRIVATE:
            yield Finding(name, False, f"mode {mode:o}: others can read it", f"chmod 600 {key}")
        elif problem := _mismatch(key):
            yield Finding(name, False, problem, _fix_of(key))
        else:
            good += 1
    if good:
        yield Finding("private keys", True, f"{good} with mode 600; each matches its public key")


def _fix_of(key: Path) -> str:
    if key.name != "device.key":
        return "put the right key back"
    made = f"ssh-keygen -y -f {key} > {key.with_suffix('.pub')}"
    return f"put the right key back; if only the public one is wrong or missing, run {made}"


def _mismatch(key: Path) -> str:
    """Say why a private key does not match the public one beside it; empty if it does."""
    content = key.read_bytes()
    try:
        if key.name == "device.key":
            private: Any = serialization.load_ssh_private_key(content, None)
            public: Any = serialization.load_ssh_public_key(key.with_suffix(".pub").read_bytes())
        else:
            private = serialization.load_pem_private_key(content, None)
            certificate = key.with_suffix(".pem").read_bytes()
            public = x509.load_pem_x509_certificate(certificate).public_key()
    except Exception as error:  # A passphrase is a TypeError; other kinds of keys have their own.
        return f"cannot be read: {error}"
    return "" if private.public_key() == public else "does not match the public key beside it"


def _port(folder: Path, fleet: Fleet) -> Finding:
    subject = f"port {fleet.port}"
    why = ports.trouble(fleet.listen, fleet.port)
    if not why:
        return Finding(subject, True, f"free on {fleet.listen}")
    if ports.serves(folder / "server" / "ca.pem", fleet.host, fleet.port):
        return Finding(subject, True, "this fleet's server is running here")
    fix = "end the program that uses it, or make the fleet with another --port"
    return Finding(subject, False, f"cannot be used: {why}", fix)


def node_port(folder: Path) -> Iterator[Finding]:
    """Look at the port on which a device's SuperNode listens, on loopback alone."""
    place = ports.asked(arguments_of(folder / SCRIPT), os.environ)
    if place is None:
        return
    subject, why = f"port {place[1]}", ports.trouble(*place)
    if not why:
        yield Finding(subject, True, f"free on {place[0]}")
    elif ports.claimed(folder / BIN):
        yield Finding(subject, True, "this device's SuperNode is running here")
    else:
        yield Finding(subject, False, f"cannot be used: {why}", OTHER_PORT)
