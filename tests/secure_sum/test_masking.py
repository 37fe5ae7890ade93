"""The masks of a secure sum: what is opened, what is refused, and what a server can force."""

from __future__ import annotations

import hmac
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.secure_sum.masks import agreed_key, mask
from fedlora_flwr.secure_sum.party import Advertised
from fedlora_flwr.secure_sum.shamir import SHARE_BYTES, combine, split
from tests.secure_sum.rounds import TERMS, Round, same, summed, total


@pytest.mark.parametrize(
    ("before", "uploading", "revealing"),
    [((), (), ()), ((2,), (), ()), ((), (0,), ()), ((), (), (5,))],
    ids=["nobody is gone", "one before sharing", "one before uploading", "one before revealing"],
)
def test_the_sum_of_those_who_uploaded_is_opened_bit_for_bit(
    before: tuple[int, ...], uploading: tuple[int, ...], revealing: tuple[int, ...]
) -> None:
    this = Round()
    opening = this.share(before)
    sent = this.upload(opening, uploading)

    found = opening.open(sent, summed(sent), this.reveal(sent, revealing))

    assert same(found, total(sent))


@pytest.mark.parametrize("when", ["sharing", "uploading", "revealing"])
def test_nothing_is_opened_where_two_are_gone_and_one_was_allowed_for(when: str) -> None:
    this, gone = Round(), (1, 4)

    def whole() -> None:
        opening = this.share(gone if when == "sharing" else ())
        sent = this.upload(opening, gone if when == "uploading" else ())
        opening.open(sent, summed(sent), this.reveal(sent, gone if when == "revealing" else ()))

    with pytest.raises(InvalidValue, match="at least 5"):
        whole()


def test_an_upload_looks_uniform() -> None:
    """Bits of 3,000 masked zeros: each is one in half of the cases, and none repeats another's."""
    zeros = {"a": np.zeros(3000, np.uint32)}
    this = Round()
    opening = this.share()
    kept = {p: c.open_shares(TERMS, opening.sealed_for(p)) for p, c in this.shared.items()}
    masked = np.array([this.shared[p].masked(zeros, kept[p])["a"] for p in kept])

    bits = np.unpackbits(masked.view(np.uint8), axis=1)

    deviation = 0.5 / bits.shape[1] ** 0.5
    assert (abs(bits.mean(1) - 0.5) < 5 * deviation).all()
    for i, j in combinations(range(6), 2):
        assert abs((bits[i] != bits[j]).mean() - 0.5) < 5 * deviation


def test_all_others_together_do_not_take_off_one_clients_masks() -> None:
    """What one colluding client and the server know is not enough, as it is not N - t."""
    this = Round()
    opening = this.share()
    sent = this.upload(opening)
    revealed = this.reveal(sent)

    with pytest.raises(InvalidValue, match="at least 5"):
        opening.open({0}, sent[0], revealed)
    few = {place: revealed[place][0] for place in range(4)}
    with pytest.raises(InvalidValue, match="shares of one and the same secret"):
        combine(few)


def test_a_client_reveals_one_secret_of_each_other_and_none_for_a_smaller_sum() -> None:
    this = Round()
    this.upload(this.share())
    client = this.masked[0]

    given = client.reveal([0, 1, 2, 3, 4])

    assert given[5] == client.keys[5]
    assert all(given[i] == client.seeds[i] for i in range(5))
    for alive in ([0, 1, 2, 3], [1, 2, 3, 4, 5], [0, 1, 2, 3, 6], [0, 1, 2, 3, 3]):
        with pytest.raises(InvalidValue, match="clients"):
            client.reveal(alive)


@pytest.mark.parametrize(
    "change",
    [
        {"cohort": 7}, {"noise_multiplier": 2.0}, {"grid_norm": 2048}, {"dropouts": 0},
        {"colluding": 0}, {"server_round": 4}, {"plan": "A"},
        {"sample_rate": 0.2}, {"clip_norm": 2.0}, {"clip_weight_a": 2.0},
        {"clip_weight_b": 2.0}, {"clip_weight_head": 2.0},
    ],
    ids=str,
)  # fmt: skip
def test_clients_that_were_told_different_things_refuse_each_others_cards(
    change: dict[str, object],
) -> None:
    this, other = Round(), Round(replace(TERMS, **change))  # type: ignore[arg-type]

    with pytest.raises(InvalidValue, match="signed for this round"):
        this.advertised[0].share(TERMS, [*this.cards[:5], other.cards[5]], None)
    with pytest.raises(InvalidValue, match="terms of the sum"):
        this.advertised[0].share(other.terms, this.cards, None)


