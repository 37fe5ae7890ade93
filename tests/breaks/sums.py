"""Breaks of a secure sum: shares of the noise, whole numbers, masks, and the union's promise."""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray
from torch import Tensor

from fedlora_flwr.clients import sharing, sum_exchange
from fedlora_flwr.clients.local_round import LocalRound
from fedlora_flwr.clients.sum_store import SumStore
from fedlora_flwr.clients.trainer import LocalTrainer
from fedlora_flwr.config import RunConfig, trust
from fedlora_flwr.errors import OrderRefused
from fedlora_flwr.privacy.clipping import clip_factors, row_norms
from fedlora_flwr.secure_sum import (
    accounting,
    cohort,
    discrete_gaussian,
    masks,
    party,
    rounding,
    shamir,
    terms,
)
from fedlora_flwr.secure_sum.grid import Grid
from fedlora_flwr.secure_sum.party import Advertised
from fedlora_flwr.secure_sum.terms import Card
from fedlora_flwr.wire.order import Order
from tests.breaks.breaks import caught_by, everywhere

Patch = pytest.MonkeyPatch
GRID = "tests/secure_sum/test_grid.py"
MASKING = "tests/secure_sum/test_masking.py"
SHARING = "tests/clients/test_sharing.py"
MASKED_SUM = "tests/server/test_masked_sum.py"
LOCAL_STEP = "tests/secure_sum/test_local_step.py"
ACCOUNTING = "tests/secure_sum/test_accounting.py"

# --- the noise ---


@caught_by(SHARING, "test_the_shares_are_those_of_the_clients_that_remain")
def shares_of_all_that_were_asked(patch: Patch) -> None:
    """A share is 1/N of the variance, though of N clients some are gone and some collude."""
    everywhere(patch, cohort.honest_shares, lambda asked, dropouts, colluding: asked)


def deviation(patch: Patch, chosen: Any) -> None:
    """Let a share's deviation be what a function makes of σΔ and m."""

    def of(cls: type[Grid], noise_multiplier: float, shares: int, norm: int) -> Grid:
        return cls(norm, max(1, chosen(noise_multiplier * norm, shares)), shares)

    patch.setattr(Grid, "of", classmethod(of))


@caught_by(GRID, "test_the_sum_has_at_least_the_noise_that_is_asked_for[8-1.0]")
def deviation_divided_by_the_shares(patch: Patch) -> None:
    """A share has 1/m of the deviation, and not 1/m of the variance."""
    deviation(patch, lambda whole, shares: math.ceil(whole / shares))


@caught_by(GRID, "test_the_sum_has_at_least_the_noise_that_is_asked_for[100-0.5]")
def shares_rounded_down(patch: Patch) -> None:
    """A share's deviation is rounded down to a whole number."""
    deviation(patch, lambda whole, shares: math.floor(whole / math.sqrt(shares)))


@caught_by(
    "tests/secure_sum/test_discrete_gaussian.py",
    "test_samples_have_the_probabilities_of_the_formula[1]",
)
def noise_of_floats(patch: Patch) -> None:
    """The noise is a rounded floating-point number, which is no discrete Gaussian."""

    def drawn(scale: int, count: int, words: Any = None) -> NDArray[np.int64]:
        return np.rint(np.random.default_rng().normal(0, scale, count)).astype(np.int64)

    everywhere(patch, discrete_gaussian.discrete_gaussian, drawn)


@caught_by(LOCAL_STEP, "test_noise_is_fresh_where_the_run_is_not_reproducible")
def noise_by_the_runs_seed(patch: Patch) -> None:
    """A share's noise follows the run's seed, which the server knows."""
    honest = LocalTrainer._words

    def words(self: LocalTrainer, stream: tuple[object, ...]) -> Any:
        known = replace(self, config=replace(self.config, reproducible=True))
        return honest(known, stream)

    patch.setattr(LocalTrainer, "_words", words)


@caught_by(SHARING, "test_a_sum_with_less_noise_than_the_clients_own_budget_needs_is_refused")
def less_noise_than_the_budget_needs(patch: Patch) -> None:
    """A client shares the noise that the server names, though its own budget needs more."""
    everywhere(
        patch, sharing.agreed, lambda own, order: replace(own, noise_multiplier=order.sum_noise)
    )


# --- whole numbers ---


