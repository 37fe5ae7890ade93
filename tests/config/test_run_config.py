from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from fedlora_flwr.config import RunConfig, parse_overrides
from fedlora_flwr.config.keys import fields_by_key
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.privacy.postprocessing.filters import FILTERS

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "fedlora_flwr" / "config" / "recipes" / "digits.toml"
DEFAULTS = RunConfig().items()

# Values on both sides of each limit, by key.
GOOD: dict[str, list[Any]] = {
    "quantization": ["none", "8bit", "4bit"],
    "pooling": ["model", "mean"],
    "num-classes": [0, 100],
    "train-limit": [0, 1000],
    "test-limit": [0, 1000],
    "generation-limit": [0, 1_000_000],
    "max-new-tokens": [1, 4096],
    "max-length": [8, 4096],
    "image-size": [0, 224],
    "eval-batch-size": [1],
    "eval-every": [1, 50],
    "early-stopping-patience": [0, 3],
    "early-stopping-threshold": [0.0],
    "dirichlet-alpha": [1e-3, 100.0],
    "min-records": [1],
    "classes-per-client": [1, 200],
    "num-clients": [0, 1],
    "min-clients": [1],
    "num-rounds": [1],
    "fraction-train": [1.0, 0.01],
    "weighting": ["uniform", "size", "inverse-noise"],
    "robust": ["auto", "none", "norm-bound", "trimmed-mean", "median", "krum"],
    "robust-share": [0.1, 0.49],
    "largest-noise": [0.0, 1.5, math.inf],
    "server-optimizer": ["none", "momentum", "adam", "yogi"],
    "server-lr": [0.0],
    "server-beta-1": [0.0, 0.9999],
    "server-beta-2": [0.0, 0.9999],
    "server-tau": [1e-9, 1.0],
    "average-decay": [0.0, 0.99],
    "min-completion": [0.0, 1.0],
    "round-timeout": [0.1],
    "curvature": ["none", "secant"],
    "curvature-rounds": [0, 10],
    "selection": ["sample", "argmax", "fixed"],
    "groups": ["block", "tied", "layer"],
    "temperature": [0.1, 1.0],
    "explore": [0.0, 0.5],
    "score-decay": [0.0, 0.99],
    "score-drift": [0.0, 1.0],
    "warm-up": [0.0, 1.0],
    "blocks": ["", r"stages\.\d+"],
    "seed": [0],
    "rank": [1],
    "client-ranks": [""],
    "lora-alpha": [0.1],
    "lora-dropout": [0.0, 0.5],
    "lora-init": ["random", "pissa", "olora"],
    "local-steps": [1],
    "batch-size": [1],
    "microbatch-size": [0, 8],
    "augmentation": ["none", "shift", "shift-mirror"],
    "views": [1],
    "optimizer": ["sgd", "adamw", "adamw-plain"],
    "lr-schedule": ["constant", "exponential:0.99", "warmup:5 cosine:0", "linear:1", "warmup:3"],
    "lr-schedule-a": ["", "linear:0.1"],
    "lr-schedule-b": ["", "cosine:.5"],
    "lr-schedule-head": ["", "constant"],
    "filter": list(FILTERS),
    "ridge": [0.0],
    "lr-a": [0.0, 2.0],
    "lr-b": [0.0],
    "lr-head": [0.0],
    "momentum": [0.0, 0.9],
    "weight-decay": [0.0],
    "epsilon": [0.1, math.inf],
    "delta": [1e-9],
    "run-epsilon": [0.0, 1.0],
    # With trust-model = "secure-sum": see test_trust.
    "unit": ["record", "user"],
    "max-records-per-user": [1, 1_000_000],
    "trust-model": ["local"],
    "sample-rate": [0.0],
    "dropouts": [0],
    "sum-records": [0],
    "peers": ["", "any", "peers.txt"],
    "colluding": [0],
    "least-shares": [1, 1_000_000],
    "clip-norm": [0.1, 1e-6, 1e6],
    "clip-weight-a": [0.1, 1e-3, 1e3],
    "clip-weight-b": [2.0],
    "clip-weight-head": [0.5],
    "max-rounds": [0, 20],
    "ledger-scope": ["run", "lifetime"],
    "precision": ["fp32", "bf16", "auto"],
    "compile": ["none", "inductor", "aot_eager"],
    "client-threads": [1],
    "prefix-cache": [0.0, 0.5, 100.0],
    "trackers": ["", "tensorboard", "mlflow, wandb", "my.module:Mine"],
    "run-dir": ["", "/somewhere"],
    "resume": ["", "/somewhere"],
    "start": ["", "/somewhere"],
    "state-dir": ["", "/somewhere"],
}
BAD: dict[str, list[Any]] = {
    "quantization": ["", "nf4", "16bit"],
    "pooling": ["", "max"],
    "num-classes": [-1],
    "train-limit": [-1],
    "test-limit": [-1],
    "generation-limit": [-1, 1_000_001],
    "max-new-tokens": [0, -1],
    "max-length": [7, 0, -1],
    "image-size": [-1],
    "eval-batch-size": [0],
    "eval-every": [0],
    "early-stopping-patience": [-1],
    "early-stopping-threshold": [-0.1, 0.1, math.nan, math.inf],
    "dirichlet-alpha": [0.0, -1.0, math.nan, math.inf],
    "min-records": [0],
    "classes-per-client": [0],
    "num-clients": [-1, -3],
    "min-clients": [0, -3],
    "num-rounds": [0],
    "fraction-train": [0.0, 1.01, math.nan],
    "weighting": ["", "Size"],
    "robust": ["", "mean", "Median"],
    "robust-share": [0.0, 0.5, -0.1],
    "largest-noise": [-0.1, 1e7],
    "server-optimizer": ["", "sgd", "Adam"],
    "server-lr": [-0.1, 0.5, 1e5],
    "server-beta-1": [1.0, -0.1],
    "server-beta-2": [1.0, -0.1],
    "server-tau": [0.0, 2.0],
    "average-decay": [1.0, -0.1],
    "min-completion": [-0.1, 1.1, math.nan],
    "round-timeout": [0.0, -1.0],
    "curvature": ["hessian"],
    "curvature-rounds": [-1],
    "selection": ["greedy"],
    "groups": ["head"],
    "temperature": [0.0, math.inf],
    "explore": [-0.1, 0.6],
    "score-decay": [1.0],
    "score-drift": [-0.1],
    "warm-up": [1.1],
    "blocks": ["("],
    "seed": [-1],
    "rank": [0],
    "client-ranks": ["4"],
    "lora-alpha": [0.0, math.inf],
    "lora-init": ["", "eva"],
    "lora-dropout": [-0.1, 1.0],
    "local-steps": [0],
    "batch-size": [0],
    "augmentation": ["", "flip"],
    "views": [0, -1, 65],
    "microbatch-size": [-1],
    "optimizer": ["adam"],
    "lr-schedule": [
        "",
        "exponential",
        "cosine:1.1",
        "linear:-1",
        "warmup:5 ",
        "step:0.1",
        "cosine:",
    ],
    "lr-schedule-a": [" ", "exponential:nan"],
    "lr-schedule-b": ["warmup:-1"],
    "lr-schedule-head": ["Constant"],
    "filter": ["gaussian"],
    "ridge": [-0.1],
    "lr-a": [-0.1, math.inf, math.nan],
    "lr-b": [-0.1],
    "lr-head": [-0.1],
    "momentum": [1.0, -0.1],
    "weight-decay": [-1e-9],
    "epsilon": [0.0, -1.0, math.nan],
    "delta": [0.0, 1.1, -1e-5],
    "run-epsilon": [-1.0, math.nan, 9.0],
    "unit": ["", "client"],
    "max-records-per-user": [0, -1],
    "trust-model": ["", "central"],
    "sample-rate": [-0.1, 1.1, math.nan],
    "dropouts": [-1],
    "sum-records": [-1],
    "peers": ["a\nb"],
    "colluding": [-1],
    "least-shares": [0],
    "clip-norm": [0.0, math.inf, math.nan, 1.4e-45, 1e300],
    "clip-weight-a": [0.0, -1.0, 9e-4, 1001.0, math.inf, math.nan],
    "clip-weight-b": [0.0, math.inf],
    "clip-weight-head": [-0.5, math.nan],
    "max-rounds": [-1],
    "ledger-scope": ["device"],
    "precision": ["fp16"],
    "compile": ["true", "eager"],
    "client-threads": [0],
    "prefix-cache": [-1.0],
    "trackers": ["tensorbord", "mlflow;wandb", "a module:Mine"],
    "run-dir": ["runs/mine"],
    "resume": ["runs/mine"],
    "start": ["adapter"],
    "state-dir": ["./state"],
}


