"""Who is asked in which round, as a schedule alone."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.recipes import load_recipe, recipe_names
from fedlora_flwr.forecast.participation import participation
from fedlora_flwr.simulations.partitions import Partitions
from fedlora_flwr.strategies.cohort import Turns, cohort_size
from fedlora_flwr.strategies.roster import Listed

Schedule = list[list[str]]


def names(count: int) -> list[str]:
    return [f"client-{number:03d}" for number in range(count)]


def one_round(turns: Turns, there: list[str], size: int, seed: int) -> list[str]:
    roster = Listed(range(len(there)), there.__getitem__)
    drawn = turns.draw(roster, size, np.random.default_rng(seed))
    clients = [roster.name(position) for position in drawn]
    turns.take(clients)
    return clients


def schedule(config: RunConfig) -> Schedule:
    """Draw until nobody is left, or all rounds are done."""
    turns, there, rounds = Turns(config.max_rounds), names(config.num_clients), []
    size = cohort_size(config.num_clients, config.fraction_train)
    for server_round in range(config.num_rounds):
        seed = config.seed * config.num_rounds + server_round
        if not (drawn := one_round(turns, there, size, seed)):
            break
        rounds.append(drawn)
    return rounds


def counts(rounds: Schedule) -> Counter[str]:
    return Counter(client for drawn in rounds for client in drawn)


@pytest.mark.parametrize(
    ("recipe", "clients", "size", "cap"),
    [
        ("paper/la-lora-qnli-as-published", 20, 4, 20),
        ("paper/la-lora-swin-t-cifar100-as-published", 8, 4, 50),
    ],
)
@pytest.mark.parametrize("seed", range(100))
def test_a_tight_cap_gives_each_client_its_share_and_each_round_its_cohort(
    recipe: str, clients: int, size: int, cap: int, seed: int
) -> None:
    rounds = schedule(load_recipe(recipe, [f"seed={seed}"]))
    assert [len(set(drawn)) for drawn in rounds] == [size] * 100
    assert counts(rounds) == dict.fromkeys(names(clients), cap)


@pytest.mark.parametrize("recipe", [name for name in recipe_names() if "la-lora" in name])
def test_every_recipe_with_a_cap_uses_all_its_rounds(recipe: str) -> None:
    planned = participation(load_recipe(recipe, []))
    assert (planned.last_round, planned.ends_early) == (100, False)
    assert planned.least == planned.most == planned.mean


def test_every_block_of_rounds_asks_every_client_once_in_an_order_by_chance() -> None:
    rounds = schedule(load_recipe("paper/la-lora-qnli-as-published", []))
    blocks = [rounds[start : start + 5] for start in range(0, 100, 5)]
    assert all(counts(block) == dict.fromkeys(names(20), 1) for block in blocks)
    assert len({str(block) for block in blocks}) == len(blocks)


@given(
    clients=st.integers(1, 12),
    fraction=st.floats(0.05, 1.0),
    rounds=st.integers(1, 15),
    data=st.data(),
)
def test_what_is_planned_is_what_is_drawn(
    clients: int, fraction: float, rounds: int, data: st.DataObject
) -> None:
    config = RunConfig.of(
        {
            "num-clients": clients,
            "fraction-train": fraction,
            "num-rounds": rounds,
            "max-rounds": data.draw(st.integers(1, rounds)),
        }
    )
    planned, found = participation(config), schedule(config)
    joined = [counts(found)[client] for client in names(clients)]
    assert (min(joined), max(joined)) == (planned.least, planned.most)
    assert sum(joined) == pytest.approx(planned.mean * clients)
    assert len(found) == planned.last_round
    # Only the last cohort may be smaller, where the rest does not fill it.
    assert {len(drawn) for drawn in found[:-1]} <= {planned.cohort}


def test_without_a_cap_chance_alone_decides() -> None:
    config = RunConfig.of({"num-clients": 8, "fraction-train": 0.5, "num-rounds": 400})
    rounds = schedule(config)
    assert participation(config).least is None
    assert participation(config).mean == 200
    # 200 are expected of each, with a standard deviation of 10.
    assert all(160 < count < 240 for count in counts(rounds).values())
    # Two rounds in a row have two clients in common on average, which turns would not allow.
    common = [len({*a} & {*b}) for a, b in zip(rounds[::2], rounds[1::2], strict=True)]
    assert np.mean(common) == pytest.approx(2, abs=0.3)


def test_a_client_that_has_spent_its_budget_is_not_drawn() -> None:
    turns, there = Turns(), names(6)
    turns.spend("client-002")
    drawn = {client for seed in range(50) for client in one_round(turns, there, 3, seed)}
    assert drawn == {*there} - {"client-002"}


def test_a_client_that_joins_late_does_not_take_every_round() -> None:
    turns, there = Turns(50), names(8)
    for seed in range(12):
        one_round(turns, there, 2, seed)
    rounds = [one_round(turns, [*there, "late"], 3, seed) for seed in range(30)]
    assert counts(rounds) == dict.fromkeys([*there, "late"], 10)


def test_a_client_that_was_away_gets_its_share() -> None:
    turns, there = Turns(10), names(4)
    rounds = [one_round(turns, there, 2, seed=0)]
    rounds += [one_round(turns, there[1:], 2, seed) for seed in range(6)]
    rounds += [one_round(turns, there, 2, seed) for seed in range(13)]
    assert counts(rounds) == dict.fromkeys(there, 10)
    assert {len(drawn) for drawn in rounds} == {2}


@pytest.mark.parametrize(
    ("clients", "fraction", "least", "size"),
    [(100, 0.29, 1, 29), (20, 0.2, 1, 4), (7, 0.5, 1, 3), (3, 0.1, 2, 2), (3, 0.1, 5, 3)],
)
def test_a_cohort_is_the_share_rounded_down(
    clients: int, fraction: float, least: int, size: int
) -> None:
    assert cohort_size(clients, fraction, least) == size


def as_listed(
    turns: Turns, names: list[str], size: int, generator: np.random.Generator, cap: int
) -> list[str]:
    """Draw as earlier versions did, from a list of all clients that may be asked."""
    able = [name for name in names if name not in turns._done]
    if size >= len(able):
        return able
    if not cap:
        drawn = generator.choice(len(able), size, replace=False).tolist()
    else:
        shuffled = generator.permutation(len(able)).tolist()
        drawn = sorted(shuffled, key=lambda i: turns._taken[able[i]])[:size]
    return [able[i] for i in sorted(drawn)]


@pytest.mark.parametrize("cap", [0, 3])
@pytest.mark.parametrize("clients", [7, 40, 20_000])
def test_a_simulation_draws_as_if_all_clients_were_listed(clients: int, cap: int) -> None:
    turns, there = Turns(cap), Partitions(clients)
    names, draw = [there.name(i) for i in range(clients)], np.random.default_rng(clients)
    for seed in range(12):
        size = int(draw.integers(1, clients // 2))
        own, old = np.random.default_rng(seed), np.random.default_rng(seed)
        expected = as_listed(turns, names, size, old, cap)
        found = [there.name(i) for i in turns.draw(there, size, own)]
        assert found == expected
        assert own.integers(2**60) == old.integers(2**60)  # Both have drawn as often.
        turns.take(found)
        for client in found[:1]:
            turns.spend(client)


@pytest.mark.parametrize("cap", [0, 4])
def test_a_state_continues_to_draw_as_the_turns_that_it_was_taken_from(cap: int) -> None:
    turns, again, there = Turns(cap), Turns(cap), Partitions(30)
    for seed in range(9):
        drawn = turns.draw(there, 10, np.random.default_rng(seed))
        turns.take(there.name(i) for i in drawn)
        turns.spend(there.name(seed))
        again.load_state_dict(json.loads(json.dumps(turns.state_dict())))
        left = [t.left(there) for t in (turns, again)]
        assert left[0] == left[1]
        more = [t.draw(there, 10, np.random.default_rng(99)) for t in (turns, again)]
        assert more[0] == more[1]