@caught_by(GRID, "test_no_rounded_record_is_longer_than_the_grid_norm")
def rounded_past_the_norm(patch: Patch) -> None:
    """A record is clipped to Δ and rounded then, which takes it past Δ."""

    def rounded(rows: Tensor, clip_norm: float, norm: int) -> Tensor:
        factors = clip_factors(row_norms(rows), clip_norm, rows.dtype)
        rows.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        return rows.mul_(factors[:, None]).mul_(norm).round_()

    everywhere(patch, rounding.rounded, rounded)


@caught_by(GRID, "test_no_rounded_record_is_longer_than_the_grid_norm")
def sums_are_rounded(patch: Patch) -> None:
    """The sum is rounded, and not each record, so that one moves every coordinate by one more."""

    def clipped(rows: Tensor, clip_norm: float, norm: int) -> Tensor:
        factors = clip_factors(row_norms(rows), clip_norm, rows.dtype)
        rows.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        return rows.mul_(factors[:, None]).mul_(norm)

    everywhere(patch, rounding.rounded, clipped)


@caught_by(GRID, "test_a_grid_that_is_too_coarse_for_its_run_is_refused")
def any_grid(patch: Patch) -> None:
    """A grid is accepted on which the sum of shares is far from a Gaussian."""
    patch.setattr(Grid, "check_slack", lambda *given: None)


@caught_by(ACCOUNTING, "test_the_integers_are_no_less_private_than_is_said[3-2.0]")
def shares_counted_too_large(patch: Patch) -> None:
    """The accountant is told a share of the noise that is one unit larger than what is drawn."""
    patch.setattr(
        Grid,
        "noise_multiplier",
        property(lambda self: math.sqrt(self.shares) * (self.deviation + 1) / self.norm),
    )


@caught_by(ACCOUNTING, "test_slack_is_added_where_there_is_some")
def slack_is_left_out(patch: Patch) -> None:
    """ε leaves out how far the sum of shares is from a Gaussian."""
    patch.setattr(accounting, "widened", lambda epsilon, delta, total: (epsilon, delta))


# --- the union ---


@caught_by(
    MASKED_SUM,
    "test_a_client_shows_no_key_where_its_own_settings_forbid_it[changes2-delta = 0.0005]",
)
def delta_of_one_client(patch: Patch) -> None:
    """δ has to be below 1/n of one client, and not below 1/n of all their records together."""
    patch.setattr(sum_exchange, "check_union", lambda delta, records, unit: None)


@caught_by(
    SHARING, "test_too_small_a_cohort_or_half_an_order_is_refused[order5-shared among 3 clients]"
)
def fewer_shares_than_the_device_asks_for(patch: Patch) -> None:
    """A device takes part where fewer clients share the noise than its file asks for."""
    honest = sum_exchange.shares_of

    def shares(order: Order, config: RunConfig) -> int:
        return honest(order, replace(config, least_shares=1))

    everywhere(patch, honest, shares)


@caught_by(
    "tests/config/test_trust.py",
    "test_what_a_sum_is_not_made_for_is_refused_by_name[local-steps-2]",
)
def several_steps_in_one_sum(patch: Patch) -> None:
    """A client takes several steps for one sum, and the later ones carry a record on unnoised."""
    honest = trust._of_a_sum
    patch.setattr(
        trust, "_of_a_sum", lambda config: (r for r in honest(config) if r[0] != "local_steps")
    )


@caught_by(SHARING, "test_a_round_releases_a_share_and_writes_which")
def number_of_records_beside_the_sum(patch: Patch) -> None:
    """A client tells its number of records, which the sum alone is to tell."""
    shared = LocalRound._shared

    def told(self: LocalRound, shares: Any, summary: Any, records: Any, *rest: Any) -> Any:
        return replace(shared(self, shares, summary, records, *rest), num_examples=len(records))

    patch.setattr(LocalRound, "_shared", told)


# --- masks ---


@caught_by(SHARING, "test_nothing_leaves_a_device_that_nothing_masks")
def uploads_in_the_clear(patch: Patch) -> None:
    """A device uploads to a server that masks nothing, as a simulated client does."""
    patch.setattr(sharing, "in_simulation", lambda: True)


@caught_by(MASKING, "test_a_client_reveals_one_secret_of_each_other_and_none_for_a_smaller_sum")
def sums_of_fewer_clients(patch: Patch) -> None:
    """A client helps to open a sum of fewer than N - t clients."""
    patch.setattr(party, "_check_left", lambda count, threshold: None)


