from __future__ import annotations

from benchmarks.figures import Figure
from benchmarks.prefix import Setting, measure


def test_known_layers_cost_nothing() -> None:
    found: list[Figure] = []
    measure(Setting(width=24, records=16, repetitions=1), found.append)
    late, head = found
    assert late.what.endswith("last three layers")
    assert head.what.endswith("head alone")
    assert (head.ratio or 1) < 1
