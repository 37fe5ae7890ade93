from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from fedlora_flwr.errors import FederationAborted, InvalidValue
from fedlora_flwr.simulations.local_grid import LocalGrid
from fedlora_flwr.strategies import FedLoRA
from fedlora_flwr.strategies.cohort import wait_for_nodes
from tests.strategies.tiny import (
    Asked,
    Fleet,
    Tiny,
    arrays_of,
    declined,
    honest,
    record_of,
    reply_of,
    start_arrays,
)

ROUNDS = 3


def cohorts(seed: int, bridged: bool = True, kind: type[LocalGrid] = LocalGrid) -> list[list[int]]:
    tiny = Tiny(8, bridged=bridged, kind=kind)
    tiny.run(FedLoRA(fraction_train=0.5, seed=seed), num_rounds=ROUNDS)
    return [tiny.cohort(server_round) for server_round in range(1, ROUNDS + 1)]


def test_cohorts_follow_the_seed_though_node_ids_are_random() -> None:
    drawn = cohorts(seed=3)
    assert cohorts(seed=3) == drawn
    assert [len(cohort) for cohort in drawn] == [4] * ROUNDS


@pytest.mark.parametrize("seed", range(4))
def test_clients_that_are_asked_who_they_are_make_the_same_cohorts(seed: int) -> None:
    assert cohorts(seed, kind=Fleet) == cohorts(seed)


def test_another_seed_draws_other_cohorts() -> None:
    assert len({str(cohorts(seed)) for seed in range(4)}) == 4


def test_cohorts_differ_between_rounds() -> None:
    assert len({str(cohort) for cohort in cohorts(seed=0)}) > 1


def test_every_client_is_drawn_equally_often() -> None:
    tiny = Tiny(6)
    tiny.run(FedLoRA(fraction_train=0.5, seed=1), num_rounds=120)
    counts = [sum(entry.partition == p for entry in tiny.asked) for p in range(6)]
    # 60 are expected of each, with a standard deviation of 5.5.
    assert sum(counts) == 360
    assert all(38 <= count <= 82 for count in counts)


@pytest.mark.parametrize(("fraction", "size"), [(1.0, 8), (0.5, 4), (0.1, 2), (0.99, 7)])
def test_the_size_of_a_cohort(fraction: float, size: int) -> None:
    tiny = Tiny(8)
    tiny.run(FedLoRA(fraction_train=fraction))
    assert len(tiny.cohort(1)) == size


def test_clients_that_do_not_say_who_they_are_still_work(
    caplog: pytest.LogCaptureFixture,
) -> None:
    drawn = cohorts(seed=0, bridged=False, kind=Fleet)
    assert [len(cohort) for cohort in drawn] == [4] * ROUNDS
    warnings = [r for r in caplog.records if "do not tell their identity" in r.getMessage()]
    assert len(warnings) == 1
    assert warnings[0].levelno == logging.WARNING


def test_a_crashed_client_is_named_where_it_said_who_it_is() -> None:
    def answer(asked: Asked) -> RecordDict:
        raise RuntimeError("no memory")

    with pytest.raises(FederationAborted, match=r"partition-00000\d: RuntimeError: no memory"):
        Tiny(4, answer).run(FedLoRA(fraction_train=0.5))


def ran(tiny: Tiny, strategy: FedLoRA, num_rounds: int) -> list[list[int]]:
    """Run, and return the cohorts of the rounds that took place."""
    tiny.run(strategy, num_rounds)
    return [tiny.cohort(n) for n in range(1, max(e.server_round for e in tiny.asked) + 1)]


@pytest.mark.parametrize("bridged", [True, False])
def test_a_cap_gives_everybody_the_same_rounds_and_then_ends_the_run(bridged: bool) -> None:
    kind = LocalGrid if bridged else Fleet
    tiny, strategy = (
        Tiny(6, bridged=bridged, kind=kind),
        FedLoRA(fraction_train=0.5, max_rounds=3, seed=1),
    )
    with tiny.grid() as grid:
        result = strategy.start(
            grid, record_of(start_arrays()), 20, evaluate_fn=lambda *_: MetricRecord({"loss": 1.0})
        )
    counts = Counter(entry.partition for entry in tiny.asked)
    assert counts == dict.fromkeys(range(6), 3)
    assert [len(tiny.cohort(n)) for n in range(1, 7)] == [3] * 6
    assert strategy.finished
    # What Flower returns of rounds that took place.
    assert list(result.train_metrics_clientapp) == list(range(1, 7))
    assert list(result.evaluate_metrics_serverapp) == list(range(7))
    assert set(result.arrays) == set(start_arrays())


