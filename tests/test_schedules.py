from __future__ import annotations

import math

import pytest

from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.schedules import Schedule


@pytest.mark.parametrize(
    ("text", "rounds", "expected"),
    [
        ("constant", 3, [1, 1, 1]),
        ("exponential:0.5", 4, [1, 0.5, 0.25, 0.125]),
        ("linear:0", 5, [1, 0.75, 0.5, 0.25, 0]),
        ("linear:0.2", 3, [1, 0.6, 0.2]),
        ("cosine:0", 3, [1, 0.5, 0]),
        ("warmup:2", 3, [0.5, 1, 1]),
        ("warmup:2 linear:0", 4, [0.5, 1, 0.5, 0]),
        ("warmup:1 exponential:.1", 3, [1, 0.1, 0.01]),
        ("linear:0", 1, [1]),
        ("warmup:9", 3, [1 / 9, 2 / 9, 3 / 9]),
    ],
)
def test_factors_by_round(text: str, rounds: int, expected: list[float]) -> None:
    schedule = Schedule.parse(text)

    found = [schedule.factor(server_round, rounds) for server_round in range(1, rounds + 1)]

    assert found == pytest.approx(expected)
    assert schedule.factor(rounds + 7, rounds) == pytest.approx(expected[-1])


def test_cosine_is_halfway_between_its_ends_in_the_middle() -> None:
    values = [Schedule.parse("cosine:0.1").factor(t, 101) for t in (1, 26, 51, 101)]

    assert values == pytest.approx([1, 0.1 + 0.45 * (1 + math.cos(math.pi / 4)), 0.55, 0.1])


def test_each_factor_and_the_head_can_have_its_own() -> None:
    config = RunConfig.of(
        {"num-rounds": 3, "lr-a": 1.0, "lr-b": 2.0, "lr-head": 4.0, "lr-schedule": "linear:0"},
        {"lr-schedule-b": "exponential:0.5", "lr-schedule-head": "constant"},
    )

    assert config.learning_rates(2) == pytest.approx((0.5, 1.0, 4.0))
    assert config.rates_change
    assert not RunConfig().rates_change


@pytest.mark.parametrize("text", ["cosine:2", "cosine:1e-3", "warmup:3cosine:0x", "linear:0\n"])
def test_what_is_no_schedule(text: str) -> None:
    with pytest.raises(InvalidValue, match="exponential:F"):
        Schedule.parse(text)
