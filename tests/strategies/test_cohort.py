from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable

import pytest
from flwr.app import Message, RecordDict

from fedlora_flwr.errors import FederationAborted
from fedlora_flwr.simulations.local_grid import LocalGrid
from fedlora_flwr.strategies import FedLoRA
from tests.strategies.tiny import Asked, Tiny, record_of, start_arrays

ROUNDS = 3


def cohorts(seed: int, bridged: bool = True) -> list[list[int]]:
    tiny = Tiny(8, bridged=bridged)
    tiny.run(FedLoRA(fraction_train=0.5, seed=seed), num_rounds=ROUNDS)
    return [tiny.cohort(server_round) for server_round in range(1, ROUNDS + 1)]


def test_cohorts_follow_the_seed_though_node_ids_are_random() -> None:
    drawn = cohorts(seed=3)
    assert cohorts(seed=3) == drawn
    assert [len(cohort) for cohort in drawn] == [4] * ROUNDS


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
    drawn = cohorts(seed=0, bridged=False)
    assert [len(cohort) for cohort in drawn] == [4] * ROUNDS
    warnings = [r for r in caplog.records if "do not say who they are" in r.getMessage()]
    assert len(warnings) == 1
    assert warnings[0].levelno == logging.WARNING


def test_a_crashed_client_is_named_where_it_said_who_it_is() -> None:
    def answer(asked: Asked) -> RecordDict:
        raise RuntimeError("no memory")

    with pytest.raises(FederationAborted, match=r"partition-00000\d: RuntimeError: no memory"):
        Tiny(4, answer).run(FedLoRA(fraction_train=0.5))


class CountingGrid(LocalGrid):
    """Counts what is sent, by type of message."""

    sent: Counter[str]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        kept = list(messages)
        self.sent.update(message.metadata.message_type for message in kept)
        return super().push_messages(kept)


def sent_in(num_rounds: int, fraction: float) -> Counter[str]:
    grid = CountingGrid(Tiny(4).app(), 4, {})
    grid.sent = Counter()
    with grid.running():
        strategy = FedLoRA(fraction_train=fraction)
        strategy.start(grid, record_of(start_arrays()), num_rounds=num_rounds)
    return grid.sent


def test_clients_are_asked_once_who_they_are() -> None:
    assert sent_in(num_rounds=3, fraction=0.5) == {"query": 4, "train": 6}


def test_without_sampling_nobody_is_asked() -> None:
    assert sent_in(num_rounds=2, fraction=1.0) == {"train": 8}
