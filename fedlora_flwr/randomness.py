"""Named random streams: one experiment seed, separate streams for every purpose."""

from __future__ import annotations

import hashlib
import os
from urllib.parse import quote


def stream_seed(seed: int | None, *names: object) -> int:
    """Return the seed of one stream.

    Parameters
    ----------
    seed : int or None
        The experiment's seed; ``None`` draws from the operating system, differently at each call.
    *names : object
        What the stream is for, e.g. ``"noise", client, round``. Streams of different names are
        independent, and a stream does not depend on which process asks, or when.

    Returns
    -------
    int
        128 bits, too many to try them all on a release.
    """
    if seed is None:
        return int.from_bytes(os.urandom(16), "big")
    # Quoted, since ("a/b",) and ("a", "b") are different streams.
    text = "/".join(quote(str(part), safe="") for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")
