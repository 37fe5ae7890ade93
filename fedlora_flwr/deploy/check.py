"""Whether a fleet's folder is fit to start, before anything does: one finding a line."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization

from fedlora_flwr.clients.device import Device
from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.authority import in_force
from fedlora_flwr.deploy.fleet import SCRIPT, SETTINGS, Fleet, read_fleet
from fedlora_flwr.deploy.flower import NotSealed
from fedlora_flwr.deploy.identities import PRIVATE
from fedlora_flwr.deploy.supernode import check_script, installed_code
from fedlora_flwr.environment import versions
from fedlora_flwr.errors import FedLoRAError, InvalidValue, one_line
from fedlora_flwr.files import data_folder
from fedlora_flwr.tasks.registry import build_task, private_reading, unstated_classes

if TYPE_CHECKING:
    from fedlora_flwr.privacy.mechanism import Mechanism

SOON = timedelta(days=14)
_PATIENCE = 10.0  # seconds
_MUST_AGREE = ("fedlora-flwr", "flwr")


@dataclass(frozen=True)
class Finding:
    """What was looked at, and what was found.

    Parameters
    ----------
    subject : str
        E.g. ``"server certificate"``.
    good : bool
        Whether it is fit.
    text : str
        What was found.
    fix : str
        What to do where it is not fit.
    """

    subject: str
    good: bool
    text: str
    fix: str = ""


def check_fleet(folder: Path, run: RunConfig | None = None) -> Iterator[Finding]:
    """Look at everything in a fleet's folder that can be known before it starts.

    Parameters
    ----------
    folder : Path
        As `make_fleet` made it.
    run : RunConfig, optional
        The run that is planned. With it, each device's records are read, its promise worked out,
        its ledger asked and its backbone compared with the server's.

    Raises
    ------
    InvalidValue
        It is not a fleet's folder.
    """
    fleet, made_with = read_fleet(folder)
    yield _versions(made_with)
    yield from _whole("server certificate", _certificates(folder, fleet))
    keys = [
        folder / "ca" / "ca.key",
        folder / "server" / "server.key",
        *(folder / "devices" / name / "device.key" for name in fleet.names),
    ]
    yield from _whole("private keys", _private_keys(folder, keys))
    yield _port(fleet)
    backbone = _Backbone(run) if run else None
    for name in fleet.names:
        device = folder / "devices" / name
        yield from _whole(name, _own_code(name, device / SCRIPT, check_script))
        yield from _whole(name, _device(device, name, run, backbone))


def check_device(folder: Path, run: RunConfig | None = None) -> Iterator[Finding]:
    """Look, on the device, at everything that can be known before its SuperNode starts.

    Parameters
    ----------
    folder : Path
        The device's, as `make_fleet` made it.
    run : RunConfig, optional
        The run that is planned. With it, the device's records are read, its promise worked out,
        its ledger asked and its backbone built.

    Raises
    ------
    InvalidValue
        It is not a device's folder.
    """
    fleet, made_with = read_fleet(folder)
    yield _versions(made_with)
    yield from _whole("private keys", _private_keys(folder, [folder / "device.key"]))
    yield from _whole(SCRIPT, _own_code(SCRIPT, folder / SCRIPT, installed_code))
    yield _reached(fleet, folder / "ca.pem")
    yield from _whole(folder.name, _device(folder, folder.name, run, None, here=True))
    yield from _who_decides(folder / SETTINGS)


def _whole(subject: str, findings: Iterator[Finding]) -> Iterator[Finding]:
    """Yield findings, and one more for an error that ends them: what else there is is looked at."""
    try:
        yield from findings
    except Exception as error:
        text = f"cannot be looked at further ({type(error).__name__}: {one_line(error)})"
        yield Finding(subject, False, text, "see to the file that it is about")


def _who_decides(file: Path) -> Iterator[Finding]:
    """List every key with the value that is in force on a device, or who gives it."""
    try:
        device = Device.read(file)
    except FedLoRAError:
        return  # Told already.
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


def _reached(fleet: Fleet, authority: Path) -> Finding:
    """Shake hands with the server as a SuperNode would, up to the point where it says who it is."""
    subject, address = f"server {fleet.host}:{fleet.port}", (fleet.host, fleet.port)
    try:
        trusted = ssl.create_default_context(cafile=authority)
        with (
            socket.create_connection(address, timeout=_PATIENCE) as plain,
            trusted.wrap_socket(plain, server_hostname=fleet.host),
        ):
            return Finding(subject, True, f"answers with a certificate of {authority.name}")
    except ssl.SSLCertVerificationError as error:
        fix = f"make new certificates, or put the ca.pem of this fleet's server into {authority}"
        return Finding(subject, False, error.verify_message, fix)
    except OSError as error:
        fix = "start the server, and let this device through to that port"
        return Finding(subject, False, f"does not answer: {error.strerror or error}", fix)


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
    fix = "make a new folder with `fedlora deploy init`, and carry its ca.pem to every device"
    try:
        authority, server = (
            x509.load_pem_x509_certificate((folder / "server" / f"{name}.pem").read_bytes())
            for name in ("ca", "server")
        )
    except (OSError, ValueError) as error:
        yield Finding("server certificate", False, f"cannot be read: {error}", fix)
        return
    for subject, certificate in (("CA certificate", authority), ("server certificate", server)):
        yield _dates(subject, certificate, fix)
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
        f"holds for {', '.join(sorted(known))}",
        f"devices call the server {fleet.host!r}: {fix}",
    )
    copies = [folder / "devices" / name / "ca.pem" for name in fleet.names]
    own = (folder / "server" / "ca.pem").read_bytes()
    other = [c.parent.name for c in copies if not c.exists() or c.read_bytes() != own]
    text = f"of another CA, or none, on {', '.join(other)}" if other else "the same on all devices"
    yield Finding("ca.pem", not other, text, "copy server/ca.pem there")


def _dates(subject: str, certificate: x509.Certificate, fix: str) -> Finding:
    now, begin, end = (
        datetime.now(UTC),
        certificate.not_valid_before_utc,
        certificate.not_valid_after_utc,
    )
    text = f"valid from {begin:%Y-%m-%d} to {end:%Y-%m-%d}"
    if end - now < SOON:
        text += ", soon over" if end > now else ", over"
    return Finding(subject, begin <= now <= end - SOON, text, fix)


def _private_keys(folder: Path, keys: Sequence[Path]) -> Iterator[Finding]:
    good = 0
    for key in keys:
        name = str(key.relative_to(folder))
        if not key.exists():
            # Keys are carried to where they belong, and need not stay here.
            continue
        if (mode := key.stat().st_mode & 0o777) != PRIVATE:
            yield Finding(name, False, f"mode {mode:o}: others can read it", f"chmod 600 {key}")
        elif problem := _mismatch(key):
            yield Finding(name, False, problem, "put the right one back")
        else:
            good += 1
    if good:
        yield Finding("private keys", True, f"{good} of mode 600, each fits its public key")


def _mismatch(key: Path) -> str:
    """Say why a private key is not the partner of the public one beside it; empty if it is."""
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
    return "" if private.public_key() == public else "not the partner of the public key beside it"


def _port(fleet: Fleet) -> Finding:
    subject = f"port {fleet.port}"
    try:
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((fleet.listen, fleet.port))
    except OSError as error:
        fix = "end what listens there, or make the fleet with another --port"
        return Finding(subject, False, f"cannot be listened on: {error.strerror}", fix)
    return Finding(subject, True, f"free on {fleet.listen}")


class _Backbone:
    """The fingerprint of the run's model, worked out once for each way to name the model."""

    def __init__(self, run: RunConfig) -> None:
        self.run = run
        self._known: dict[str, str] = {}

    def of(self, config: RunConfig) -> str:
        from fedlora_flwr.lora.build import build_adapted

        if config.model not in self._known:
            adapted = build_adapted(config, build_task(config.task, config))
            self._known[config.model] = adapted.fingerprint
        return self._known[config.model]


