"""What a device has sent in masked sums, message by message, and what its server makes of it.

The attacker is the server. It sees every byte of all devices, and it leads the exchange.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chisquare  # type: ignore[import-untyped]

from fedlora_flwr.config import RunConfig
from fedlora_flwr.secure_sum.masks import mask
from fedlora_flwr.secure_sum.party import flat, pair_mask, pieces
from fedlora_flwr.secure_sum.shamir import SHARE_BYTES, combine
from fedlora_flwr.secure_sum.terms import CARD_BYTES, Card, Terms, transcript
from fedlora_flwr.wire import ARRAYS, CONFIG, OPEN_SUM, PACKET, SEAL_SHARES, SHOW_KEYS, UPLOAD
from fedlora_flwr.wire.order import Order
from tests.deploy.wire_heard import Heard, arrays_of, part_of

Words = NDArray[np.uint32]


@dataclass(frozen=True)
class Answer:
    """A device's answer to a message of a sum.

    Parameters
    ----------
    run : int
        Flower's number of the run.
    order : Order
        What the server asked.
    start : Mapping[str, ndarray]
        The arrays that it sent.
    packet : bytes
        The bytes for the other clients.
    shares : Mapping[str, ndarray]
        The masked upload.
    chunks : frozenset of bytes
        The bodies of the objects that hold it.
    """

    run: int
    order: Order
    start: Mapping[str, NDArray[Any]]
    packet: bytes
    shares: Mapping[str, Words]
    chunks: frozenset[bytes]


@dataclass
class MaskedHeard(Heard):
    """All that came from one device under a secure sum.

    Parameters
    ----------
    config : RunConfig
        The runs' settings.
    identity : bytes
        The device's public Ed25519 key, as the peers' lists of all devices have it.
    """

    config: RunConfig = field(default_factory=RunConfig)
    identity: bytes = b""

    @classmethod
    def of(cls, heard: Heard, config: RunConfig, identity: bytes) -> MaskedHeard:
        known = {each.name: getattr(heard, each.name) for each in fields(Heard)}
        return cls(**known, config=config, identity=identity)

    def terms(self, order: Order) -> Terms:
        return Terms.of(order, self.config)

    @cached_property
    def answers(self) -> list[Answer]:
        """Each answer that is no error, in the order of the calls."""
        found = []
        for reply in self.pushed.values():
            if reply.kind != "Message" or not reply.parts:
                continue
            asked = self.pulled[reply.message().metadata.reply_to_message_id]
            config, start = part_of(self.pulled, asked, CONFIG), part_of(self.pulled, asked, ARRAYS)
            words, arrays = part_of(self.pushed, reply, CONFIG), part_of(self.pushed, reply, ARRAYS)
            if config is None or start is None or words is None or arrays is None:
                continue  # A query.
            shares = arrays_of(self.pushed, arrays)
            parts = [part for each in arrays.parts for part in self.pushed[each].parts]
            found.append(
                Answer(
                    reply.message().metadata.run_id,
                    Order.from_config(config.items()),
                    arrays_of(self.pulled, start),
                    words.items().get(PACKET, b""),
                    {name: array.view(np.uint32) for name, array in shares.items()},
                    frozenset(self.pushed[part].body for part in parts),
                )
            )
        return found

    def of_stage(self, stage: str) -> list[Answer]:
        return [answer for answer in self.answers if answer.order.stage == stage]


@dataclass
class SeenRound:
    """One round of a masked sum as its server sees it, from recorded bytes alone.

    Parameters
    ----------
    terms : Terms
        The terms of the sum.
    names : list of str
        The devices that showed a card, in the order of the cards.
    cards : list of Card
        The cards.
    uploads : Mapping[str, ndarray]
        The masked words of each device that uploaded, shape (D,).
    revealed : Mapping[str, Sequence[bytes]]
        What each device handed out: `SHARE_BYTES` for each card.
    """

    terms: Terms
    names: list[str]
    cards: list[Card]
    uploads: dict[str, Words]
    revealed: dict[str, list[bytes]]

    @classmethod
    def of(cls, devices: Mapping[str, MaskedHeard], run: int) -> SeenRound:
        found: dict[str, dict[str, Answer]] = {stage: {} for stage in (SHOW_KEYS, UPLOAD, OPEN_SUM)}
        for name, heard in devices.items():
            for stage, by_name in found.items():
                for answer in heard.of_stage(stage):
                    if answer.run == run:
                        assert name not in by_name, "A device answers each stage once."
                        by_name[name] = answer
        shown = {name: answer.packet for name, answer in found[SHOW_KEYS].items()}
        order = _order_of_cards(devices, run)
        names = sorted(shown, key=lambda name: order.index(shown[name]))
        first = found[SHOW_KEYS][names[0]].order
        return cls(
            devices[names[0]].terms(first),
            names,
            [Card.from_bytes(shown[name]) for name in names],
            {name: flat(answer.shares) for name, answer in found[UPLOAD].items()},
            {name: pieces(a.packet, SHARE_BYTES) for name, a in found[OPEN_SUM].items()},
        )

    @cached_property
    def secrets(self) -> dict[str, bytes]:
        """The secret of each device that the handed out shares give: a seed, or a mask key."""
        found = {}
        for place, name in enumerate(self.names):
            shares = {self.names.index(n): given[place] for n, given in self.revealed.items()}
            found[name] = combine(dict(list(shares.items())[: self.terms.threshold]))
        return found

    def without_known_masks(self, chosen: Collection[str]) -> Words:
        """Return the sum of some uploads, less every mask that the server can work out."""
        script = transcript(self.terms, self.cards)
        size = len(next(iter(self.uploads.values())))
        total = np.zeros(size, np.uint32)
        for name in chosen:
            total += self.uploads[name] - mask(self.secrets[name], size)
            own = self.names.index(name)
            for place, other in enumerate(self.names):
                if other not in self.uploads:
                    key = self.cards[own].mask_key
                    total -= pair_mask(self.secrets[other], key, script, own < place, size)
        return total


def chance_of_uniform(words: Words) -> float:
    """Return how likely uniform words have bytes at least as uneven as these (chi-square, 255)."""
    counts = np.bincount(words.view(np.uint8), minlength=256)
    return float(chisquare(counts).pvalue)


def _order_of_cards(devices: Mapping[str, MaskedHeard], run: int) -> list[bytes]:
    """Return all cards of a round, in the order in which the server showed them."""
    (shown,) = {
        answer.order.packet
        for heard in devices.values()
        for answer in heard.of_stage(SEAL_SHARES)
        if answer.run == run
    }
    return pieces(shown, CARD_BYTES)
