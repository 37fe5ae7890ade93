"""A round of a secure sum as an honest server leads it, one method for each message to all."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from fedlora_flwr.secure_sum.opening import Opening
from fedlora_flwr.secure_sum.party import Advertised, Masked, Shared
from fedlora_flwr.secure_sum.terms import Terms

Residues = NDArray[np.uint32]
TERMS = Terms(3, "B", 6, 1, 1, 2.5, 4096, 0.1, 1.0)


def upload(seed: int) -> dict[str, Residues]:
    random = np.random.default_rng(seed)
    shapes = {"b": (3, 4), "a": (5,), "num-examples": (1,)}
    return {n: random.integers(0, 2**32, s, np.uint32) for n, s in shapes.items()}


class Round:
    """Six clients and an honest server; each method is one message to all."""

    def __init__(self, terms: Terms = TERMS, clients: int = 6) -> None:
        self.terms = terms
        self.people = [Ed25519PrivateKey.generate() for _ in range(clients)]
        self.advertised = [Advertised.begin(terms, person) for person in self.people]
        self.cards = [client.card for client in self.advertised]
        self.peers = frozenset(p.public_key().public_bytes_raw() for p in self.people)

    def share(self, gone: Collection[int] = ()) -> Opening:
        opening = Opening(self.terms, self.cards)
        self.shared: dict[int, Shared] = {}
        sealed: dict[int, Sequence[bytes]] = {}
        for place, client in enumerate(self.advertised):
            if place not in gone:
                found = client.share(self.terms, self.cards, self.peers)
                self.shared[place], sealed[place] = found
        opening.take_sealed(sealed)
        return opening

    def upload(
        self, opening: Opening, gone: Collection[int] = ()
    ) -> dict[int, dict[str, Residues]]:
        self.masked: dict[int, Masked] = {}
        sent = {}
        for place, client in self.shared.items():
            kept = client.open_shares(self.terms, opening.sealed_for(place))
            if place not in gone:
                self.masked[place] = kept
                sent[place] = client.masked(upload(place), kept)
        return sent

    def reveal(
        self, alive: Collection[int], gone: Collection[int] = ()
    ) -> dict[int, Mapping[int, bytes]]:
        return {p: c.reveal(alive) for p, c in self.masked.items() if p not in gone}


def add_shares(uploads: Iterable[Residues]) -> Residues:
    """Add uploads modulo 2³²."""
    total: Residues = np.sum(list(uploads), axis=0, dtype=np.uint32)
    return total


def summed(sent: Mapping[int, Mapping[str, Residues]]) -> dict[str, Residues]:
    """Add the uploads of all places up, as a server does that keeps none."""
    first = next(iter(sent.values()))
    return {name: add_shares(upload[name] for upload in sent.values()) for name in first}


def total(places: Collection[int]) -> dict[str, Residues]:
    uploads = [upload(place) for place in places]
    return {n: np.sum([u[n] for u in uploads], axis=0, dtype=np.uint32) for n in uploads[0]}


def same(first: Mapping[str, Residues], second: Mapping[str, Residues]) -> bool:
    return all(np.array_equal(first[name], second[name]) for name in second)
