from __future__ import annotations

from benchmarks.clients import MEMORY_BAR, TIME_BAR, Setting, measure
from benchmarks.figures import Figure


def test_each_number_of_clients_is_compared_with_the_smallest() -> None:
    found: list[Figure] = []

    measure(Setting((3, 20, 300), sampled=3, rounds=2), found.append)

    assert [(f.what, f.against, f.bar) for f in found] == [
        ("20 clients, 3 a round: a round", "3 clients", TIME_BAR),
        ("20 clients, 3 a round: peak memory", "3 clients", MEMORY_BAR),
        ("20 clients, 3 a round: from the checks to the first round", "what is allowed", 1.0),
        ("300 clients, 3 a round: a round", "3 clients", TIME_BAR),
        ("300 clients, 3 a round: peak memory", "3 clients", MEMORY_BAR),
        ("300 clients, 3 a round: from the checks to the first round", "what is allowed", 1.0),
    ]
    assert all(f.ours and f.reference and f.reference > 0 for f in found)
    assert all(100 < (f.ours or 0) < 20_000 for f in found if f.unit == "MB")
