"""The cost of a masked sum: CPU time and bytes of a client and of the server, over a plain sum.

The real protocol runs here, with real keys, in one process. The network and the start of processes
are not measured. In a deployment, a round then has four messages to each client instead of one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from benchmarks.figures import Figure
from fedlora_flwr.secure_sum.opening import Opening
from fedlora_flwr.secure_sum.party import SEALED_BYTES, Advertised
from fedlora_flwr.secure_sum.shamir import SHARE_BYTES
from fedlora_flwr.secure_sum.terms import CARD_BYTES, Terms


@dataclass(frozen=True)
class Setting:
    """The varied quantities: clients of a round, and numbers in an upload."""

    clients: tuple[int, ...] = (10, 30, 100)
    entries: tuple[int, ...] = (10_000, 300_000)


@dataclass(frozen=True)
class Cost:
    """The cost of a round: CPU seconds of the mean client and of the server, bytes of a client."""

    client: float
    server: float
    up: int
    down: int


def measure(setting: Setting, on_figure: Callable[[Figure], None]) -> None:
    """Run one round for each cell, with as many missing clients as are allowed."""
    for entries in setting.entries:
        costs = {count: cost(count, entries) for count in setting.clients}
        fewest = min(costs)
        first, plain = costs[fewest], 4 * entries / 1e6
        for count, found in costs.items():
            label = f"masks of {count} clients on {entries:,} numbers"
            for who, ours, least in (
                ("a client", found.client, first.client),
                ("the server", found.server, first.server),
            ):
                what = f"{label}: CPU time of {who}"
                on_figure(Figure(what, ours, least, "s", f"{fewest} clients"))
            for way, size in (("up", found.up), ("down", found.down)):
                what = f"{label}: sent {way} per client"
                on_figure(Figure(what, size / 1e6, plain, "MB", "without masks"))


def cost(count: int, entries: int) -> Cost:
    """Measure one round in which the last clients upload nothing."""
    gone = isqrt(count - 1) - 1
    terms = Terms(1, "B", count, gone, 1, 4.0, 1 << 20, 0.1, 1.0)
    people = [Ed25519PrivateKey.generate() for _ in range(count)]
    vector = {"a": np.arange(entries, dtype=np.uint32)}
    clients, server = _Spent(), _Spent()
    with clients:
        advertised = [Advertised.begin(terms, person) for person in people]
    cards = [client.card for client in advertised]
    opening = Opening(terms, cards)
    with clients:
        shared = [client.share(terms, cards, None) for client in advertised]
    opening.take_sealed({place: sealed for place, (_, sealed) in enumerate(shared)})
    kept, sent = {}, {}
    for place in range(count - gone):
        with server:
            received = opening.sealed_for(place)
        with clients:
            kept[place] = shared[place][0].open_shares(terms, received)
            sent[place] = shared[place][0].masked(vector, kept[place])
    with clients:
        revealed = {place: client.reveal(sent) for place, client in kept.items()}
    with server:
        shares = np.zeros_like(vector["a"])
        for own in sent.values():
            shares += own["a"]
        total = opening.open(sent, {"a": shares}, revealed)
    assert np.array_equal(total["a"], vector["a"] * np.uint32(len(sent)))
    up = CARD_BYTES + (SEALED_BYTES + SHARE_BYTES) * count + 4 * entries
    down = (CARD_BYTES + SEALED_BYTES + 1) * count + 4 * entries
    return Cost(clients.seconds / count, server.seconds, up, down)


class _Spent:
    """Adds up the CPU time of the blocks that it is entered for."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._started = time.process_time()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.process_time() - self._started
