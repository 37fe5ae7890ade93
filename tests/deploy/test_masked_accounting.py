"""What a server works out of the bytes of a masked sum, on rounds of one process.

The attacker is the server. It sees all messages, and may tell each client something else. A test of
uniform words must also find words that are not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations

import numpy as np
import pytest

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.secure_sum.shamir import SHARE_BYTES, combine
from fedlora_flwr.secure_sum.terms import Card
from tests.deploy.masked_heard import SeenRound, Words, chance_of_uniform
from tests.secure_sum.rounds import TERMS, Round

NAMES = [f"device-{number}" for number in range(6)]
SIZE, LEAST = 3000, 1e-6


def upload(place: int) -> Words:
    """Return an upload that is far from uniform: small whole numbers."""
    drawn = np.random.default_rng(place).normal(0, 500, SIZE)
    return drawn.astype(np.int32).view(np.uint32)


def seen(this: Round, gone: tuple[int, ...] = ()) -> SeenRound:
    """Let the clients of a round upload, and return what the server has seen so far."""
    opening = this.share()
    this.masked, sent = {}, {}
    for place, client in this.shared.items():
        kept = client.open_shares(this.terms, opening.sealed_for(place))
        if place not in gone:
            this.masked[place] = kept
            sent[NAMES[place]] = client.masked({"a": upload(place)}, kept)["a"]
    return SeenRound(this.terms, NAMES, [Card.from_bytes(c) for c in this.cards], sent, {})


def packets(given: Mapping[int, Mapping[int, bytes]]) -> dict[str, list[bytes]]:
    nothing = bytes(SHARE_BYTES)
    return {NAMES[p]: [shares.get(i, nothing) for i in range(6)] for p, shares in given.items()}


def parts(names: list[str]) -> Iterator[tuple[str, ...]]:
    for size in range(1, len(names)):
        yield from combinations(names, size)


@pytest.mark.parametrize("gone", [(), (2,)], ids=["whole", "one is gone"])
def test_no_part_of_the_uploads_can_be_read_and_the_whole_sum_can(gone: tuple[int, ...]) -> None:
    this = Round()
    found = seen(this, gone)
    alive = [place for place in range(6) if place not in gone]
    found.revealed = packets(this.reveal(alive))

    names = [NAMES[place] for place in alive]
    chances = [chance_of_uniform(found.without_known_masks(part)) for part in parts(names)]
    opened = found.without_known_masks(names)

    assert min(chances) > LEAST
    assert np.array_equal(opened, sum(upload(place) for place in alive))
    assert chance_of_uniform(opened) < 1e-30


def test_a_server_that_tells_each_half_something_else_opens_nothing() -> None:
    """Three devices are told that the last one uploaded, and three that it is gone."""
    this = Round()
    found = seen(this)
    everybody, few = list(range(6)), list(range(5))
    told = {0: few, 1: few, 2: few, 3: everybody, 4: everybody, 5: everybody}
    given = {place: client.reveal(told[place]) for place, client in this.masked.items()}

    seeds = {place: shares[5] for place, shares in given.items() if 5 in told[place]}
    keys = {place: shares[5] for place, shares in given.items() if 5 not in told[place]}
    assert max(len(seeds), len(keys)) < TERMS.threshold
    found.revealed = packets(given)
    with pytest.raises(InvalidValue, match="shares of one and the same secret"):
        _ = found.secrets
    # It still learns the seeds of the other five, and takes these masks off.
    vars(found)["secrets"] = {**_secrets_of_five(given), NAMES[5]: bytes(32)}
    chances = [chance_of_uniform(found.without_known_masks(part)) for part in parts(NAMES)]
    assert min(chances) > LEAST
    assert chance_of_uniform(found.without_known_masks(NAMES)) > LEAST


def _secrets_of_five(given: Mapping[int, Mapping[int, bytes]]) -> dict[str, bytes]:
    return {
        NAMES[place]: combine({helper: given[helper][place] for helper in range(TERMS.threshold)})
        for place in range(5)
    }


def test_words_that_are_not_uniform_are_found() -> None:
    random = np.random.default_rng(7)
    uniform = random.integers(0, 2**32, SIZE, np.uint32)
    assert chance_of_uniform(uniform) > LEAST
    assert chance_of_uniform(upload(1)) < 1e-30
    # Masks of 31 bits would leave one bit of each word.
    assert chance_of_uniform(uniform >> np.uint32(1)) < LEAST