def _device(
    folder: Path, name: str, run: RunConfig | None, backbone: _Backbone | None, here: bool = False
) -> Iterator[Finding]:
    file = folder / SETTINGS
    settings = _tried(name, lambda: Device.read(file), f"see {file}")
    if isinstance(settings, Finding):
        yield settings
        return
    yield Finding(name, True, f"settings of {settings.client!r} can be read")
    for key, why in settings.undone():
        text = f"{key} = {settings.settings[key]!r} undoes the promise: {why}"
        fix = f"take the line out of {file}, unless the server may know these records"
        yield Finding(name, False, text, fix)
    if run is None and not here:
        return
    missing = _tried(name, settings.require, "do so in the environment of this command")
    if missing:
        yield missing
    if missing or run is None:
        return
    config = _tried(name, lambda: settings.config(run.items()), f"see {file}")
    if isinstance(config, Finding):
        yield config
        return
    # A file that names no state-dir means the data folder of the device's user, who looks here.
    state = Path(config.state_dir) if config.state_dir else None
    if state is None and backbone is None:
        state = data_folder()
    yield from _promise(name, settings.client, config, file, state)
    known = backbone or _Backbone(run)
    own = _tried(name, lambda: known.of(config), f"see model in {file}")
    if isinstance(own, Finding):
        yield own
        return
    if backbone is None:
        yield Finding(name, True, f"backbone {own}; the server refuses any other than its own")
        return
    same = own == backbone.of(run)
    text = f"backbone {own}" + ("" if same else f", the server's is {backbone.of(run)}")
    yield Finding(name, same, text, "put the server's model there")


