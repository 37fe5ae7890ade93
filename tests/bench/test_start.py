from __future__ import annotations

import pytest

from fedlora_flwr.bench.start import START_BAR, Setting, Start, figures_of, take_starts

SMALL = Setting(starts=1, layers=1, width=32, words=50, records=40)
# Draws, compares accountants, deals records out, reads pictures, simulates: no device does.
NOT_FOR_A_DEVICE = {"matplotlib", "seaborn", "dp_accounting", "flwr_datasets", "timm", "ray"}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Start]]:
    return take_starts(tmp_path_factory.mktemp("start"), SMALL)


def test_a_device_loads_nothing_that_it_does_not_use(found: dict[str, list[Start]]) -> None:
    (ready,) = found["client"]
    assert {"torch", "peft", "opacus", "transformers", "flwr"} <= set(ready.packages)
    assert NOT_FOR_A_DEVICE.isdisjoint(ready.packages)
    assert "timm" in found["plain"][0].packages


def test_seconds_and_where_they_go_are_compared(found: dict[str, list[Start]]) -> None:
    wall, work = figures_of(found, SMALL)
    assert (wall.bar, work.bar) == (START_BAR, None)
    assert wall.ours == found["client"][0].seconds > 0
    assert work.reference == sum(found["plain"][0].stages.values()) > 0
    for stage in ("Flower", "imports", "model", "records", "noise"):
        assert stage in work.note
