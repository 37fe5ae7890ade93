"""Passes the messages of a masked sum between clients, and opens the sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedlora_flwr.config import RunConfig
from fedlora_flwr.secure_sum.opening import Opening
from fedlora_flwr.secure_sum.party import SEALED_BYTES, pieces
from fedlora_flwr.secure_sum.shamir import SHARE_BYTES
from fedlora_flwr.secure_sum.terms import CARD_BYTES, Card, Terms
from fedlora_flwr.strategies.secure_sum import Ask
from fedlora_flwr.wire import OPEN_SUM, SEAL_SHARES, SHOW_KEYS, UPLOAD
from fedlora_flwr.wire.limits import Residues
from fedlora_flwr.wire.order import Order


class MaskedSum:
    """The sums of one run.

    Clients of a simulation send no keys, and their uploads are not masked. Such a sum is *ideal*:
    this process sees every upload.

    Parameters
    ----------
    config : RunConfig
        The run.

    Attributes
    ----------
    simulated : bool
        Whether the sum is ideal.
    """

    def __init__(self, config: RunConfig) -> None:
        self.simulated = False
        self._config = config
        self._places: dict[int, int] = {}
        self._opening: Opening | None = None
        self._order = Order()

    def agree(self, ask: Ask, order: Order, nodes: Sequence[int]) -> dict[int, Order]:
        """Let the clients of a round agree on masks.

        Parameters
        ----------
        ask : callable
            Sends one order to each node, and returns the packets of those who answered.
        order : Order
            The round's.
        nodes : Sequence[int]
            The clients asked.

        Returns
        -------
        dict[int, Order]
            What to send to each client that can upload.

        Raises
        ------
        InvalidValue
            More clients are missing than the noise allows for.
        """
        if self.simulated:
            return dict.fromkeys(nodes, order)
        self._order = order
        keys = replace(order, stage=SHOW_KEYS)
        cards = ask(dict.fromkeys(nodes, keys), 0)
        if cards and not any(cards.values()):
            self.simulated = True
            return dict.fromkeys(cards, order)
        terms = Terms.of(order, self._config)
        good = _good_cards(cards, terms)
        self._places = {node: place for place, node in enumerate(good)}
        opening = self._opening = Opening(terms, list(good.values()))
        shown = replace(order, stage=SEAL_SHARES, packet=b"".join(good.values()))
        sealed = ask(dict.fromkeys(good, shown), SEALED_BYTES * len(good))
        opening.take_sealed(
            {self._places[node]: pieces(packet, SEALED_BYTES) for node, packet in sealed.items()}
        )
        upload = replace(order, stage=UPLOAD)
        return {
            node: replace(upload, packet=b"".join(opening.sealed_for(self._places[node])))
            for node in sealed
        }

    def total(
        self, ask: Ask, nodes: Sequence[int], shares: Mapping[str, Residues]
    ) -> dict[str, Residues]:
        """Open the sum of a round.

        Parameters
        ----------
        ask : callable
            As for `agree`.
        nodes : Sequence[int]
            The nodes that uploaded.
        shares : Mapping[str, ndarray]
            The sum of their uploads modulo 2³².

        Returns
        -------
        dict[str, ndarray]
            The sum modulo 2³².

        Raises
        ------
        InvalidValue
            More clients are missing than the noise allows for, or the sum cannot be opened.
        """
        if self.simulated or self._opening is None:
            return dict(shares)
        opening, self._opening = self._opening, None  # A sum is opened once.
        alive = {self._places[node] for node in nodes}
        flags = bytes(place in alive for place in range(len(opening.cards)))
        order = replace(self._order, stage=OPEN_SUM, packet=flags)
        given = ask(dict.fromkeys(nodes, order), SHARE_BYTES * len(flags))
        revealed = {
            self._places[node]: dict(enumerate(pieces(packet, SHARE_BYTES)))
            for node, packet in given.items()
        }
        return opening.open(alive, shares, revealed)


def _good_cards(cards: Mapping[int, bytes], terms: Terms) -> dict[int, bytes]:
    """Leave out the clients whose cards every other client would refuse."""
    found: dict[int, bytes] = {}
    seen: set[bytes] = set()
    for node in sorted(cards):
        if len(cards[node]) != CARD_BYTES:
            continue
        card = Card.from_bytes(cards[node])
        own = {card.identity, card.mask_key, card.seal_key}
        if seen & own or not card.is_signed(terms):
            continue
        seen |= own
        found[node] = cards[node]
    return found
