"""Keys that two clients agree on, and the masks and sealed messages that follow from them.

All primitives are those of the package `cryptography`: X25519, HKDF with SHA-256, ChaCha20 for
masks and ChaCha20-Poly1305 for sealed messages. Every key is used once.
"""

from __future__ import annotations

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.wire.limits import Residues

__all__ = [
    "KEY_BYTES",
    "SEAL_BYTES",
    "agreed_key",
    "mask",
    "new_key",
    "public_key",
    "seal",
    "unseal",
]

KEY_BYTES = 32
SEAL_BYTES = 16
"""Bytes that sealing adds to a message."""
# A key is used once, so its nonce may be fixed.
_NONCE = bytes(12)


def new_key() -> bytes:
    """Draw a private X25519 key from the operating system's generator."""
    return X25519PrivateKey.generate().private_bytes_raw()


def public_key(private: bytes) -> bytes:
    """Return the public key of a private one."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agreed_key(private: bytes, public: bytes, context: bytes) -> bytes:
    """Return the key that the owners of two key pairs, and nobody else, can compute.

    Parameters
    ----------
    private, public : bytes
        One's own private key, and the other's public one.
    context : bytes
        The purpose of the key, and everything that both owners must have been told alike. Another
        context gives another key.

    Raises
    ------
    InvalidValue
        The public key is a point of small order, which gives the same key with every private key.
    """
    try:
        secret = X25519PrivateKey.from_private_bytes(private).exchange(
            X25519PublicKey.from_public_bytes(public)
        )
    except ValueError as error:
        raise InvalidValue("public key", public.hex(), "a point of large order") from error
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=context).derive(secret)


def mask(key: bytes, count: int) -> Residues:
    """Return the mask of a key: ``count`` numbers, uint32, that look uniform without the key."""
    stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(4 * count))
    return np.frombuffer(stream, "<u4").astype(np.uint32)


def seal(key: bytes, content: bytes) -> bytes:
    """Encrypt a message. Only the key's owners can read it, and they notice any change."""
    return ChaCha20Poly1305(key).encrypt(_NONCE, content, None)


def unseal(key: bytes, sealed: bytes) -> bytes:
    """Return the content of a sealed message.

    Raises
    ------
    InvalidValue
        The message was sealed with another key, or was changed.
    """
    try:
        return ChaCha20Poly1305(key).decrypt(_NONCE, sealed, None)
    except InvalidTag as error:
        allowed = "one that its sender sealed for this client, under the same terms"
        raise InvalidValue("sealed shares", sealed[:8].hex() + "…", allowed) from error
