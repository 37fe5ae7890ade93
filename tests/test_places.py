"""Names of installed packages, and what happens where two of them claim one."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.places import FLOWERS, STRATEGIES, load_strategy, strategy_names
from fedlora_flwr.strategies import RoLoRA, strategy_class


def install(site: Path, package: str, name: str, place: str) -> None:
    """Leave on the path what an installer leaves of a package's entry point."""
    info = site / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[fedlora_flwr.strategies]\n{name} = {place}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder


def test_a_name_of_an_installed_package_is_a_strategy(site: Path) -> None:
    install(site, "one", "turns", "fedlora_flwr.strategies.rolora:RoLoRA")
    assert strategy_names() == (*STRATEGIES, *FLOWERS, "turns")
    assert strategy_class("turns") is RoLoRA
    with pytest.raises(InvalidValue, match="did you mean 'turns'"):
        strategy_class("turn")


def test_a_name_that_two_packages_give_is_refused_with_both_places(site: Path) -> None:
    install(site, "one", "turns", "fedlora_flwr.strategies.rolora:RoLoRA")
    install(site, "two", "turns", "elsewhere:Turns")
    with pytest.raises(
        InvalidValue, match=r"elsewhere:Turns and fedlora_flwr\.strategies\.rolora:RoLoRA"
    ):
        load_strategy("turns")
    assert strategy_names().count("turns") == 1


def test_no_package_takes_a_name_of_this_one(site: Path) -> None:
    install(site, "one", "rolora", "elsewhere:Turns")
    assert strategy_class("rolora") is RoLoRA
    assert strategy_names() == (*STRATEGIES, *FLOWERS)


def test_a_place_that_a_package_names_wrongly_is_refused(site: Path) -> None:
    install(site, "one", "turns", "fedlora_flwr.strategies.rolora:Turns")
    with pytest.raises(InvalidValue, match="has no 'Turns'"):
        strategy_class("turns")
