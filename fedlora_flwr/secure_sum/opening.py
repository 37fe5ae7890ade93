"""The server's side of a secure sum: it forwards messages and opens one sum."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.secure_sum.masks import mask, public_key
from fedlora_flwr.secure_sum.party import SEALED_BYTES, flat, pair_mask, unflat
from fedlora_flwr.secure_sum.shamir import combine
from fedlora_flwr.secure_sum.terms import Card, Terms, transcript
from fedlora_flwr.wire.limits import Residues

__all__ = ["Opening"]


@dataclass
class Opening:
    """One round's sum, as the server sees it. A client's place is the index of its card.

    Parameters
    ----------
    terms : Terms
        The terms that all clients are told.
    cards : Sequence[bytes]
        The cards of the clients that showed one.

    Raises
    ------
    InvalidValue
        Fewer than N - t clients showed a card.
    """

    terms: Terms
    cards: Sequence[bytes]
    sealed: dict[int, Sequence[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check("clients that showed a card", len(self.cards))

    def take_sealed(self, sealed: Mapping[int, Sequence[bytes]]) -> None:
        """Take what clients sealed for each other. A client that sealed nothing leaves the round.

        Raises
        ------
        InvalidValue
            Fewer than N - t clients are left.
        """
        self._check("clients that shared their keys", len(sealed))
        self.sealed = dict(sealed)

    def sealed_for(self, receiver: int) -> list[bytes]:
        """Return what all clients sealed for one client: `SEALED_BYTES` for each card."""
        gone = bytes(SEALED_BYTES)
        return [
            self.sealed[sender][receiver] if sender in self.sealed and sender != receiver else gone
            for sender in range(len(self.cards))
        ]

    def open(
        self,
        alive: Collection[int],
        shares: Mapping[str, Residues],
        revealed: Mapping[int, Mapping[int, bytes]],
    ) -> dict[str, Residues]:
        """Take the masks off the sum of all uploads.

        Parameters
        ----------
        alive : Collection[int]
            Places of the clients that uploaded.
        shares : Mapping[str, ndarray]
            The sum of their masked uploads modulo 2³².
        revealed : Mapping[int, Mapping[int, bytes]]
            What each client handed out (see `Masked.reveal`), by place.

        Returns
        -------
        dict[str, ndarray]
            The sum modulo 2³².

        Raises
        ------
        InvalidValue
            Fewer than N - t clients uploaded or handed out their shares, or the shares are wrong.
        """
        self._check("clients that uploaded", len(alive))
        self._check("clients that handed out their shares", len(revealed))
        total = flat(shares)
        cards = [Card.from_bytes(card) for card in self.cards]
        script = transcript(self.terms, cards)
        helpers = sorted(revealed)[: self.terms.threshold]
        for place in self.sealed:
            secret = combine({helper: revealed[helper][place] for helper in helpers})
            if place in alive:
                total -= mask(secret, total.size)
                continue
            if public_key(secret) != cards[place].mask_key:
                raise InvalidValue("revealed key of client", place, "the key on its card")
            for other in alive:
                key = cards[other].mask_key
                total -= pair_mask(secret, key, script, other < place, total.size)
        return unflat(total, shares)

    def _check(self, who: str, count: int) -> None:
        if count < (least := self.terms.threshold):
            raise InvalidValue(who, count, f"at least {least} (cohort less dropouts)")
