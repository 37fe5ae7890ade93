"""The noisiest client, and the rounds in which sampled clients run out of budget."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedlora_flwr.config import RunConfig
from fedlora_flwr.data.records import Records, TensorRecords
from fedlora_flwr.forecast.client_noise import worst_client
from fedlora_flwr.forecast.forecast import MOST_THAT_GAINED, forecast
from fedlora_flwr.forecast.participation import participation
from fedlora_flwr.privacy.mechanism import Mechanism
from fedlora_flwr.simulations.partitions import Partitions
from fedlora_flwr.strategies.cohort import Turns, cohort_size
from fedlora_flwr.tasks.digits import DigitsTask
from tests.conftest import MakeConfig

SIZES, SIGMA = (20, 100, 150, 300), (9.0, 2.0, 1.5, 1.0)
MADE = [Mechanism(s, 2.0, 16, n) for s, n in zip(SIGMA, SIZES, strict=True)]


@pytest.mark.parametrize("weighting", ["uniform", "size", "inverse-noise"])
def test_the_worst_client_is_what_drawn_noise_shows(weighting: str) -> None:
    config = RunConfig.of({"weighting": weighting, "local-steps": 4, "clip-norm": 2.0})
    found = worst_client(config, [None, *MADE], 100)
    assert found is not None
    assert (found.client, found.records) == (1, 20)
    raw = {"uniform": np.ones(4), "size": np.array(SIZES), "inverse-noise": np.array(SIGMA) ** -2.0}
    draw, rounds = np.random.default_rng(0), 300

    def norm_of(clients: list[int], whole: float) -> float:
        squares = []
        for _ in range(rounds):
            uploads = [
                raw[weighting][i] / whole * SIGMA[i] * 2.0 / 16
                * draw.standard_normal((4, 100)).sum(axis=0)
                for i in clients
            ]  # fmt: skip
            squares.append(np.square(sum(uploads)).sum())
        return math.sqrt(float(np.mean(squares)))

    signal, whole = 4 * 2.0, raw[weighting].sum()
    rest = raw[weighting][1:].sum()
    assert found.alone == pytest.approx(norm_of([0], raw[weighting][0]) / signal, rel=0.05)
    assert found.without == pytest.approx(norm_of([1, 2, 3], rest) / signal, rel=0.05)
    share = (norm_of([0], whole) / norm_of([0, 1, 2, 3], whole)) ** 2
    assert found.share == pytest.approx(share, rel=0.1)


def test_there_is_none_without_noise_or_where_a_sum_shares_it() -> None:
    assert worst_client(RunConfig.of({"epsilon": math.inf}), MADE, 10) is None
    assert worst_client(RunConfig(), [None, None], 10) is None
    lonely = worst_client(RunConfig(), MADE[:1], 10)
    assert lonely is not None
    assert not lonely.stands_out(1)
    assert (lonely.share, lonely.without, lonely.decides(9.0)) == (1.0, None, False)


class Uneven(DigitsTask):
    """Digits of which the first client has 17 records, and each other client a fair part."""

    def client_records(self, partition_id: int, num_partitions: int) -> Records:
        found = super().client_records(partition_id, num_partitions)
        return found if partition_id else TensorRecords(found.batch(torch.arange(17)))


def test_one_tiny_client_does_not_set_the_whole_forecast(make_config: MakeConfig) -> None:
    config = make_config(num_clients=6, epsilon=0.2, batch_size=16)
    found = forecast(config, task=Uneven(config))
    worst, ratio = found.worst, found.noise_to_signal
    assert worst is not None
    assert ratio is not None
    assert worst.without is not None
    assert (worst.client, worst.records) == (0, 17)
    assert worst.decides(ratio)
    assert worst.stands_out(6)
    assert worst.without < MOST_THAT_GAINED < ratio < worst.alone
    # The general warning speaks of the others, which have no more noise than runs that gained.
    (warning,) = found.warnings
    assert "Client 0 (17 records) brings" in warning
    assert f"{ratio:.1f} times the largest signal with it and {worst.without:.1f} times" in warning
    by_size = forecast(RunConfig.of(config.items(), {"weighting": "size"}), task=Uneven(config))
    assert by_size.worst is not None
    assert by_size.noise_to_signal is not None
    assert not by_size.worst.decides(by_size.noise_to_signal)
    assert by_size.warnings == []
    assert found.as_json()["worst_client"]["share"] == worst.share > 0.5


@pytest.mark.parametrize("clients", [1, 3, 4, 7, 10])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("cap", [1, 2, 3, 5])
def test_clients_run_out_in_the_round_that_the_plan_names(
    clients: int, share: float, cap: int
) -> None:
    config = RunConfig.of(
        {"num-clients": clients, "fraction-train": share, "max-rounds": cap, "num-rounds": 12}
    )
    found = participation(config)
    turns, size = Turns(cap), cohort_size(clients, share)
    there = Partitions(clients)
    first, last = None, None
    for number in range(1, 13):
        if not turns.left(there):
            break
        turns.take(map(there.name, turns.draw(there, size, np.random.default_rng(number))))
        last = number
        if first is None and turns.left(there) < clients and number < 12:
            first = number
    assert found.last_round == last
    assert found.first_spent == first
    assert ("the first clients" in str(found)) == (first is not None and first < found.last_round)
