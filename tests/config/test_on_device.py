from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora_flwr.config import LIMITED, OWN, Decider, Limit, RunConfig, device_config
from fedlora_flwr.config.keys import fields_by_key, is_quick_pattern
from fedlora_flwr.errors import FedLoRAError, InvalidValue, OrderRefused

KEYS = fields_by_key(RunConfig)
DEFAULTS = RunConfig().items()
MINE = {"task": "digits", "epsilon": 1.0, "delta": 1e-5}
OTHERS: dict[type, Any] = {
    bool: st.booleans(),
    int: st.integers(-(2**62), 2**62),
    float: st.floats(),
    str: st.one_of(st.text(max_size=50), st.sampled_from(["../..", "/etc", "train", "a:b"])),
}
anything = st.one_of(*OTHERS.values(), st.lists(st.integers()), st.binary(), st.none())
# Built once: a strategy made while drawing costs more than its values.
SENT = {key: st.one_of(OTHERS[type(v)], st.just(v), anything) for key, v in DEFAULTS.items()}
SOME_KEYS = st.lists(st.sampled_from(list(DEFAULTS)), max_size=8, unique=True)


@st.composite
def runs(draw: st.DrawFn) -> dict[str, Any]:
    """Draw what a server may send as a run's configuration."""
    return {key: draw(SENT[key]) for key in draw(SOME_KEYS)}


@settings(max_examples=2000)
@given(run=runs())
def test_nothing_that_a_server_sends_decides_what_is_the_devices(run: dict[str, Any]) -> None:
    try:
        config = device_config(run, MINE).items()
    except OrderRefused:
        return
    for key, entry in KEYS.items():
        decides, default = entry.metadata["decides"], entry.metadata["on_device"]
        if decides == Decider.DEVICE:
            assert config[key] == MINE.get(key, default), key
        elif decides == Decider.PACKAGE:
            assert config[key] == default, key
        else:
            assert config[key] == run.get(key, default), key
            assert entry.metadata["device_check"][0](config[key])


@pytest.mark.parametrize("key", OWN)
def test_a_device_that_is_silent_has_the_packages_default(key: str) -> None:
    silent = {name: value for name, value in MINE.items() if name != key}
    other = {
        "epsilon": 9.0,
        "ledger-scope": "run",
        "state-dir": "/tmp/other",
        "test-split": "train",
    }
    found = device_config({key: other.get(key, DEFAULTS[key])}, silent).items()[key]
    assert found == KEYS[key].metadata["on_device"]


@pytest.mark.parametrize("key", OWN)
def test_a_devices_own_value_is_in_force(key: str) -> None:
    changed: dict[type, Any] = {bool: True, int: 3, float: 0.5, str: "x"}
    choices = {
        "quantization": "8bit", "compile": "inductor", "ledger-scope": "run", "weighting": "size",
        "state-dir": "/mine", "task": "digits", "delta": 1e-7,
        "trust-model": "local", "colluding": 0, "unit": "user",
    }  # fmt: skip
    own = {**MINE, key: choices.get(key, changed[type(DEFAULTS[key])])}
    if key == "user-column":
        own["unit"] = "user"
    assert device_config({}, own).items()[key] == own[key]


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        ({"clip-norm": 1.4e-45}, "clip-norm = 1.4e-45"),
        ({"clip-norm": 1e300}, "clip-norm"),
        ({"clip-norm": math.nan}, "clip-norm"),
        ({"epsilon": "much"}, "epsilon = 'much'"),
        ({"local-steps": 100_000, "num-rounds": 1_000_000}, "local-steps"),
        ({"surprise": 1}, "'surprise', which this version of the package does not know"),
        ({"task": "os:system"}, "this device's file has another value of task"),
        ({"blocks": "(a+)+$"}, "no group repeats"),
        ({"lora-targets": "(x|x)*y"}, "no group repeats"),
        ({"lora-targets": "a" * 20_000}, "20,000 characters"),
        ({"seed": True}, "seed = True"),
        ({"optimizer": "adam"}, "optimizer"),
        (
            {"precision": "auto"},
            "precision = 'auto' cannot be used: expected one of 'fp32', 'bf16'",
        ),
        ({"precondition": True, "optimizer": "adamw"}, "optimizer"),
    ],
)
def test_a_run_that_cannot_be_used_is_refused_by_name(run: dict[str, Any], reason: str) -> None:
    with pytest.raises(OrderRefused) as caught:
        device_config(run, MINE)
    assert reason in str(caught.value)


