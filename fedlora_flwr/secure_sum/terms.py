"""The terms that all clients of a secure sum must share, and the cards that they show."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import astuple, dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.secure_sum.cohort import check_dropouts
from fedlora_flwr.secure_sum.masks import KEY_BYTES
from fedlora_flwr.wire.order import Order

__all__ = ["CARD_BYTES", "Card", "Terms", "check_cards", "transcript"]

_SIGNATURE_BYTES = 64
CARD_BYTES = 3 * KEY_BYTES + _SIGNATURE_BYTES


@dataclass(frozen=True)
class Terms:
    """The terms of one round's sum, as the server told them to a client.

    Every key of the round is derived from the terms, so clients that were told different ones
    cannot read each other's messages, and nothing is opened. The terms need no number of the run:
    replaying the card of another exchange is useless, because only its owner could seal shares with
    it, and the owner has forgotten its keys.

    Parameters
    ----------
    server_round : int
        Round, from 1.
    plan : str
        The round's component plan, as in the order.
    cohort : int
        N: clients asked.
    dropouts : int
        t: clients that may be missing from the opened sum.
    colluding : int
        c: clients that may side with the server.
    noise_multiplier : float
        σ of the sum.
    grid_norm : int
        Δ = C/γ (see `fedlora_flwr.secure_sum.grid`).
    sample_rate : float
        q.
    clip_norm : float
        C.
    clip_weight_a, clip_weight_b, clip_weight_head : float
        Weights of the parts in the joint clip.

    Raises
    ------
    InvalidValue
        The masks cannot keep the promise with this many dropouts (see `check_dropouts`).
    """

    server_round: int
    plan: str
    cohort: int
    dropouts: int
    colluding: int
    noise_multiplier: float
    grid_norm: int
    sample_rate: float
    clip_norm: float
    clip_weight_a: float = 1.0
    clip_weight_b: float = 1.0
    clip_weight_head: float = 1.0

    def __post_init__(self) -> None:
        check_dropouts(self.cohort, self.dropouts, self.colluding)

    @classmethod
    def of(cls, order: Order, config: RunConfig) -> Terms:
        """Return the terms that a client, or the server, gets from an order and its own settings.

        Raises
        ------
        InvalidValue
            The masks cannot keep the promise with this many dropouts.
        """
        return cls(
            order.server_round, order.plan, order.cohort, config.dropouts, config.colluding,
            order.sum_noise, order.grid_norm, config.sample_rate, config.clip_norm,
            config.clip_weight_a, config.clip_weight_b, config.clip_weight_head,
        )  # fmt: skip

    @property
    def threshold(self) -> int:
        """N - t: the least number of clients in an opened sum. It takes as many shares to open."""
        return self.cohort - self.dropouts

    def digest(self) -> bytes:
        """Return a hash of the terms, the same on every machine."""
        values = [v.hex() if isinstance(v, float) else v for v in astuple(self)]
        return hashlib.sha256(json.dumps(["terms", *values]).encode()).digest()


@dataclass(frozen=True)
class Card:
    """A client shows its card to all others: two keys of this round, and its signature of them.

    Parameters
    ----------
    mask_key : bytes
        Public key from which masks are derived.
    seal_key : bytes
        Public key with which others seal the shares for this client.
    identity : bytes
        Public Ed25519 key of the client, the same in all rounds.
    signature : bytes
        Its signature of the terms and of both keys.
    """

    mask_key: bytes
    seal_key: bytes
    identity: bytes
    signature: bytes

    @classmethod
    def signed(
        cls, identity: Ed25519PrivateKey, terms: Terms, mask_key: bytes, seal_key: bytes
    ) -> Card:
        """Make the card of a client in a round."""
        signature = identity.sign(_statement(terms, mask_key, seal_key))
        return cls(mask_key, seal_key, identity.public_key().public_bytes_raw(), signature)

    @classmethod
    def from_bytes(cls, content: bytes) -> Card:
        """Read a card.

        Raises
        ------
        InvalidValue
            The content is not `CARD_BYTES` long.
        """
        if len(content) != CARD_BYTES:
            raise InvalidValue("length of a card", len(content), f"{CARD_BYTES} bytes")
        first, second, third = (content[i : i + KEY_BYTES] for i in range(0, 3 * KEY_BYTES, 32))
        return cls(first, second, third, content[3 * KEY_BYTES :])

    def to_bytes(self) -> bytes:
        """Return what `from_bytes` reads, `CARD_BYTES` long."""
        return self.mask_key + self.seal_key + self.identity + self.signature

    def is_signed(self, terms: Terms) -> bool:
        """Tell whether the card's identity signed it for these terms."""
        try:
            Ed25519PublicKey.from_public_bytes(self.identity).verify(
                self.signature, _statement(terms, self.mask_key, self.seal_key)
            )
        except (InvalidSignature, ValueError):
            return False
        return True


def check_cards(cards: Sequence[Card], terms: Terms, peers: Collection[bytes] | None) -> None:
    """Refuse cards with which the sum could be over fewer clients than it seems.

    Parameters
    ----------
    cards : Sequence[Card]
        All cards of the round.
    terms : Terms
        The terms that this client was told.
    peers : Collection[bytes] or None
        Identities of the clients that may take part. None accepts any client, and so trusts the
        server not to invent clients.

    Raises
    ------
    InvalidValue
        There are too few or too many cards; or one is not signed, is of a client that is not among
        the peers, or came twice.
    """
    least, most = terms.threshold, terms.cohort
    if not least <= len(cards) <= most:
        allowed = f"from {least} (cohort less dropouts) to {most} (cohort)"
        raise InvalidValue("clients of a sum", len(cards), allowed)
    for card in cards:
        if not card.is_signed(terms):
            allowed = "a card that its client signed for this round, cohort, noise and grid"
            raise InvalidValue("card of client", card.identity.hex(), allowed)
        if peers is not None and card.identity not in peers:
            allowed = f"one of the {len(peers)} in this client's list of peers"
            raise InvalidValue("identity of a client", card.identity.hex(), allowed)
    keys = [key for card in cards for key in (card.mask_key, card.seal_key)]
    if len(set(keys)) < len(keys) or len({card.identity for card in cards}) < len(cards):
        raise InvalidValue("cards", len(cards), "cards of different clients with different keys")


def transcript(terms: Terms, cards: Sequence[Card]) -> bytes:
    """Return a hash of the terms and of all cards in their order."""
    return hashlib.sha256(
        b"cards" + terms.digest() + b"".join(card.to_bytes() for card in cards)
    ).digest()


def _statement(terms: Terms, mask_key: bytes, seal_key: bytes) -> bytes:
    return b"fedlora secure sum" + terms.digest() + mask_key + seal_key
