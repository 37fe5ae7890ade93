"""A run that is saved after two rounds and goes on in a new object."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedlora_flwr.strategies import FedLoRA
from tests.strategies.dense import RANK, cut, start
from tests.strategies.tiny import Asked, Tiny, record_of, reply_of


def of_rank(*ranks: int) -> Callable[[Asked], RecordDict]:
    """Return clients that train at ranks of their own, in turn, and report a ledger."""

    def answer(asked: Asked) -> RecordDict:
        own = replace(asked, arrays=cut(asked.arrays, ranks[asked.partition % len(ranks)]))
        return reply_of(own.trained(), asked.partition, steps=float(asked.server_round))

    return answer


def plain(value: Any) -> Any:
    """Return a copy of a state, which holds nothing but arrays and plain values."""
    if isinstance(value, dict):
        assert all(type(name) is str for name in value)
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    if isinstance(value, np.ndarray):
        return value.copy()
    assert value is None or type(value) in (bool, int, float, str), value
    return copy.copy(value)


def assert_goes_on_bit_for_bit(
    make: Callable[..., FedLoRA],
    ranks: Sequence[int] = (RANK,),
    saved_after: int = 2,
    cohort: int = 2,
) -> None:
    """Save a run after some rounds, and let a new object have the next one as well.

    Not everybody has had a turn by then, so who comes next depends on who was there.
    """
    options: dict[str, Any] = {"fraction_train": cohort / 5, "min_train_nodes": 1}
    options["max_rounds"] = (saved_after + 1) * cohort // 5 + 1
    first, second = make(**options), make(**options)
    tiny = Tiny(5, of_rank(*ranks))
    with tiny.grid() as grid:

        def play(strategy: FedLoRA, number: int, arrays: ArrayRecord) -> tuple[Any, ...]:
            seen = len(tiny.asked)
            sent = list(strategy.configure_train(number, arrays, ConfigRecord(), grid))
            after, _ = strategy.aggregate_train(number, grid.send_and_receive(sent))
            report = strategy.last_round
            assert after is not None
            assert report is not None
            got = {
                asked.partition: {name: array.tobytes() for name, array in asked.arrays.items()}
                for asked in tiny.asked[seen:]
            }
            told = report.plan, str(report.details), report.failures, strategy.remarks()
            return after, {name: array.data for name, array in after.items()}, got, told

        first.num_rounds = saved_after + 1
        arrays = record_of(start())
        for number in range(1, saved_after + 1):
            arrays, *_ = play(first, number, arrays)
        second.load_state_dict(plain(first.state_dict()))
        expected, found = (play(s, saved_after + 1, arrays)[1:] for s in (first, second))
    assert found == expected
    left, right = plain(second.state_dict()), plain(first.state_dict())
    assert str(left) == str(right)