def test_a_stranger_a_double_and_a_changed_key_are_refused() -> None:
    this, stranger = Round(), Advertised.begin(TERMS, Ed25519PrivateKey.generate())
    client = this.advertised[0]
    again = Advertised.begin(TERMS, this.people[4]).card
    swapped = stranger.card[:32] + this.cards[5][32:]

    for wrong, why in (
        ([*this.cards[:5], stranger.card], "one of the 6 in this client's list of peers"),
        ([*this.cards[:5], again], "different clients"),
        ([*this.cards[:5], this.cards[4]], "different clients"),
        ([*this.cards[:5], swapped], "signed"),
        ([*this.cards, again], "from 5"),
        (this.cards[:4], "from 5"),
        (this.cards[1:], "this client's own"),
    ):
        with pytest.raises(InvalidValue, match=why):
            client.share(TERMS, wrong, this.peers)
    client.share(TERMS, [*this.cards[:5], stranger.card], None)


def test_shares_that_are_too_few_or_sealed_for_somebody_else_are_refused() -> None:
    this = Round()
    opening = this.share()
    client, mine, others = this.shared[0], opening.sealed_for(0), opening.sealed_for(1)
    gone = bytes(len(mine[0]))

    for sealed, why in (
        ([mine[0], others[2], *mine[2:]], "sealed shares"),
        ([mine[0], mine[1], mine[3], mine[2], *mine[4:]], "sealed shares"),
        ([gone, gone, gone, *mine[3:]], "at least 5"),
        (mine[:5], "each of the 6 cards"),
        ([mine[0], mine[1][:-1], *mine[2:]], "148 bytes"),
    ):
        with pytest.raises(InvalidValue, match=why):
            client.open_shares(TERMS, sealed)


def test_a_wrong_key_of_a_client_that_is_gone_is_noticed() -> None:
    this = Round()
    opening = this.share()
    sent = this.upload(opening, gone=(5,))
    revealed = {p: dict(given) for p, given in this.reveal(sent).items()}
    other = split(bytes(32), 5, 6)
    for place, given in revealed.items():
        given[5] = other[place]

    with pytest.raises(InvalidValue, match="the key on its card"):
        opening.open(sent, summed(sent), revealed)


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32, bytes(range(32))], ids=bytes.hex)
def test_any_shares_as_many_as_the_threshold_give_a_secret_back(secret: bytes) -> None:
    shares = split(secret, 3, 5)

    for chosen in combinations(range(5), 3):
        assert combine({i: shares[i] for i in chosen}) == secret
    assert {len(share) for share in shares} == {SHARE_BYTES}
    for pair in combinations(range(5), 2):
        with pytest.raises(InvalidValue):  # Wrong with a probability of 1 - 2⁻²⁶⁵.
            combine({i: shares[i] for i in pair})


def test_each_round_has_keys_and_seeds_of_its_own() -> None:
    """Else two uploads have the same masks, and a server that saw one round knows the next."""
    people = [Ed25519PrivateKey.generate() for _ in range(6)]
    secrets: dict[str, list[bytes]] = {"mask": [], "seal": [], "seed": []}
    for _ in range(2):
        clients = [Advertised.begin(TERMS, person) for person in people]
        cards = [client.card for client in clients]
        for client in clients:
            shared, _sealed = client.share(TERMS, cards, None)
            secrets["mask"].append(client.mask_private)
            secrets["seal"].append(client.seal_private)
            secrets["seed"].append(shared.seed)

    for drawn in secrets.values():
        assert len(set(drawn)) == 12
        # And no byte of them is always the same.
        assert all(len(set(column)) > 1 for column in zip(*drawn, strict=True))


def test_the_key_of_two_clients_is_x25519s() -> None:
    """RFC 7748, section 6.1, then HKDF by RFC 5869: public values alone give it to nobody."""
    private = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    public = bytes.fromhex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
    secret = bytes.fromhex("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")

    extracted = hmac.digest(bytes(32), secret, "sha256")
    for context in (b"mask of a round", b"seal of a round"):
        expected = hmac.digest(extracted, context + b"\1", "sha256")
        assert agreed_key(private, public, context) == expected


def test_masks_are_chacha20s() -> None:
    """RFC 8439, appendix A.1, test vector 1: the key, nonce and counter are zero."""
    first = bytes.fromhex("76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7")

    assert mask(bytes(32), 8).tobytes() == first
