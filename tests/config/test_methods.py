"""Settings that a method declares in its own file, as keys of the run configuration."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from fedlora_flwr.config import RunConfig, device_config, parse_overrides, read_toml
from fedlora_flwr.config.recipes import load_recipe
from fedlora_flwr.errors import InvalidValue, OrderRefused
from fedlora_flwr.server.strategy import build_strategy

PLACE = "mine_own_method:Damped"
CODE = """
from dataclasses import dataclass
from fedlora_flwr.strategies import FLAG, FedLoRA, between, choice, setting

@dataclass(frozen=True)
class Settings:
    damping: float = setting(0.5, between(0, 1), "share of a step that is taken")
    kind: str = setting("mean", choice("mean", "median"), "what is taken")
    after_round: int = setting(3, between(0, 99), "rounds before it begins")
    quiet: bool = setting(False, FLAG, "whether nothing is said")

class Damped(FedLoRA):
    name = "damped"
    settings = Settings

class Nameless(FedLoRA):
    settings = Settings

class Closed(FedLoRA):
    def __init__(self, damping):
        super().__init__()

def function(): pass
"""


@pytest.fixture(autouse=True)
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_own_method.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mine_own_method", raising=False)


def config_of(**own: Any) -> RunConfig:
    return RunConfig.of({"strategy": PLACE, "damped": own})


def test_a_table_of_a_recipe_reaches_the_strategy(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(f'strategy = "{PLACE}"\nrank = 2\n[damped]\ndamping = 1\nkind = "median"\n')
    config = load_recipe(str(recipe), ["damped.after-round=7", "damped.quiet=true"])
    strategy: Any = build_strategy(config)
    found = strategy.damping, strategy.kind, strategy.after_round, strategy.quiet
    assert found == (1.0, "median", 7, True)
    assert type(strategy.damping) is float
    assert type(strategy).__name__ == "Damped"


def test_defaults_are_the_strategys() -> None:
    strategy: Any = build_strategy(RunConfig.of({"strategy": PLACE}))
    assert (strategy.damping, strategy.kind, strategy.after_round) == (0.5, "mean", 3)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    config = config_of(damping=0.25, kind="median")
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml())
    assert RunConfig.of(read_toml(path)) == config
    assert RunConfig.of(config.items()) == config
    assert config.items()["damped.damping"] == 0.25


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"damping": 2}, "damped.damping = 2.* expected a number from 0 to 1"),
        ({"damping": "much"}, "damped.damping = 'much' cannot be used: expected a number"),
        ({"after-round": 1.5}, "damped.after-round = 1.5 .* expected a whole number"),
        ({"kind": "medean"}, "damped.kind = 'medean' .* did you mean 'median'"),
        ({"kind": 3}, "damped.kind = 3 cannot be used: expected text"),
        ({"quiet": 1}, "damped.quiet = 1 cannot be used: expected true or false"),
        ({"dumping": 0.5}, "'damped.dumping' .* did you mean 'damped.damping'"),
        ({"damping": {"a": 1}}, "damped.damping = .* expected a number"),
    ],
)
def test_what_cannot_be_used_is_named_with_what_is_allowed(
    own: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidValue, match=message):
        config_of(**own)


@pytest.mark.parametrize(
    ("strategy", "key", "message"),
    [
        (PLACE, "dampd.damping", "'dampd.damping' .* did you mean 'damped.damping'"),
        ("rolora", "damped.damping", "'damped.damping' cannot be used"),
        ("rolora", "as-lora.explor", "'as-lora.explor' .* did you mean 'as-lora.explore'"),
        ("rolora", "rolora.beta", "'rolora.beta' .* rolora has no settings of its own"),
        ("rolora", "partitioner.x", "'partitioner.x' cannot be used"),
        ("rolora", "privacy.beta", "'privacy.beta' .* did you mean 'privacy.delta'"),
    ],
)
def test_a_setting_that_no_method_has_is_refused(strategy: str, key: str, message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        RunConfig.of({"strategy": strategy, key: 0.5})


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("mine_own_method:Dampd", "has no 'Dampd'"),
        ("mine_own_metod:Damped", "is not a module in"),
        ("mine_own_method:function", "a subclass of FedLoRA"),
        ("mine_own_method:Closed", "missing a required argument: 'damping'"),
        ("mine_own_method:Nameless", "Set `name` in it"),
        ("dampd", "or your own module:Class"),
    ],
)
def test_a_strategy_that_is_none_is_refused(place: str, message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        build_strategy(RunConfig.of({"strategy": place}))


@pytest.mark.parametrize(
    ("text", "value"), [("1e-1", 0.1), (".25", 0.25), ("1", 1.0), ("'0.5'", "0.5")]
)
def test_a_setting_is_read_from_the_command_line_as_any_number(text: str, value: Any) -> None:
    assert parse_overrides([f"damped.damping={text}"])["damped.damping"] == value


# On a device.

RUN = {"strategy": PLACE, "damped.damping": 0.5, "average-decay": 0.9, "quantization": "8bit"}


def test_a_device_takes_part_and_loads_no_strategy() -> None:
    config = device_config(RUN, {"task": "digits"})
    assert config.strategy == PLACE
    assert config.own == ()
    RunConfig.received(RUN)
    assert "mine_own_method" not in sys.modules


@pytest.mark.parametrize(
    "run",
    [
        {"damped.damping": "x" * 20_000},
        {"damped.damping": b"bytes"},
        {"damped.damping.more": 1.0},
        {"damped.": 1.0},
        {f"{'x' * 99}.damping": 1.0},
        {f"damped.key-{number}": 1.0 for number in range(1_001)},
    ],
)
def test_a_device_refuses_what_is_no_setting(run: dict[str, Any]) -> None:
    with pytest.raises(OrderRefused):
        device_config({"strategy": PLACE, **run}, {"task": "digits"})
