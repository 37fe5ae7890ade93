"""A server chooses the weights of the joint clip. It may choose any, and a record still moves C."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tests.hostile.conftest import MakeDevice
from tests.hostile.device import RUN, start
from tests.hostile.sums import CLEAR, moved, run_of, summed
from tests.hostile.tiny_task import RECORDS, points

KEYS = {"A": "clip-weight-a", "B": "clip-weight-b", "head": "clip-weight-head"}
OUTSIDE: list[Any] = [
    0.0, -1.0, -1e-3, 9.99e-4, 1e-300, 5e-324, 1000.1, 1e30, 1e300, math.inf, -math.inf, math.nan,
    True, "1", "inf", "", 10**400,
]  # fmt: skip


def test_weights_that_are_absurd_are_refused_before_any_record(make_device: MakeDevice) -> None:
    device = make_device()
    for key in KEYS.values():
        for value in OUTSIDE:
            answer = device.ask("train", device.order(plan="*"), {**RUN, key: value})
            assert answer.kind in ("refused", "failed"), (key, value, answer)
    assert not device.rows()


@pytest.mark.parametrize(
    "weights",
    [(1e3, 1e3, 1e3), (1e-3, 1e-3, 1e-3), (1e3, 1e-3, 1.0), (1e-3, 1e3, 1e-3), (1.0, 1.0, 1e3)],
)
def test_one_record_moves_the_weighted_sum_by_c_at_most(
    make_device: MakeDevice, weights: tuple[float, float, float]
) -> None:
    """The attacker plants huge, tiny and broken records, and knows all others."""
    by_part = dict(zip(KEYS, weights, strict=True))
    # B is not zero here, so that A has a gradient.
    sent = {name: values + np.float32(0.1) for name, values in start(4).items()}
    sums = []
    for size in (None, 1e-30, 1.0, 30.0, 1e25, math.nan):
        table = points(1)
        if size is None:  # The neighbor: this record's loss has weight 0.
            table[3, -1] = 0
        else:
            table[3, :-2] *= size
        device = make_device(records=table, **CLEAR)
        run = run_of(device, RECORDS, **{KEYS[part]: w for part, w in by_part.items()})
        # With a rate of w, an upload shows the clipped sum itself.
        rates = {f"lr-{part.lower()}": w for part, w in by_part.items()}
        answer = device.ask("train", device.order(sent, plan="*"), {**run, **rates})
        assert answer.kind == "ok", answer
        sums.append(summed(answer, sent, RECORDS))
    for other in sums[1:]:
        assert moved(other, sums[0]) <= 1.001
    assert max(moved(other, sums[0]) for other in sums[1:]) > 0.5