def cases(table: dict[str, list[Any]]) -> list[tuple[str, Any]]:
    return [(key, value) for key, values in table.items() for value in values]


def test_the_tables_of_this_test_are_complete() -> None:
    free = {key for key, value in DEFAULTS.items() if isinstance(value, bool)} | {
        "task",
        "model",
        "weights",
        "dataset",
        "dataset-subset",
        "train-split",
        "test-split",
        "input-columns",
        "label-column",
        "user-column",
        "class-names",
        "partitioner",
        "partition-column",
        "partition-sizes",
        "label-shares",
        "strategy",
        "lora-targets",
        "metric-for-best-model",
        "device",
    }
    assert set(BAD) == set(GOOD) == set(DEFAULTS) - free


def test_keys_are_the_fields_with_dashes() -> None:
    assert [key.replace("-", "_") for key in DEFAULTS] == [
        f.name for f in fields_by_key(RunConfig).values()
    ]


@pytest.mark.parametrize(("key", "value"), cases(GOOD))
def test_values_within_the_limits(key: str, value: Any) -> None:
    assert RunConfig.of({key: value}).items() == {**DEFAULTS, key: value}


@pytest.mark.parametrize(("key", "value"), cases(BAD))
def test_values_outside_the_limits(key: str, value: Any) -> None:
    with pytest.raises(InvalidValue) as caught:
        RunConfig.of({key: value})
    assert caught.value.key == key
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("key", DEFAULTS)
def test_values_of_another_type_are_refused(key: str) -> None:
    wrong: dict[type, list[tuple[Any, str]]] = {
        bool: [(1, "true or false"), ("true", "true or false")],
        int: [(True, "a whole number"), (1.0, "a whole number"), ("1", "a whole number")],
        float: [(True, "a number"), ("0.5", "a number")],
        str: [(1, "text"), (False, "text")],
    }
    for value, allowed in wrong[type(DEFAULTS[key])]:
        with pytest.raises(InvalidValue) as caught:
            RunConfig.of({key: value})
        assert (caught.value.key, caught.value.value) == (key, value)
        assert caught.value.allowed == allowed


