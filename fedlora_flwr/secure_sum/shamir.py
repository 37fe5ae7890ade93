"""Shamir's secret sharing: enough shares restore a secret, and fewer tell nothing about it.

A secret is the value at 0 of a random polynomial over the integers modulo a prime, and each share
is its value at another place. The common Python libraries work bit by bit on 16 bytes at a time,
which takes minutes for a hundred clients. Here a secret is one Python integer.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from functools import lru_cache

from fedlora_flwr.errors import InvalidValue

__all__ = ["SECRET_BYTES", "SHARE_BYTES", "combine", "split"]

SECRET_BYTES = 32
_PRIME = 2**521 - 1
SHARE_BYTES = 66  # 521 bits


def split(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """Split a secret into shares.

    Parameters
    ----------
    secret : bytes
        `SECRET_BYTES` long.
    threshold : int
        How many shares restore it.
    count : int
        How many shares to make, at least ``threshold``.

    Returns
    -------
    list[bytes]
        `SHARE_BYTES` each; the share at index i is the polynomial's value at i + 1.

    References
    ----------
    A. Shamir, "How to share a secret", CACM 22 (1979).

    Examples
    --------
    >>> shares = split(bytes(range(32)), threshold=2, count=3)
    >>> combine({0: shares[0], 2: shares[2]}) == bytes(range(32))
    True
    """
    if len(secret) != SECRET_BYTES:
        raise InvalidValue("length of a secret", len(secret), f"{SECRET_BYTES} bytes")
    if not 1 <= threshold <= count:
        raise InvalidValue("threshold", threshold, f"a whole number from 1 to {count}")
    drawn = [secrets.randbelow(_PRIME) for _ in range(threshold - 1)]
    polynomial = [*drawn, int.from_bytes(secret, "big")]
    return [_value(polynomial, place).to_bytes(SHARE_BYTES, "big") for place in range(1, count + 1)]


def combine(shares: Mapping[int, bytes]) -> bytes:
    """Return the secret that shares belong to.

    Parameters
    ----------
    shares : Mapping[int, bytes]
        As many shares as the threshold, by index from 0. With fewer, or with a wrong one, the
        result is a wrong secret or an error.

    Raises
    ------
    InvalidValue
        The shares do not belong to one secret. This is not always noticed.
    """
    weights = _weights(tuple(shares))
    terms = (w * int.from_bytes(s, "big") for w, s in zip(weights, shares.values(), strict=True))
    found = sum(terms) % _PRIME
    if found.bit_length() > 8 * SECRET_BYTES:
        raise InvalidValue("shares of a secret", list(shares), "shares of one and the same secret")
    return found.to_bytes(SECRET_BYTES, "big")


def _value(polynomial: list[int], place: int) -> int:
    value = 0
    for coefficient in polynomial:
        value = (value * place + coefficient) % _PRIME
    return value


@lru_cache(maxsize=8)
def _weights(indices: tuple[int, ...]) -> tuple[int, ...]:
    """Return Lagrange's weights at 0. All secrets of a round use the same, so they are cached."""
    found = []
    for index in indices:
        above = below = 1
        for other in indices:
            if other != index:
                above = above * (other + 1) % _PRIME
                below = below * (other - index) % _PRIME
        found.append(above * pow(below, -1, _PRIME) % _PRIME)
    return tuple(found)
