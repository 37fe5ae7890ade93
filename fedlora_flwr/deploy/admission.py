"""Asks whether the server admits a device, by the first call that its SuperNode would make.

Flower gives only a number, or no reason, for most refusals, and tries a wrong port forever. So the
device makes that call once before its SuperNode starts, and each cause becomes a sentence. The call
changes nothing on the server: after the checks of certificate, clock and key, Flower refuses the
heartbeat interval that it asks for.

Source: flwr 1.42, ``superlink/routers/fleet/node_auth.py`` and
``superlink/servicer/fleet/fleet_handlers.py``.
"""

from __future__ import annotations

import argparse
import ssl
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedlora_flwr import flower_internals as flower
from fedlora_flwr.deploy.supernode import SCRIPT
from fedlora_flwr.errors import CannotStart, InvalidValue, one_line

_PATIENCE = 10.0  # seconds
_NO_HEARTBEAT = 0.0  # seconds between heartbeats: Flower takes 10 to 1800
# Seconds that a device's clock may be behind the server's, or ahead of it. They are a little below
# Flower's 305 and 5, because the time in the server's answer has whole seconds only.
_BEHIND, _AHEAD = 300, 4
_NOT_YET, _OVER = 9, 10  # OpenSSL's X509_V_ERR_CERT_NOT_YET_VALID and _HAS_EXPIRED
_OTHER_NAME = (62, 64)  # _HOSTNAME_MISMATCH and _IP_ADDRESS_MISMATCH
_SEE_SCRIPT = f"compare host and port with those after --superlink in {SCRIPT}"


class NotAdmitted(CannotStart):
    """A device's SuperNode would be refused."""

    def __str__(self) -> str:
        said = super().__str__()
        return f"{said[:1].upper()}{said[1:]}"


class NoAnswer(NotAdmitted):
    """Nothing answers: the server may start later, and a SuperNode waits for it."""