def _promise(
    name: str, client: str, config: RunConfig, file: Path, state: Path | None
) -> Iterator[Finding]:
    task = build_task(config.task, config)

    def records() -> tuple[int, list[str]]:
        if found := unstated_classes(task):
            allowed = f"the names {found} in the order that all devices share"
            raise InvalidValue("class-names", "", f"{allowed}: num-classes alone does not tell it")
        return len(task.client_records(0, 1)), private_reading(task)

    opened = _tried(name, records, f"see dataset and class-names in {file}")
    if isinstance(opened, Finding):
        yield opened
        return
    count, lines = opened
    yield from (Finding(name, True, line) for line in lines)
    yield from _budget(name, client, config, count, state)


def _budget(
    name: str, client: str, config: RunConfig, count: int, state: Path | None
) -> Iterator[Finding]:
    """Say what a run would cost the device's budget, and what is spent of it."""
    from fedlora_flwr.privacy.account import UNBOUND
    from fedlora_flwr.privacy.budget import Segment
    from fedlora_flwr.privacy.calibration import calibrated_mechanism
    from fedlora_flwr.privacy.ledger import Account, Ledger

    account = Account(
        client, "", config.epsilon, config.delta, config.ledger_scope, config.run_epsilon
    )
    ledger = None
    if state is not None and Ledger.exists(path := state / "ledger.sqlite"):
        ledger = _tried(name, lambda: Ledger(path, patience=_PATIENCE), "do what the sentence says")
        if isinstance(ledger, Finding):
            yield ledger
            return

    def plan() -> Mechanism:
        terms = ledger.terms(account) if ledger else UNBOUND
        return calibrated_mechanism(config, count, terms=terms)

    mechanism = _tried(name, plan, "more records, or another epsilon and delta")
    if isinstance(mechanism, Finding):
        yield mechanism
        return
    yield Finding(
        name,
        True,
        f"{count} records, ε ≤ {config.epsilon:g} at δ = {config.delta:g} with noise multiplier "
        f"{mechanism.noise_multiplier:.3g}",
    )
    if not ledger:
        elsewhere = "its ledger is on the device: its file names no state-dir"
        yield Finding(name, True, "nothing spent yet" if state else elsewhere)
        return
    planned = Segment(mechanism.noise_multiplier, mechanism.sample_rate, config.planned_steps)
    both = _tried(
        name,
        lambda: (ledger.summary(account).epsilon, ledger.check(account, planned).epsilon),
        "fewer rounds, or another epsilon if the data's owners agree",
    )
    if isinstance(both, Finding):
        yield both
    else:
        yield Finding(name, True, f"ε = {both[0]:.3g} spent, {both[1]:.3g} after the run")


def _tried(subject: str, work: Callable[[], Any], fix: str) -> Any:
    """Return what a piece of work gives, or the finding that it cannot be done."""
    try:
        return work()
    except (FedLoRAError, OSError) as error:
        return Finding(subject, False, str(error), fix)
