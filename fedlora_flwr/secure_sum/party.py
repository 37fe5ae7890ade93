r"""A client's side of a secure sum: four messages per round, and the secrets kept between them.

The protocol is that of Bonawitz et al. (CCS 2017), in which every client of a round masks with
every other. Between its messages a client is in one of three states, and each has one step:

1. `Advertised`: it drew two keys and showed its card. Given all cards, it shares its mask key and a
   seed of its own among all clients (`Advertised.share`).
2. `Shared`: given the sealed shares of others, it adds its masks to its upload (`Shared.masked`).
3. `Masked`: told which clients uploaded, it hands out one share for each other client: of the seed
   if that client uploaded, otherwise of the mask key (`Masked.reveal`).

*Guarantees.* Where at most c clients of the round side with the server, the server learns at most
one sum of the uploads of all others, over at least N - t clients, and nothing else about them.
The assumptions are that ciphers and signatures hold and that cards are of different clients (see
`fedlora_flwr.secure_sum.terms.check_cards`). The server is not trusted: it may send any client
anything.

*Why one sum.* Each client reveals once. A seed or a key of another needs N - t shares, so at least
H - t of the H = N - c honest clients must give them. To get both of one client the server needs
2(H - t) of H, and H > 2t. So an upload is either in a sum or its masks are known to nobody.

*Why over so many.* An honest client holds shares of at least N - t clients and needs at least as
many that uploaded. So it gives up at most t clients: it got no shares of them and does not mask
with them, or it reveals their keys. A sum leaves an honest client out only if no client in it got
shares of that one, or if H - t clients revealed its key. Let the sum leave out x honest clients, k
of them in the first way. Each of the H - x in it gives up these k, so (H - x)(t - k) + xt shares at
most are left to reveal x - k keys, at H - t each. For x = t + 1 that takes
:math:`H \le t^2 + t + k`, and k is at most t. `check_dropouts` asks for :math:`H > t(t + 2)`, which
excludes it; a larger x needs more. The original protocol has a fifth message for larger t, in which
clients compare lists of the clients that uploaded.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.secure_sum.masks import (
    SEAL_BYTES,
    agreed_key,
    mask,
    new_key,
    public_key,
    seal,
    unseal,
)
from fedlora_flwr.secure_sum.shamir import SECRET_BYTES, SHARE_BYTES, split
from fedlora_flwr.secure_sum.terms import Card, Terms, check_cards, transcript
from fedlora_flwr.wire import PACKET
from fedlora_flwr.wire.limits import Residues

__all__ = [
    "SEALED_BYTES", "Advertised", "Masked", "Shared", "flat", "pair_mask", "pieces", "unflat",
]  # fmt: skip

SEALED_BYTES = 2 * SHARE_BYTES + SEAL_BYTES
"""Length of what one client seals for another: a share of its seed, and one of its mask key."""


@dataclass(frozen=True)
class Advertised:
    """A client that has shown its card.

    Parameters
    ----------
    terms : bytes
        Digest of the terms that it was told.
    mask_private, seal_private : bytes
        The private keys of the card.
    card : bytes
        The card.
    """

    terms: bytes
    mask_private: bytes
    seal_private: bytes
    card: bytes

    @classmethod
    def begin(cls, terms: Terms, identity: Ed25519PrivateKey) -> Advertised:
        """Draw the keys of a round and sign the card that shows them."""
        mask_private, seal_private = new_key(), new_key()
        keys = public_key(mask_private), public_key(seal_private)
        card = Card.signed(identity, terms, *keys)
        return cls(terms.digest(), mask_private, seal_private, card.to_bytes())

    def share(
        self, terms: Terms, cards: Sequence[bytes], peers: Collection[bytes] | None
    ) -> tuple[Shared, list[bytes]]:
        """Check all cards, and seal one share of each secret for every client.

        Parameters
        ----------
        terms : Terms
            The terms that came with this message.
        cards : Sequence[bytes]
            The cards of the round, in one order for all clients.
        peers : Collection[bytes] or None
            See `fedlora_flwr.secure_sum.terms.check_cards`.

        Returns
        -------
        tuple[Shared, list[bytes]]
            The next state, and `SEALED_BYTES` for each card; zeros for the client's own card.

        Raises
        ------
        InvalidValue
            The terms have changed, or the cards cannot be used.
        """
        _check_terms(self.terms, terms)
        shown = [Card.from_bytes(card) for card in cards]
        check_cards(shown, terms, peers)
        if self.card not in cards:
            raise InvalidValue("cards", len(cards), "cards with this client's own among them")
        own, seed = cards.index(self.card), os.urandom(SECRET_BYTES)
        seeds, keys = (
            split(secret, terms.threshold, len(cards)) for secret in (seed, self.mask_private)
        )
        kept = Shared(
            self.terms, transcript(terms, shown), self.mask_private, self.seal_private,
            tuple(cards), own, seed, seeds[own],
        )  # fmt: skip
        return kept, [
            bytes(SEALED_BYTES)
            if other == own
            else seal(kept.sealing_key(own, other), seeds[other] + keys[other])
            for other in range(len(cards))
        ]


@dataclass(frozen=True)
class Shared:
    """A client that has shared its secrets and may upload.

    Parameters
    ----------
    terms : bytes
        Digest of the terms.
    transcript : bytes
        Hash of the terms and all cards, from which every key of the round is derived.
    mask_private, seal_private : bytes
        Its private keys of the round.
    cards : tuple[bytes, ...]
        All cards of the round.
    own : int
        Index of its own card among them.
    seed : bytes
        Seed of its own mask.
    own_share : bytes
        Its own share of the seed.
    """

    terms: bytes
    transcript: bytes
    mask_private: bytes
    seal_private: bytes
    cards: tuple[bytes, ...]
    own: int
    seed: bytes
    own_share: bytes

    def sealing_key(self, sender: int, receiver: int) -> bytes:
        """Return the key of a message that this client sends to another or gets from another."""
        other = receiver if sender == self.own else sender
        way = sender.to_bytes(4, "big") + receiver.to_bytes(4, "big")
        public = Card.from_bytes(self.cards[other]).seal_key
        return agreed_key(self.seal_private, public, b"seal" + self.transcript + way)

    def open_shares(self, terms: Terms, sealed: Sequence[bytes]) -> Masked:
        """Open the shares that the others sealed for this client.

        Parameters
        ----------
        terms : Terms
            The terms that came with this message.
        sealed : Sequence[bytes]
            `SEALED_BYTES` for each card; zeros for a client that has left, and for the client's
            own card.

        Returns
        -------
        Masked
            The state to keep once the upload has left.

        Raises
        ------
        InvalidValue
            The terms have changed, too few clients are left, or a share was not meant for this
            client.
        """
        _check_terms(self.terms, terms)
        if len(sealed) != len(self.cards) or {len(s) for s in sealed} != {SEALED_BYTES}:
            allowed = f"{SEALED_BYTES} bytes for each of the {len(self.cards)} cards"
            raise InvalidValue("sealed shares", len(sealed), allowed)
        seeds, keys = {self.own: self.own_share}, {}
        for sender, content in enumerate(sealed):
            if sender != self.own and any(content):
                both = unseal(self.sealing_key(sender, self.own), content)
                seeds[sender], keys[sender] = both[:SHARE_BYTES], both[SHARE_BYTES:]
        _check_left(len(seeds), terms.threshold)
        return Masked(terms.threshold, self.own, seeds, keys)

    def masked(self, shares: Mapping[str, Residues], kept: Masked) -> dict[str, Residues]:
        """Add this client's masks to its upload: its own, and one for each remaining client.

        Parameters
        ----------
        shares : Mapping[str, ndarray]
            The upload.
        kept : Masked
            What `open_shares` gave.
        """
        vector = flat(shares)
        vector += mask(self.seed, vector.size)
        for other in kept.keys:
            key = Card.from_bytes(self.cards[other]).mask_key
            vector += pair_mask(
                self.mask_private, key, self.transcript, self.own < other, vector.size
            )
        return unflat(vector, shares)


@dataclass(frozen=True)
class Masked:
    """A client that has uploaded.

    Parameters
    ----------
    threshold : int
        N - t: clients that must have uploaded.
    own : int
        Index of its own card.
    seeds, keys : dict[int, bytes]
        Its shares of the seeds and of the mask keys, by the place of each key's client. It holds no
        share of its own key.
    """

    threshold: int
    own: int
    seeds: Mapping[int, bytes]
    keys: Mapping[int, bytes]

    def reveal(self, alive: Collection[int]) -> dict[int, bytes]:
        """Hand out the shares that open the sum over the clients that uploaded.

        Parameters
        ----------
        alive : Collection[int]
            Places of the clients that uploaded, including this client's own.

        Returns
        -------
        dict[int, bytes]
            For each client that this one masked with, and for itself: a share of the seed if that
            client uploaded, otherwise of the mask key. Never both.

        Raises
        ------
        InvalidValue
            No sum may be opened over these clients: this client is missing, one is unknown or came
            twice, or they are too few.
        """
        known = set(alive)
        if self.own not in known or not known <= set(self.seeds) or len(known) < len(alive):
            allowed = f"different ones of {sorted(self.seeds)}, including {self.own}"
            raise InvalidValue("clients that uploaded", sorted(alive), allowed)
        _check_left(len(known), self.threshold)
        return {i: self.seeds[i] if i in known else self.keys[i] for i in self.seeds}


def pair_mask(
    private: bytes, public: bytes, transcript: bytes, first: bool, count: int
) -> Residues:
    """Return the mask that a pair of clients shares, as the first or the second of them adds it.

    Parameters
    ----------
    private, public : bytes
        The private mask key of one client, and the public one of the other. Both clients get the
        same mask.
    transcript : bytes
        Hash of the round's terms and cards.
    first : bool
        Whether the mask is for the client with the lower place. The other client adds the negative,
        so both add up to zero.
    count : int
        Number of entries.
    """
    found = mask(agreed_key(private, public, b"mask" + transcript), count)
    return found if first else -found


def pieces(packet: bytes, length: int) -> list[bytes]:
    """Cut a packet into pieces of one length.

    Raises
    ------
    InvalidValue
        The packet's length is not a multiple of ``length``.
    """
    if not packet or len(packet) % length:
        raise InvalidValue(f"length of {PACKET}", len(packet), f"a multiple of {length} bytes")
    return [packet[i : i + length] for i in range(0, len(packet), length)]


def flat(shares: Mapping[str, Residues]) -> Residues:
    """Put arrays into one new vector, in the order of their names."""
    return np.concatenate([shares[name].ravel() for name in sorted(shares)])


def unflat(vector: Residues, like: Mapping[str, Residues]) -> dict[str, Residues]:
    """Undo `flat`, for arrays of the names and shapes of others."""
    names = sorted(like)
    ends = np.cumsum([like[name].size for name in names])
    parts = np.split(vector, ends[:-1])
    return {n: part.reshape(like[n].shape) for n, part in zip(names, parts, strict=True)}


def _check_terms(agreed: bytes, told: Terms) -> None:
    if agreed != told.digest():
        allowed = "the same round, plan, cohort, noise and grid in all messages of a sum"
        raise InvalidValue("terms of the sum", told.digest().hex()[:16], allowed)


def _check_left(count: int, threshold: int) -> None:
    if count < threshold:
        allowed = f"at least {threshold} (cohort less dropouts)"
        raise InvalidValue("clients left in the sum", count, allowed)
