from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import Any

import pytest

from fedlora_flwr.config import RunConfig, device_config, parse_overrides
from fedlora_flwr.config.keys import fields_by_key
from fedlora_flwr.config.names import by_section, full_name, short_name
from fedlora_flwr.config.sections import SECTION_OF, SECTIONS
from fedlora_flwr.errors import InvalidValue, OrderRefused

WAYS: list[Mapping[str, Any]] = [
    {"epsilon": 3.0, "task": "digits", "explore": 0.1},
    {"privacy.epsilon": 3.0, "task.task": "digits", "as-lora.explore": 0.1},
    {"privacy": {"epsilon": 3.0}, "task": {"task": "digits"}, "as-lora": {"explore": 0.1}},
    {"privacy": {"epsilon": 3.0}, "task": "digits", "as-lora.explore": 0.1},
]


@pytest.mark.parametrize("values", WAYS)
def test_a_key_is_written_in_short_in_full_or_in_its_table(values: Mapping[str, Any]) -> None:
    config = RunConfig.of(values)
    assert (config.epsilon, config.task, config.explore) == (3.0, "digits", 0.1)
    assert config == RunConfig.of(WAYS[0])


def test_each_key_is_in_one_section_and_each_name_is_of_one_key() -> None:
    listed = [key for section in SECTIONS.values() for key in fields_by_key(section)]
    assert len(listed) == len(set(listed)) == len(SECTION_OF)
    assert set(listed) == set(fields_by_key(RunConfig))
    assert all(short_name(full_name(key)) == key for key in listed)
    assert {s: [f"{s}.{k}" for k in keys] for s, keys in by_section(listed).items()} == {
        name: [f"{name}.{key}" for key in fields_by_key(section)]
        for name, section in SECTIONS.items()
    }


def test_a_configuration_is_each_of_its_sections() -> None:
    config = RunConfig()
    assert all(isinstance(config, section) for section in SECTIONS.values())


@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_alone_has_the_defaults_of_the_whole(name: str) -> None:
    alone, whole = SECTIONS[name](), RunConfig()
    for entry in fields_by_key(SECTIONS[name]).values():
        assert getattr(alone, entry.name) == getattr(whole, entry.name)


def test_later_mappings_are_in_force_whichever_way_they_are_written() -> None:
    assert RunConfig.of({"privacy": {"epsilon": 1.0}}, {"epsilon": 2.0}).epsilon == 2.0
    assert RunConfig.of({"epsilon": 1.0}, parse_overrides(["privacy.epsilon=2"])).epsilon == 2.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"privacy": {"epsilonn": 1.0}}, r"did you mean 'privacy\.epsilon'"),
        ({"data": {"epsilon": 1.0}}, r"'data\.epsilon' .*Expected 'privacy\.epsilon'"),
        ({"privacy.epsilon": 1.0, "epsilon": 1.0}, r"privacy\.epsilon = 1\.0 .*given twice"),
        ({"privacy": {"epsilon": {"value": 1.0}}}, "epsilon = .*expected a number"),
        ({"epsilon": {"value": 1.0}}, "'epsilon.value' cannot be used"),
        ({"privcy": {"epsilon": 1.0}}, r"'privcy\.epsilon' cannot be used"),
        ({"privacy": 1.0}, "'privacy' cannot be used"),
        ({"partition": {"partitioner": "by-hand"}}, "partitioner = 'by-hand' .*'dirichlet'"),
        ({"task": {"task": "digit"}}, "did you mean 'digits'"),
        ({"federation": {"strategy": "rolara"}}, "did you mean 'rolora'"),
    ],
)
def test_what_is_no_key_or_no_value_is_refused_when_it_is_read(
    values: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(InvalidValue, match=message):
        RunConfig.of(values)


def test_a_device_reads_full_names_and_the_server_gains_nothing_by_them() -> None:
    own = {"epsilon": 2.0, "delta": 1e-3, "task": "digits"}
    sent = {"privacy.epsilon": 80.0, "lora.rank": 8, "task.task": "digits", "damped.x": 1}
    config = device_config(sent, own)
    assert (config.epsilon, config.rank) == (2.0, 8)
    for bad in ({"lora.rank": 8, "rank": 4}, {"lora.rnk": 8}, {"data.rank": 8}):
        with pytest.raises(OrderRefused, match="Install the same version"):
            device_config(bad, own)


def test_a_recipe_written_with_sections_is_what_flower_flattens() -> None:
    from flwr.common.config import flatten_dict

    config = RunConfig.of({"epsilon": 3, "strategy": "as-lora", "explore": 0.1})
    flat = flatten_dict(tomllib.loads(config.to_toml()))
    assert "privacy.epsilon" in flat
    assert RunConfig.of(flat) == config
