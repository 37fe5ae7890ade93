"""A round that is asked again: when it is one release, and when it is another.

A server that was killed in a round asks for that round again. Where noise is fresh, the answer is
another release: it is always another row. With ``reproducible = true``, batches, dropout and noise
follow from the run's seed, the client and the round. Then the same question has the same answer,
bit for bit, and who has read it before learns nothing from it. Such a round is one row.

The rule. A row holds a digest of the *inputs*: the run's identity, the round, the order, the arrays
to start from (what stays with the client among them), σ, q, C, and the configuration. Before a
release leaves, the ledger finds a row of the same inputs that has vouched for the same *outputs*,
a digest of all arrays that the private steps made. If there is none, it takes a row of the same
inputs that has vouched for nothing yet, and notes the outputs there. If there is none either, it
writes another row. If the budget does not allow that, nothing leaves.

Why nothing is counted too seldom. Who attacks is the server. It may ask for any round, any number
of times, with any arrays, also at the same time. Other arrays, another plan or another round are
other inputs, hence another row. With the same inputs, at most one string of bits has left under
each row. Other records on the disk, another machine or another version of a library may make a
difference; the outputs show it. So there are at least as many rows as different answers, and an
answer that comes twice is post-processing of itself. Digests are of SHA-256. The inputs need not be
complete: what they leave out shows in the outputs.

What does not hold. With the same seed for other inputs, noise repeats and may cancel between two
answers. Rows are then counted as if it were fresh. This is so for every use of ``reproducible``,
which is for simulations: a device's file that sets it is told that the promise does not hold
against a server. Whether an attempt failed, and how long it took, is not covered by ε here or
elsewhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace

import numpy as np
from numpy.typing import NDArray

from fedlora_flwr.config import RunConfig
from fedlora_flwr.privacy.mechanism import Mechanism
from fedlora_flwr.wire.order import Order

_ELSEWHERE = ("num-rounds", "run-dir", "state-dir", "resume", "start", "eval-every", "min-clients")
"""Keys that decide nothing in a round, apart from its learning rates."""


def inputs_of(
    config: RunConfig,
    run: str,
    order: Order,
    arrays: Mapping[str, NDArray[np.floating]],
    mechanism: Mechanism,
) -> str:
    """Return the digest of what decides a round's release; empty where fresh noise does.

    Parameters
    ----------
    config : RunConfig
        The run, as it is on this client.
    run : str
        Identity of the run.
    order : Order
        The round's order. Without a round's number nothing is a repetition.
    arrays : Mapping[str, ndarray]
        All arrays to start from.
    mechanism : Mechanism
        Of the round.
    """
    if not config.reproducible or not order.server_round:
        return ""
    asked = replace(order, continues="", packet=b"").to_config()
    keys = {key: value for key, value in config.items().items() if key not in _ELSEWHERE}
    rates = config.learning_rates(order.server_round)
    decided = [run, asked, keys, rates, asdict(mechanism), digest_of(arrays)]
    return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()


def digest_of(arrays: Mapping[str, NDArray[np.generic]]) -> str:
    """Return a digest of named arrays: their names, types, shapes and bits."""
    found = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        found.update(json.dumps([name, array.dtype.str, array.shape]).encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()