def test_a_cap_without_sampling_ends_the_run_after_as_many_rounds() -> None:
    assert ran(Tiny(3), FedLoRA(max_rounds=2), num_rounds=9) == [[0, 1, 2]] * 2


def test_a_client_that_fails_has_had_its_turn() -> None:
    def answer(asked: Asked) -> RecordDict:
        if asked.partition == 0:
            raise RuntimeError("no memory")
        return honest(asked)

    cohorts = ran(Tiny(4, answer), FedLoRA(fraction_train=0.5, max_rounds=5), num_rounds=10)
    assert Counter(p for cohort in cohorts for p in cohort) == dict.fromkeys(range(4), 5)


def test_a_client_whose_budget_is_spent_is_not_asked_again() -> None:
    """A device may have less left than the server's cap, from earlier runs of a lifetime."""

    def answer(asked: Asked) -> RecordDict:
        return declined(asked.partition) if asked.partition in (2, 5) else honest(asked)

    cohorts = ran(Tiny(6, answer), FedLoRA(fraction_train=0.5), num_rounds=12)
    counts = Counter(p for cohort in cohorts for p in cohort)
    assert (counts[2], counts[5]) == (1, 1)
    assert [len(cohort) for cohort in cohorts] == [3] * 12


def test_the_run_is_complete_once_every_client_has_declined() -> None:
    def answer(asked: Asked) -> RecordDict:
        return declined(asked.partition) if asked.server_round > 2 else honest(asked)

    tiny, strategy = Tiny(3, answer), FedLoRA()
    result = tiny.run(strategy, num_rounds=9)
    assert max(entry.server_round for entry in tiny.asked) == 3
    report = strategy.last_round
    assert report is not None
    assert (report.server_round, len(report.declined), report.uploads) == (3, 3, [])
    # The round in which all declined leaves the model as it was.
    for name, array in arrays_of(result.arrays).items():
        np.testing.assert_array_equal(array, tiny.received(3)[name])


def test_a_cohort_that_declines_at_once_does_not_end_a_run_that_others_can_train() -> None:
    def answer(asked: Asked) -> RecordDict:
        return declined(asked.partition) if asked.server_round == 1 else honest(asked)

    cohorts = ran(Tiny(8, answer), FedLoRA(fraction_train=0.5), num_rounds=3)
    assert {*cohorts[1], *cohorts[2]} == {*range(8)} - {*cohorts[0]}


@pytest.mark.parametrize("num_rounds", [1, 5])
def test_a_run_that_nobody_could_train_is_not_complete(num_rounds: int) -> None:
    with pytest.raises(FederationAborted, match="no client sent arrays"):
        Tiny(4, lambda asked: declined(asked.partition)).run(
            FedLoRA(fraction_train=0.5), num_rounds
        )


def test_a_negative_cap_is_refused() -> None:
    with pytest.raises(InvalidValue, match="max_rounds"):
        FedLoRA(max_rounds=-1)


class Coming(LocalGrid):
    """Nodes come and go: who is there depends on how often somebody has looked."""

    there: list[set[int]]

    def get_node_ids(self) -> Iterable[int]:
        now = self.there.pop(0) if len(self.there) > 1 else self.there[0]
        return [node for partition, node in enumerate(self._nodes) if partition in now]


def test_a_client_that_was_offline_gets_its_share_when_it_is_back() -> None:
    tiny, everyone = Tiny(4), {0, 1, 2, 3}
    grid = Coming(tiny.app(), 4, {})
    # One look in each round.
    grid.there = [everyone, *[{0, 1, 2}] * 3, everyone]
    with grid.running():
        strategy = FedLoRA(fraction_train=0.5, min_train_nodes=1, max_rounds=5)
        strategy.start(grid, record_of(start_arrays()), num_rounds=30)
    assert Counter(entry.partition for entry in tiny.asked) == dict.fromkeys(range(4), 5)


