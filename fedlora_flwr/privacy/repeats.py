"""A round that a server asks for again: when it is the same release, and when it is a new one.

A server that was killed in a round asks for that round again. Where noise is fresh, the answer is a
new release and always gets a new row in the ledger. With ``reproducible = true``, batches, dropout
and noise follow from the run's seed, the client and the round. The same request then has the same
answer, bit for bit, and a server that has it already learns nothing from it. Such a round has one
row.

The rule. A row holds a digest of the *inputs*: the run's identity, the round, the order, the arrays
to start from (including those that stay with the client), σ, q, C, and the configuration. It also
has a place for a digest of the *outputs*: all arrays that the private steps made. Before a release
leaves, the ledger looks for a row with the same inputs and the same outputs. If there is none, it
takes a row with the same inputs and no outputs yet, and notes the outputs there. If there is none
either, it writes a new row. If the budget does not allow a new row, nothing leaves.

Why no release is left uncounted. The attacker is the server. It may ask for any round, any number
of times, with any arrays, also at the same time. Other arrays, another plan or another round are
other inputs and need another row. With the same inputs, at most one string of bits leaves under
each row. If other records on the disk, another machine or another version of a library change the
bits, the outputs differ. There are therefore at least as many rows as different answers, and a
repeated answer is post-processing of the first one. The digests are SHA-256. The inputs need not be
complete, because an effect of anything else shows in the outputs.

What does not hold. If other inputs have the same seed, the noise repeats and may cancel between two
answers, but rows are counted as if the noise were fresh. This is true of every use of
``reproducible``, which is meant for simulations. If a device's file sets it, the device's owner is
warned that the promise does not hold against a server. Whether an attempt failed, and how long it
took, is not covered by ε, here or elsewhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedlora_flwr.algebra.last_arrays import OfLastArrays
from fedlora_flwr.config import RunConfig
from fedlora_flwr.privacy.mechanism import Mechanism
from fedlora_flwr.wire.order import Order

_ELSEWHERE = (
    "num-rounds", "run-dir", "state-dir", "resume", "start", "eval-every", "min-clients",
    "early-stopping-patience", "early-stopping-threshold", "metric-for-best-model", "share-weights",
)  # fmt: skip
"""Keys that change nothing in a round but the learning rates, which `inputs_of` adds itself."""


def inputs_of(
    config: RunConfig,
    run: str,
    order: Order,
    arrays: Mapping[str, NDArray[np.floating]],
    mechanism: Mechanism,
    own: Mapping[str, NDArray[np.floating]] | None = None,
) -> str:
    """Return the digest of the inputs that decide a round's release; empty where noise is fresh.

    Parameters
    ----------
    config : RunConfig
        The run's configuration on this client.
    run : str
        Identity of the run.
    order : Order
        The round's order. If its round is 0, the result is empty, and the release is always new.
    arrays : Mapping[str, ndarray]
        All arrays that the round starts from.
    mechanism : Mechanism
        The round's mechanism.
    own : Mapping[str, ndarray], optional
        Arrays of the client's own model, where training starts from it.
    """
    if not config.reproducible or not order.server_round:
        return ""
    asked = _asked(config, run, replace(order, continues="", packet=b""))
    own_part = [asdict(mechanism), _last_digest(arrays), digest_of(own or {})]
    decided = f"{asked[:-1]}, {json.dumps(own_part, sort_keys=True)[1:]}"
    return hashlib.sha256(decided.encode()).hexdigest()


@lru_cache(maxsize=8)
def _asked(config: RunConfig, run: str, order: Order) -> str:
    """Return what the clients of a round share, as a list in JSON."""
    keys = {key: value for key, value in config.items().items() if key not in _ELSEWHERE}
    shared = [run, order.to_config(), keys, config.learning_rates(order.server_round)]
    return json.dumps(shared, sort_keys=True)


def digest_of(arrays: Mapping[str, NDArray[np.generic]]) -> str:
    """Return a SHA-256 digest of the arrays' names, types, shapes and bits."""
    found = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        found.update(_heading(name, array.dtype, array.shape))
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


@lru_cache(maxsize=4096)
def _heading(name: str, dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> bytes:
    return json.dumps([name, dtype.str, shape]).encode()


# In one process, the clients of a round start from the same objects.
_last_digest = OfLastArrays(digest_of)