@dataclass(frozen=True)
class Caller:
    """Who calls which server, as the arguments of ``flower-supernode`` say.

    Parameters
    ----------
    address : str
        Host and port of the server.
    authority : Path, optional
        Certificate of the authority that the device trusts; the system's by default.
    key : Path, optional
        The device's private key.
    insecure : bool
        Whether it calls without TLS.
    """

    address: str
    authority: Path | None = None
    key: Path | None = None
    insecure: bool = False

    @classmethod
    def of(cls, arguments: Sequence[str], folder: Path) -> Caller | None:
        """Read the server, its authority and the key from arguments; ``None`` without a server.

        Parameters
        ----------
        arguments : sequence of str
            Arguments of ``flower-supernode``. Those that do not concern the server are ignored.
        folder : Path
            The folder in which the SuperNode starts.

        Raises
        ------
        InvalidValue
            An argument lacks its value.
        """
        parser = _Arguments(add_help=False)
        for name in ("--superlink", "--root-certificates", "--auth-supernode-private-key"):
            parser.add_argument(name)
        parser.add_argument("--insecure", action="store_true")
        found, _ = parser.parse_known_args(arguments)
        files = (found.root_certificates, found.auth_supernode_private_key)
        authority, key = (folder / Path(name).expanduser() if name else None for name in files)
        return cls(found.superlink, authority, key, found.insecure) if found.superlink else None

    def ask(self) -> None:
        """Call the server as a SuperNode would.

        Raises
        ------
        NotAdmitted
            The server refuses this device, is another one, or cannot be trusted.
        NoAnswer
            Nothing answers at that address.
        """
        key = self._private_key()
        trusted = self._trusted()
        public = key.public_key()
        content = public.public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        try:
            client = flower.FleetHttpClient(
                f"{'http' if self.insecure else 'https'}://{self.address}",
                interceptors=[flower.NodeAuthHttpInterceptor(key, public)],
                verify=trusted,
                timeout=_PATIENCE,
            )
            with client:
                client.ActivateNode(
                    flower.ActivateNodeRequest(public_key=content, heartbeat_interval=_NO_HEARTBEAT)
                )
        except ImportError as error:
            what = f"flwr {version('flwr')} calls its server in a way that is not known here"
            raise NotAdmitted(what, "install flwr 1.42 on this device") from error
        except httpx.HTTPStatusError as error:
            self._answered(error.response)
        except httpx.TransportError as error:
            raise self._unreached(error) from error
        except (httpx.InvalidURL, httpx.TooManyRedirects, ValueError) as error:
            raise self._no_superlink() from error

    def _private_key(self) -> ec.EllipticCurvePrivateKey:
        if self.key is None:  # Flower draws one, too.
            return ec.generate_private_key(ec.SECP384R1())
        try:
            key = serialization.load_ssh_private_key(self.key.read_bytes(), None)
        except Exception as error:  # A passphrase is a TypeError; other kinds have their own.
            raise _unreadable(self.key, error) from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise _unreadable(self.key, TypeError("the key is not on an elliptic curve"))
        return key

    def _trusted(self) -> ssl.SSLContext:
        if self.authority is None:
            return ssl.create_default_context()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            context.load_verify_locations(self.authority)
        except OSError as error:
            raise _unreadable(self.authority, error) from error
        return context

    def _answered(self, response: httpx.Response) -> None:
        """Read the server's answer, which is a refusal in any case."""
        found = flower.FlowerError.from_json(response.text)
        codes = flower.ApiErrorCode
        if response.status_code == httpx.codes.UNAUTHORIZED:
            raise self._unsigned(response)
        if found is None:
            raise self._no_superlink()
        if found.code == codes.FLEET_NODE_ACTIVATION_FAILED and self.key is not None:
            public = self.key.with_suffix(".pub").name
            raise NotAdmitted(
                f"the server at {self.address} does not know this device's key",
                f"ask the operator to put {public} into operator/keys and to run register.sh (or "
                "`flwr supernode register`)",
            )

    def _unsigned(self, response: httpx.Response) -> NotAdmitted:
        """Say why a server does not accept a signature, which contains the time."""
        here = datetime.now(UTC)
        with suppress(KeyError, TypeError, ValueError):
            there = parsedate_to_datetime(response.headers["date"])
            ahead = (here - there).total_seconds()
            if not -_BEHIND < ahead < _AHEAD:
                way = "ahead of" if ahead > 0 else "behind"
                return NotAdmitted(
                    f"this device's clock is {_length(abs(ahead))} {way} that of the server at "
                    f"{self.address} ({here:%H:%M:%S} here, {there:%H:%M:%S} there, UTC), which "
                    "accepts 5 seconds ahead and 5 minutes behind",
                    "set the clock that is wrong, for instance with `timedatectl set-ntp true`",
                )
        return NotAdmitted(
            f"the server at {self.address} does not accept this device's signature",
            "install the same version of flwr on both",
        )

    def _unreached(self, error: httpx.TransportError) -> NotAdmitted:
        """Say why no answer came."""
        causes = list(_causes(error))
        for cause in causes:
            if isinstance(cause, ssl.SSLCertVerificationError):
                return self._distrusted(cause)
        if any(isinstance(cause, ssl.SSLError) for cause in causes):
            return NotAdmitted(
                f"{self.address} answers, but does not speak TLS as a SuperLink does", _SEE_SCRIPT
            )
        if isinstance(error, httpx.TimeoutException):
            return NoAnswer(
                f"{self.address} did not answer within {_PATIENCE:g} seconds",
                f"open that port to this device, or {_SEE_SCRIPT}",
            )
        if isinstance(error, httpx.ConnectError):
            text = one_line(next((c for c in causes if isinstance(c, OSError)), error))
            return NoAnswer(
                f"nothing answers at {self.address} ({text})",
                f"start the server, or {_SEE_SCRIPT}",
            )
        if self.insecure:
            return NotAdmitted(
                f"{self.address} does not answer without TLS",
                f"write --root-certificates ca.pem and --auth-supernode-private-key device.key "
                f"instead of --insecure into {SCRIPT}",
            )
        return self._no_superlink()

    def _no_superlink(self) -> NotAdmitted:
        return NotAdmitted(f"{self.address} is not a SuperLink of this version", _SEE_SCRIPT)

    def _distrusted(self, error: ssl.SSLCertVerificationError) -> NotAdmitted:
        if error.verify_code in (_NOT_YET, _OVER):
            state = "has expired" if error.verify_code == _OVER else "is not valid yet"
            return NotAdmitted(
                f"the certificate of the server at {self.address} {state} by this device's clock "
                f"({datetime.now(UTC):%Y-%m-%d %H:%M} UTC; it is valid {self._dates()})",
                "set this clock if it is wrong; if not, ask the operator to run "
                "`fedlora deploy renew FLEET` and to restart the server",
            )
        if error.verify_code in _OTHER_NAME:
            return NotAdmitted(
                f"the certificate of the server at {self.address} is for another name "
                f"({error.verify_message.rstrip('.')})",
                f"write a name from the certificate after --superlink in {SCRIPT}, or make the "
                "fleet again with the right --host",
            )
        own = self.authority.name if self.authority else "the system's certificates"
        return NotAdmitted(
            f"the certificate of the server at {self.address} is not signed by the authority of "
            f"{own} ({error.verify_message})",
            "copy the fleet's ca.pem from its operator again; if that does not help, "
            f"{_SEE_SCRIPT}",
        )

    def _dates(self) -> str:
        """Say in which period both the server's certificate and its authority's are valid."""
        place = urlsplit(f"//{self.address}")
        server = (place.hostname or "", place.port or 443)
        try:
            shown = [ssl.get_server_certificate(server, timeout=_PATIENCE).encode()]
            shown += [self.authority.read_bytes()] if self.authority else []
            found = [x509.load_pem_x509_certificate(content) for content in shown]
        except (OSError, ValueError):
            return "at other times"
        begin = max(certificate.not_valid_before_utc for certificate in found)
        end = min(certificate.not_valid_after_utc for certificate in found)
        return f"from {begin:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M}"


class _Arguments(argparse.ArgumentParser):
    """Raises where argparse would end the process."""

    def error(self, message: str) -> NoReturn:
        raise InvalidValue("arguments", message, f"those of flower-supernode, in {SCRIPT}")


def _unreadable(file: Path, error: Exception) -> NotAdmitted:
    return NotAdmitted(
        f"{file} cannot be read ({getattr(error, 'strerror', None) or one_line(error)})",
        "take it from the device's folder that `fedlora deploy init` made",
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _length(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"