def test_what_only_the_devices_values_make_wrong_is_not_told() -> None:
    own = {**MINE, "epsilon": math.inf, "weighting": "inverse-noise"}
    with pytest.raises(InvalidValue):
        device_config({}, own)


LIMITS = {
    "clip-norm": Limit.read("clip-norm", 2),
    "local-steps": Limit.read("local-steps", [2, 10]),
    "precision": Limit.read("precision", ["fp32"]),
}


@pytest.mark.parametrize(
    ("run", "refused"),
    [
        ({"clip-norm": 2.0}, False),
        ({"clip-norm": 2.1}, True),
        ({"local-steps": 1}, True),
        ({"local-steps": 2}, False),
        ({"local-steps": 10}, False),
        ({"local-steps": 11}, True),
        ({"precision": "bf16"}, True),
        ({}, False),
    ],
)
def test_a_device_limits_a_run_further(run: dict[str, Any], refused: bool) -> None:
    if not refused:
        device_config(run, MINE, LIMITS)
        return
    with pytest.raises(OrderRefused, match="this device accepts"):
        device_config(run, MINE, LIMITS)


def test_a_limit_holds_for_a_run_that_is_silent() -> None:
    with pytest.raises(OrderRefused, match="num-rounds = 20 is refused"):
        device_config({}, MINE, {"num-rounds": Limit.read("num-rounds", 10)})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epsilon", 3), ("rnak", 3), ("rank", "3"), ("rank", [5, 2]), ("rank", [1, 2, 3]),
        ("rank", True), ("precision", "fp32"), ("precision", []), ("precision", ["fp8"]),
        ("precision", ["auto"]),
    ],
)  # fmt: skip
def test_a_limit_that_cannot_be_read_is_named(key: str, value: Any) -> None:
    with pytest.raises(InvalidValue, match=r"limits|precision = '(fp8|auto)'"):
        Limit.read(key, value)


@pytest.mark.parametrize("key", LIMITED)
def test_every_key_that_can_be_limited_has_a_limit(key: str) -> None:
    text = type(DEFAULTS[key]) is str
    assert str(Limit.read(key, ["fp32"] if key == "precision" else [""] if text else [0, 1]))


@pytest.mark.parametrize(
    ("pattern", "quick"),
    [
        ("", True),
        (r"blocks\.\d+\.attn\.(qkv|proj)", True),
        (r".*layer\.[345]\..*(value|dense)", True),
        (r"(.*?\.)?encoder\.layer\.\d+", True),
        ("(a+)+", False),
        ("(a|a)*", False),
        ("(a{1,9}){1,9}", False),
        (".*.*.*.*x", False),
        (r"(a)\1", False),
        ("(", False),
        ("a" * 501, False),
        # Exponential without a repetition of a group.
        (".?" * 150 + "!", False),
        (".{0,500}" * 40 + "!", False),
        ("(|a)" * 100 + "!", False),
        ("(?:.|.)" * 60 + "!", False),
        ("(?=" + ".?" * 150 + "!)", False),
        ("(?>" + ".?" * 150 + "!)", False),
        ("(" + ".?" * 60 + "!)?", False),
        # Python refuses this with an error of another type.
        ("a{99999999999}", False),
    ],
)
def test_patterns_of_a_server_are_quick(pattern: str, quick: bool) -> None:
    assert is_quick_pattern(pattern) is quick


@pytest.mark.parametrize("value", [{"rank": 10**5000}, {"task": "x" * 10_000}])
def test_a_refusal_shows_no_endless_value(value: dict[str, Any]) -> None:
    with pytest.raises(FedLoRAError) as caught:
        device_config(value, MINE)
    assert len(str(caught.value)) < 2000