def test_a_new_run_of_the_same_strategy_starts_to_count_anew() -> None:
    tiny, strategy = Tiny(4), FedLoRA(fraction_train=0.5, max_rounds=2)
    first = ran(tiny, strategy, num_rounds=4)
    tiny.asked.clear()
    assert ran(tiny, strategy, num_rounds=4) == first


def test_clients_that_measure_follow_the_seed_and_spend_nothing() -> None:
    def measured(seed: int) -> list[list[str]]:
        tiny, found = Tiny(6), []
        strategy = FedLoRA(fraction_evaluate=0.5, max_rounds=2, seed=seed)
        with tiny.grid() as grid:
            for server_round in (1, 2):
                arrays = record_of(start_arrays())
                replies = grid.send_and_receive(
                    strategy.configure_train(server_round, arrays, ConfigRecord(), grid)
                )
                strategy.aggregate_train(server_round, replies)
                messages = strategy.configure_evaluate(server_round, arrays, ConfigRecord(), grid)
                nodes = [message.metadata.dst_node_id for message in messages]
                found.append([strategy._who.of(node) for node in nodes])
        return found

    assert measured(3) == measured(3)
    assert [len(cohort) for cohort in measured(3)] == [3, 3]
    assert len({str(measured(seed)) for seed in range(4)}) > 1


def test_measuring_does_not_wait_for_more_nodes_than_there_are() -> None:
    strategy = FedLoRA(
        min_train_nodes=1, min_available_nodes=1, fraction_evaluate=1.0, node_timeout=0.0
    )
    with pytest.raises(FederationAborted, match="1 of at least 2 nodes"):
        Tiny(1).run(strategy)


class Counting(LocalGrid):
    """Counts what is sent, by type of message."""

    sent: Counter[str]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        kept = list(messages)
        self.sent.update(message.metadata.message_type for message in kept)
        return super().send_and_receive(kept, timeout=timeout)


class CountingFleet(Counting, Fleet):
    """Counts, and vouches for no name."""


def sent_in(num_rounds: int, fraction: float, kind: type[Counting] = CountingFleet) -> Counter[str]:
    grid = kind(Tiny(4).app(), 4, {})
    grid.sent = Counter()
    with grid.running():
        strategy = FedLoRA(fraction_train=fraction)
        strategy.start(grid, record_of(start_arrays()), num_rounds=num_rounds)
    return grid.sent


def test_clients_are_asked_once_who_they_are() -> None:
    assert sent_in(num_rounds=3, fraction=0.5) == {"query": 4, "train": 6}


def test_nobody_is_asked_where_the_grid_vouches_for_the_names() -> None:
    assert sent_in(num_rounds=3, fraction=0.5, kind=Counting) == {"train": 6}


def test_without_sampling_nobody_is_asked() -> None:
    assert sent_in(num_rounds=2, fraction=1.0) == {"train": 8}


def test_who_is_missing_is_said_once_and_then_each_minute(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Minutes pass while nobody waits: the clock is the test's."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    caplog.set_level(logging.INFO, "flwr")
    with Tiny(2).grid() as grid:
        here = sorted(grid.get_node_ids())
        names = {here[0]: "device-01", 7: "device-02"}
        with pytest.raises(FederationAborted, match=r"Gone: device-02\."):
            wait_for_nodes(grid, 3, 150.0, lambda node: names[node], [here[0], 7])
    said = [r.getMessage() for r in caplog.records if "Waiting for nodes" in r.getMessage()]
    assert len(said) == 3
    assert said[1] == (
        "Waiting for nodes: 2 of 3 connected, 60 of 150 s waited. Gone: device-02. Start those "
        "that are missing: the run ends if they do not connect in time."
    )


def test_the_budget_beside_the_largest_epsilon_is_the_same_clients() -> None:
    """A mean of the budgets would be below it, as if a client had spent too much."""

    def answer(asked: Asked) -> RecordDict:
        spent, budget = ((3.768, 4.0), (2.9, 3.0))[asked.partition]
        told = {"epsilon": spent, "epsilon-budget": budget, "delta": 1e-4}
        return reply_of(asked.trained(), asked.partition, steps=5.0, **told)

    metrics = Tiny(2, answer).run(FedLoRA()).train_metrics_clientapp[1]
    assert (metrics["epsilon"], metrics["epsilon-budget"]) == (3.768, 4.0)
