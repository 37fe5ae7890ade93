"""Certificates and keys of a fleet: a CA, the server's certificate, one key pair a device."""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

PRIVATE = 0o600
_EARLIER = timedelta(hours=1)
"""Certificates hold from then on: clocks of devices differ."""


def make_certificates(folder: Path, host: str, days: int) -> None:
    """Write ``ca.pem``, ``ca.key``, ``server.pem`` and ``server.key``.

    Parameters
    ----------
    folder : Path
        Where to.
    host : str
        Name or address under which devices reach the server; the certificate holds for it and for
        this machine's own loopback.
    days : int
        How long both certificates hold.
    """
    authority, key = _authority(days)
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
    for name, signed, private in (("ca", authority, key), ("server", certificate, server)):
        (folder / f"{name}.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
        _write_private(folder / f"{name}.key", private, serialization.PrivateFormat.PKCS8)


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


def _write_private(
    path: Path, key: ec.EllipticCurvePrivateKey, kind: serialization.PrivateFormat
) -> None:
    path.touch(mode=PRIVATE)
    path.chmod(PRIVATE)  # Under any umask.
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, kind, serialization.NoEncryption())
    )
