from __future__ import annotations

import pytest

from benchmarks.start import START_BAR, Setting, Start, figures_of, take_starts

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
    figures = list(figures_of(found, SMALL))
    stages = (("Flower", "imports", "model", "records", "noise"), ("asking", "warm process"))
    for way, expected in zip(("client", "warm"), stages, strict=True):
        wall, work = figures.pop(0), figures.pop(0)
        assert (wall.bar, work.bar) == (START_BAR, None)
        assert wall.ours == found[way][0].seconds > 0
        assert work.ours == sum(found[way][0].stages.values()) > 0
        assert work.reference == sum(found["plain"][0].stages.values()) > 0
        for stage in expected:
            assert stage in work.note
    assert not figures


def test_a_warm_devices_own_process_loads_no_model_library(found: dict[str, list[Start]]) -> None:
    (ready,) = found["warm"]
    assert "flwr" in ready.packages
    assert {"torch", "peft", "opacus", "transformers", "scipy"}.isdisjoint(ready.packages)
