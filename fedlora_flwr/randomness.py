"""Named random streams: one seed per experiment, and a separate stream for each purpose."""

from __future__ import annotations

import hashlib
import os
from urllib.parse import quote


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
