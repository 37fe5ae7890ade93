"""Named random streams: one seed per experiment, and a separate stream for each purpose."""

from __future__ import annotations

import hashlib
import os
from urllib.parse import quote

import numpy as np

from fedlora_flwr.operating_system import after_fork

_forks = 0  # How many forks lie between this process and the first one.


def _was_forked() -> None:
    global _forks
    _forks += 1


after_fork(_was_forked)


def stream_seed(seed: int | None, *names: object) -> int:
    """Return the seed of one stream.

    Parameters
    ----------
    seed : int or None
        The experiment's seed. With ``None``, each call draws a new result from the operating
        system's random generator.
    *names : object
        The purpose of the stream, e.g. ``"noise", client, round``. Streams with different names are
        independent. A stream is the same in every process and at every call.

    Returns
    -------
    int
        A number of 128 bits: too many for an attacker to try all of them on a release.
    """
    if seed is None:
        return int.from_bytes(os.urandom(16), "big")
    # The names are quoted because ("a/b",) and ("a", "b") must be different streams.
    text = "/".join(quote(str(part), safe="") for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")


class RandomStream:
    """NumPy's generator, which no other process and no copy continues unless it has a seed.

    A fork of a process and a copy of an object have all the state of a generator. Both would draw
    again what the original draws.

    Parameters
    ----------
    seed : int or None
        With ``None``, the operating system seeds the generator at its first draw, and again in each
        forked process, each copy and each pickle. A number gives the same stream everywhere.

    Examples
    --------
    >>> first, again = (RandomStream(7).generator.random() for _ in range(2))
    >>> first == again
    True
    """

    def __init__(self, seed: int | None) -> None:
        self._seed = seed
        self._generator: np.random.Generator | None = None
        self._forks = 0

    @property
    def generator(self) -> np.random.Generator:
        """The generator, to be asked for at each draw."""
        forked = self._seed is None and self._forks != _forks
        if self._generator is None or forked:
            self._generator = np.random.default_rng(
                stream_seed(None) if self._seed is None else self._seed
            )
            self._forks = _forks
        return self._generator

    def __getstate__(self) -> dict[str, object]:
        """Return what a copy begins with."""
        return vars(self) if self._seed is not None else {**vars(self), "_generator": None}
