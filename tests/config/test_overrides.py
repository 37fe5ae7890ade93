from __future__ import annotations

import math

import pytest

from fedlora_flwr.config import RunConfig, parse_overrides
from fedlora_flwr.errors import InvalidValue


def test_overrides_are_toml_or_plain_text() -> None:
    pairs = [
        "strategy=ffa-lora",
        "epsilon=inf",
        "seed = 7",
        "rslora=true",
        'task="digits"',
        "run-dir=/tmp/a=b",
        "lora-targets=",
    ]
    assert parse_overrides(pairs) == {
        "strategy": "ffa-lora",
        "epsilon": math.inf,
        "seed": 7,
        "rslora": True,
        "task": "digits",
        "run-dir": "/tmp/a=b",
        "lora-targets": "",
    }


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (".5", 0.5), ("5.", 5.0), ("-.5", -0.5), ("+.632", 0.632), ("1e-3", 1e-3), ("1E-3", 1e-3),
        ("5.e-2", 0.05), ("1_000", 1000.0), ("1_000.5", 1000.5), ("+3", 3.0), ("007", 7.0),
        ("inf", math.inf), ("+inf", math.inf), ("Infinity", math.inf), (" 0.5 ", 0.5),
    ],
)  # fmt: skip
def test_a_number_is_read_in_every_way_that_a_person_writes_it(text: str, number: float) -> None:
    assert parse_overrides([f"epsilon={text}"]) == {"epsilon": number}
    assert RunConfig.of({"num-rounds": 5}, parse_overrides(["lr-a=.632"])).lr_a == 0.632


@pytest.mark.parametrize("text", ["3", "+3", "3.", "3e0", "0_3", "003"])
def test_a_count_is_whole_however_it_is_written(text: str) -> None:
    (rank,) = parse_overrides([f"rank={text}"]).values()
    assert (rank, type(rank)) == (3, int)


@pytest.mark.parametrize("text", ["2.5", "inf", "nan", "three", "1,000", "0.5.1", "--3", "", "e5"])
def test_what_is_no_count_is_refused_by_its_key(text: str) -> None:
    with pytest.raises(InvalidValue, match=r"^rank = .* expected a whole number"):
        RunConfig.of(parse_overrides([f"rank={text}"]))


@pytest.mark.parametrize("text", ["123", ".5", "true", "inf", "2026-01-01", "[1]", "a b", "x=1"])
def test_a_text_needs_no_quotes_whatever_it_looks_like(text: str) -> None:
    assert RunConfig.of(parse_overrides([f"dataset={text}"])).dataset == text
    assert RunConfig.of(parse_overrides([f"dataset='{text}'"])).dataset == text


def test_an_override_without_a_value_is_refused() -> None:
    with pytest.raises(InvalidValue, match="key=value"):
        parse_overrides(["seed"])


def test_an_override_of_a_wrong_type_is_refused_with_its_key() -> None:
    with pytest.raises(InvalidValue, match="train-head = 'True'"):
        RunConfig.of(parse_overrides(["train-head=True"]))