@caught_by(
    "tests/secure_sum/test_smallest_sum.py",
    "test_with_more_dropouts_a_server_could_and_they_are_refused[6-2-0]",
)
def any_number_of_dropouts(patch: Patch) -> None:
    """So many may be gone that a server opens a smaller sum by telling clients different things."""
    everywhere(patch, cohort.check_dropouts, lambda asked, dropouts, colluding: None)


@caught_by(
    MASKING,
    "test_any_shares_as_many_as_the_threshold_give_a_secret_back[000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f]",
)
def fewer_shares_give_a_secret_back(patch: Patch) -> None:
    """One share less than the threshold gives a secret back."""
    honest = shamir.split
    everywhere(patch, honest, lambda secret, threshold, count: honest(secret, threshold - 1, count))


def used_again(patch: Patch, kind: type) -> None:
    """Let the store give a state of one kind out a second time."""
    honest, held = SumStore.take, dict[object, Any]()

    def take(self: SumStore, client: str, run: str, asked: Any) -> Any:
        try:
            found = honest(self, client, run, asked)
        except OrderRefused:
            if asked is kind and client in held:
                return held[client]
            raise
        if asked is kind:
            held[client] = found
        return found

    patch.setattr(SumStore, "take", take)


@caught_by(MASKED_SUM, "test_an_upload_leaves_once_and_in_its_turn_only")
def masks_used_twice(patch: Patch) -> None:
    """Two uploads have the same masks, so their difference has none."""
    used_again(patch, party.Shared)


@caught_by(MASKED_SUM, "test_a_sum_is_opened_once")
def shares_handed_out_twice(patch: Patch) -> None:
    """A client hands out shares for two sums, whose difference is one client's upload."""
    used_again(patch, party.Masked)


@caught_by(MASKING, "test_each_round_has_keys_and_seeds_of_its_own")
def keys_kept_from_round_to_round(patch: Patch) -> None:
    """A client has the same keys in every round, and who learns them in one knows all its masks."""

    def begin(cls: type[Advertised], asked: Any, identity: Ed25519PrivateKey) -> Advertised:
        own = identity.private_bytes_raw()
        mask, seal = (hashlib.sha256(word + own).digest() for word in (b"mask", b"seal"))
        card = Card.signed(identity, asked, masks.public_key(mask), masks.public_key(seal))
        return cls(asked.digest(), mask, seal, card.to_bytes())

    patch.setattr(Advertised, "begin", classmethod(begin))


@caught_by(MASKING, "test_each_round_has_keys_and_seeds_of_its_own")
def seeds_of_32_bits(patch: Patch) -> None:
    """The seed of a client's own mask has 32 bits, which a server can try one by one."""
    short = SimpleNamespace(urandom=lambda size: os.urandom(4) + bytes(size - 4))
    patch.setattr(party, "os", short)


@caught_by(MASKING, "test_the_key_of_two_clients_is_x25519s")
def keys_that_anybody_computes(patch: Patch) -> None:
    """The key of two clients follows from public values, so the server knows their masks."""

    def agreed(private: bytes, public: bytes, context: bytes) -> bytes:
        both = sorted((masks.public_key(private), public))
        return hashlib.sha256(b"".join(both) + context).digest()

    everywhere(patch, masks.agreed_key, agreed)


@caught_by(MASKING, "test_a_stranger_a_double_and_a_changed_key_are_refused")
def strangers_take_part(patch: Patch) -> None:
    """Clients that are not in the device's list take part, and a server may invent them."""
    honest = terms.check_cards
    everywhere(patch, honest, lambda cards, told, peers: honest(cards, told, None))


@caught_by(
    MASKING, "test_clients_that_were_told_different_things_refuse_each_others_cards[{'cohort': 7}]"
)
def cards_without_a_signature(patch: Patch) -> None:
    """A card counts without its client's signature, so a server may replace its keys."""
    patch.setattr(Card, "is_signed", lambda self, told: True)


@caught_by(
    MASKED_SUM, "test_a_server_cannot_change_the_terms_on_the_way[changes2-terms of the sum]"
)
def terms_change_on_the_way(patch: Patch) -> None:
    """A server may name other noise once the clients have agreed on a sum."""
    patch.setattr(party, "_check_terms", lambda agreed, told: None)
