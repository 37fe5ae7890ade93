from __future__ import annotations

import pytest

from benchmarks.figures import Figure
from benchmarks.masking import Setting, measure


def test_bytes_grow_with_clients_and_not_with_what_they_upload() -> None:
    found: list[Figure] = []

    measure(Setting(clients=(4, 12), entries=(100, 1000)), found.append)

    more = {f.what: (f.ours or 0) - (f.reference or 0) for f in found if "sent up" in f.what}
    few, many = (f"masks of {n} clients on 100 numbers: sent up per client" for n in (4, 12))
    assert more[few] == pytest.approx(more[few.replace("100 n", "1,000 n")])
    # A card once; and for each client, what is sealed for it and what is revealed of it.
    assert more[few] == pytest.approx((160 + 4 * (148 + 66)) / 1e6)
    assert more[many] - more[few] == pytest.approx(8 * (148 + 66) / 1e6)
