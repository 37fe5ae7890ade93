from __future__ import annotations

from benchmarks.figures import Figure
from benchmarks.growth import Setting, measure
from tests.benchmarks.support import small_roberta


def test_each_row_is_over_its_first() -> None:
    found: list[Figure] = []
    small = small_roberta()

    measure(
        Setting(
            {"rank": [(small, 2, 1), (small, 2, 4)], "records": [(small, 1, 2), (small, 8, 2)]}, 1
        ),
        found.append,
    )

    assert [(f.what, f.against) for f in found] == [
        ("growth with rank: r = 4: time", "growth with rank: r = 1"),
        ("growth with rank: r = 4: peak memory", "growth with rank: r = 1"),
        ("growth with records: b = 8: time", "growth with records: b = 1"),
        ("growth with records: b = 8: peak memory", "growth with records: b = 1"),
    ]
    # Eight records keep more than twice what one does.
    assert (found[3].ratio or 0) > 2
