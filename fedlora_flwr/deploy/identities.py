"""Certificates and keys of a fleet: a CA, the server's certificate, one key pair per device."""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.files import replace_file, replacing

PRIVATE = 0o600
_EARLIER = timedelta(hours=1)
"""Certificates are valid from an hour before they are made, since clocks of devices differ."""
_AUTHORITY_DAYS = 3_660
"""How long a CA is valid: longer than any server's certificate, so that these can be renewed."""


def make_certificates(folder: Path, host: str, days: int) -> None:
    """Write ``ca.pem``, ``ca.key``, ``server.pem`` and ``server.key``.

    Parameters
    ----------
    folder : Path
        The folder to write to.
    host : str
        Name or address under which devices reach the server. The certificate is valid for it and
        for this machine's loopback.
    days : int
        How long the server's certificate is valid. The CA's is valid for ten years.
    """
    authority, key = _authority(_AUTHORITY_DAYS)
    _write_public(folder / "ca.pem", authority)
    _write_private(folder / "ca.key", key, serialization.PrivateFormat.PKCS8)
    _sign_server(folder, authority, key, host, days)


def renew_server(folder: Path, authority: Path, host: str, days: int) -> datetime:
    """Write a new ``server.pem`` and ``server.key``, signed by the same CA.

    Parameters
    ----------
    folder : Path
        The folder to write to.
    authority : Path
        The folder with ``ca.pem`` and ``ca.key``.
    host : str
        As for `make_certificates`.
    days : int
        How long the certificate is valid.

    Returns
    -------
    datetime
        When it expires.

    Raises
    ------
    InvalidValue
        The CA's files cannot be read or do not belong together, or the CA expires sooner.
    """
    try:
        signer = x509.load_pem_x509_certificate((authority / "ca.pem").read_bytes())
        key = serialization.load_pem_private_key((authority / "ca.key").read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        allowed = f"a folder with the fleet's ca.pem and ca.key ({error})"
        raise InvalidValue("ca", str(authority), allowed) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != signer.public_key():
        raise InvalidValue("ca", str(authority), "a folder whose ca.key and ca.pem match")
    left = (signer.not_valid_after_utc - datetime.now(UTC)).days
    if not 1 <= days <= left:
        most = max(left, 0)
        allowed = f"from 1 to {most}, since the CA's own certificate ends then. Make a new fleet"
        raise InvalidValue("days", days, allowed)
    return _sign_server(folder, signer, key, host, days)


def _sign_server(
    folder: Path, authority: x509.Certificate, key: ec.EllipticCurvePrivateKey, host: str, days: int
) -> datetime:
    server = ec.generate_private_key(ec.SECP384R1())
    names = dict.fromkeys([host, "localhost", "127.0.0.1"])
    certificate = (
        _builder("fedlora server", authority.subject, server.public_key(), days)
        .add_extension(x509.SubjectAlternativeName([_name(n) for n in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False
        )
        .sign(key, hashes.SHA384())
    )
    _write_private(folder / "server.key", server, serialization.PrivateFormat.PKCS8)
    _write_public(folder / "server.pem", certificate)
    return certificate.not_valid_after_utc


def make_device_key(folder: Path, name: str) -> None:
    """Write ``device.key`` and ``device.pub``, an EC key pair in OpenSSH's format."""
    key = ec.generate_private_key(ec.SECP384R1())
    _write_private(folder / "device.key", key, serialization.PrivateFormat.OpenSSH)
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    (folder / "device.pub").write_bytes(public + f" {name}\n".encode())


def _authority(days: int) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP384R1())
    subject = _subject("fedlora CA")
    usage = x509.KeyUsage(
        digital_signature=False, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, key_cert_sign=True, crl_sign=True,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip
    certificate = (
        _builder("fedlora CA", subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    return certificate, key


def _builder(
    subject: str, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_subject(subject))
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLIER)
        .not_valid_after(now + timedelta(days=days))
    )


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write_public(path: Path, certificate: x509.Certificate) -> None:
    replace_file(path, certificate.public_bytes(serialization.Encoding.PEM))


def _write_private(
    path: Path, key: ec.EllipticCurvePrivateKey, kind: serialization.PrivateFormat
) -> None:
    content = key.private_bytes(serialization.Encoding.PEM, kind, serialization.NoEncryption())
    with replacing(path) as draft:
        draft.touch(mode=PRIVATE)
        draft.chmod(PRIVATE)  # Under any umask.
        draft.write_bytes(content)