def test_a_whole_number_is_a_number() -> None:
    config = RunConfig.of({"epsilon": 3})
    assert config.epsilon == 3.0
    assert type(config.epsilon) is float


def test_an_unknown_key_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(InvalidValue, match=r"'num-round'.*did you mean 'num-rounds'"):
        RunConfig.of({"num-round": 3})


def test_a_field_name_is_no_key() -> None:
    with pytest.raises(InvalidValue, match=r"'num_rounds'.*did you mean 'num-rounds'"):
        RunConfig.of({"num_rounds": 3})


def test_later_layers_are_first_in_force() -> None:
    config = RunConfig.of({"rank": 2, "seed": 1}, {}, {"rank": 16})
    assert (config.rank, config.seed, config.num_rounds) == (16, 1, DEFAULTS["num-rounds"])


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"secure-noise": True, "reproducible": True}, "secure-noise"),
        ({"weighting": "inverse-noise", "epsilon": math.inf}, "weighting"),
        ({"max-rounds": 6, "num-rounds": 5}, "max-rounds"),
    ],
)
def test_values_that_contradict_each_other_are_refused(values: dict[str, Any], key: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        RunConfig.of(values)
    assert caught.value.key == key


@pytest.mark.parametrize("strategy", ["flora", "fedex-lora", "ffa-seeds"])
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_methods_that_change_frozen_weights_need_them_in_full(strategy: str, bits: str) -> None:
    with pytest.raises(InvalidValue, match=f"strategy = '{strategy}', which changes") as caught:
        RunConfig.of({"strategy": strategy, "quantization": bits})
    assert caught.value.key == "quantization"
    assert RunConfig.of({"strategy": "rolora", "quantization": bits}).quantization == bits
    assert RunConfig.of({"strategy": strategy}).quantization == "none"


def test_secure_noise_without_a_seed() -> None:
    assert RunConfig.of({"secure-noise": True}).secure_noise


@pytest.mark.parametrize(("max_rounds", "steps"), [(0, 100), (20, 100), (4, 20)])
def test_the_budget_lasts_for_the_rounds_that_a_client_may_join(
    max_rounds: int, steps: int
) -> None:
    config = RunConfig.of({"num-rounds": 20, "local-steps": 5, "max-rounds": max_rounds})
    assert config.planned_steps == steps


def test_an_infinite_budget_promises_nothing() -> None:
    assert RunConfig().private
    assert not RunConfig.of({"epsilon": math.inf}).private


@pytest.mark.parametrize("key", [k for k, v in DEFAULTS.items() if type(v) is float])
@pytest.mark.parametrize("digits", [400, 5000])
def test_a_whole_number_beyond_all_floats_is_refused_by_key(key: str, digits: int) -> None:
    for value in (10**digits, -(10**digits)):
        with pytest.raises(InvalidValue, match="a number of at most 308 digits") as caught:
            RunConfig.of({key: value})
        assert caught.value.key == key
    with pytest.raises(InvalidValue, match=f"^{key} = .*cannot be used: expected a number"):
        RunConfig.of(parse_overrides([f"{key}={'9' * digits}"]))


def test_a_whole_number_of_many_digits_is_a_number_where_it_is_one() -> None:
    assert RunConfig.of({"epsilon": 10**300}).epsilon == 1e300


@pytest.mark.parametrize(
    "strategy", ["fedsvd", "flexlora", "flora", "fedex-lora", "fedsa-lora", "ffa-seeds", "mr-mtl"]
)
def test_models_that_have_no_mean_are_not_averaged(strategy: str) -> None:
    with pytest.raises(InvalidValue, match=f"0 where strategy = '{strategy}': ") as caught:
        RunConfig.of({"strategy": strategy, "average-decay": 0.9})
    assert caught.value.key == "average-decay"
    assert RunConfig.of({"strategy": strategy}).average_decay == 0.0
