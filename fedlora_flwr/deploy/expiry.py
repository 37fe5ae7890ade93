"""When the certificates of a fleet's server end."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from fedlora_flwr.deploy.findings import Finding
from fedlora_flwr.errors import InvalidValue

SOON = timedelta(days=14)
NEW_FLEET = "make a new folder with `fedlora deploy init`, and carry its ca.pem to every device"
_ANSWER = 10.0  # seconds


@dataclass(frozen=True)
class Expiry:
    """The time for which a certificate is valid.

    Parameters
    ----------
    subject : str
        What it is, e.g. ``"server certificate"``.
    begin, end : datetime
        Its first and last moment.
    fix : str
        What to do before it ends.
    """

    subject: str
    begin: datetime
    end: datetime
    fix: str

    @classmethod
    def of(cls, subject: str, certificate: x509.Certificate, fix: str) -> Expiry:
        """Read the time from a certificate."""
        return cls(subject, certificate.not_valid_before_utc, certificate.not_valid_after_utc, fix)

    @property
    def finding(self) -> Finding:
        """Say how long it is valid; a problem from 14 days before its end."""
        now = datetime.now(UTC)
        text = f"valid from {self.begin:%Y-%m-%d} to {self.end:%Y-%m-%d}"
        if self.end - now < SOON:
            text += ", about to expire" if self.end > now else ", expired"
        return Finding(self.subject, self.begin <= now <= self.end - SOON, text, self.fix)


def expiries(server: Path, fleet: str, address: str = "") -> Iterator[Expiry]:
    """Yield the certificates of a server's folder, and the one that its server uses if it differs.

    Parameters
    ----------
    server : Path
        The folder with ``ca.pem`` and ``server.pem``. A file that is missing is left out.
    fleet : str
        The fleet's folder, as the command to renew names it.
    address : str (default: no question)
        Host and port of a server that runs.

    Raises
    ------
    InvalidValue
        A file does not hold a certificate.
    """
    renew = f"fedlora deploy renew {fleet}"
    files = {"CA certificate": ("ca.pem", NEW_FLEET), "server certificate": ("server.pem", renew)}
    known = set()
    for subject, (name, fix) in files.items():
        if (server / name).exists():
            certificate = _read(server / name)
            known.add(certificate.serial_number)
            yield Expiry.of(subject, certificate, fix)
    if not address:
        return
    host, _, port = address.rpartition(":")
    with suppress(OSError):  # The server may have ended just now.
        shown = ssl.get_server_certificate((host, int(port)), timeout=_ANSWER)
        certificate = x509.load_pem_x509_certificate(shown.encode())
        if certificate.serial_number not in known:
            fix = "carry server.pem and server.key to the server, and start the server again"
            yield Expiry.of("certificate that the server uses", certificate, fix)


def _read(file: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(file.read_bytes())
    except ValueError as error:
        allowed = f"a file with a certificate ({error}). Take it from the fleet's folder again"
        raise InvalidValue("certificate", str(file), allowed) from error
