"""The run configuration: the only place that reads, checks and writes its keys.

A key of ``[tool.flwr.app.config]`` is the name of a field of `RunConfig` with dashes.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeAlias

from fedlora_flwr.errors import InvalidValue, one_of

Value: TypeAlias = bool | int | float | str
_Check = tuple[Callable[[Any], bool], str]


def _above(low: float) -> _Check:
    return lambda value: value > low and math.isfinite(value), f"a number above {low}"


def _at_least(low: float) -> _Check:
    return lambda value: value >= low and math.isfinite(value), f"a number >= {low}"


def _between(low: float, high: float) -> _Check:
    return lambda value: low <= value <= high, f"a number from {low} to {high}"


def _choice(*names: str) -> _Check:
    return lambda value: value in names, "one of " + ", ".join(map(repr, names))


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


_NEW_BASIS = "factors of two rounds are in different bases, and have no mean"
_FOLDS = "part of each round's model is folded into frozen weights, and has no mean"
_NO_AVERAGE = {
    "fedsvd": _NEW_BASIS,
    "flexlora": _NEW_BASIS,
    "flora": _FOLDS,
    "fedex-lora": _FOLDS,
    "fedsa-lora": "models stay with the clients, and are evaluated there",
}

_ANY: _Check = (lambda _: True, "anything")
_PATTERN: _Check = (_is_pattern, "a regular expression")
_BUDGET: _Check = (lambda value: value > 0, "a number above 0, or inf")


def _key(default: Value, check: _Check, about: str) -> Any:
    return field(default=default, metadata={"check": check, "about": about})


@dataclass(frozen=True)
class RunConfig:
    """Everything that defines a run, checked.

    Make one with `RunConfig.of`; a field's comment is the ``about`` text of its key.

    Raises
    ------
    InvalidValue
        A value is of the wrong type or out of range, or two values contradict each other.
    """

    task: str = _key(
        "digits", _ANY, "what is learnt: a task's name, or your own as module:function"
    )
    model: str = _key("", _ANY, "transformers or timm model: a name, or a folder")
    weights: str = _key("pretrained", _ANY, "pretrained, random, or a file for a timm model")
    quantization: str = _key(
        "none", _choice("none", "8bit", "4bit"), "of a transformers backbone, on CUDA GPUs"
    )
    pooling: str = _key(
        "model",
        _choice("model", "mean"),
        "texts: classify by the model's own state, or by the mean",
    )
    dataset: str = _key("", _ANY, "files, a folder, or the name of a data set on the hub")
    dataset_subset: str = _key("", _ANY, "folder in the data set, or the hub's configuration name")
    train_split: str = _key("train", _ANY, "split with the private records")
    test_split: str = _key("validation", _ANY, "public splits to evaluate on, e.g. 'a,b'")
    input_columns: str = _key("", _ANY, "columns to learn from, e.g. 'premise,hypothesis'")
    label_column: str = _key("label", _ANY, "column with the class")
    num_classes: int = _key(0, _at_least(0), "classes; 0 = those of the private records")
    class_names: str = _key("", _ANY, "names of the classes in order, e.g. 'no,yes'")
    train_limit: int = _key(0, _at_least(0), "private records to use, drawn at random; 0 = all")
    test_limit: int = _key(0, _at_least(0), "records of each public split to use; 0 = all")
    max_length: int = _key(128, _at_least(8), "tokens of a record that are read")
    image_size: int = _key(0, _at_least(0), "height and width of pictures; 0 = the model's own")
    eval_batch_size: int = _key(256, _at_least(1), "records in a forward pass of an evaluation")
    eval_every: int = _key(1, _at_least(1), "rounds from one evaluation by the server to the next")

    partitioner: str = _key("dirichlet", _ANY, "how a simulation splits the records over clients")
    dirichlet_alpha: float = _key(0.5, _above(0), "Dirichlet concentration; small = unequal")
    min_records: int = _key(40, _at_least(1), "records that the smallest simulated client has")
    classes_per_client: int = _key(
        2, _at_least(1), "pathological, shard: classes, or shards, of each client"
    )
    partition_column: str = _key(
        "", _ANY, "column that the partitioner splits by; empty = the label"
    )
    partition_sizes: str = _key("", _ANY, "size: records of each client, e.g. '100,200,300'")

    strategy: str = _key("rolora", _ANY, "which LoRA factors train, and how they are averaged")
    num_clients: int = _key(10, _at_least(1), "clients that `fedlora run` and `simulate` make")
    min_clients: int = _key(2, _at_least(1), "clients that must be connected for a round")
    num_rounds: int = _key(20, _at_least(1), "rounds T")
    fraction_train: float = _key(1.0, _between(1e-9, 1), "share of the clients in each round")
    weighting: str = _key(
        "uniform", _choice("uniform", "size", "inverse-noise"), "weights of the clients' means"
    )
    average_decay: float = _key(
        0.0,
        _between(0, 0.9999),
        "evaluate and keep a moving average of the rounds; 0 = the last",
    )
    min_completion: float = _key(0.5, _between(0, 1), "share of a round's clients that must answer")
    round_timeout: float = _key(3600.0, _above(0), "seconds to wait for a round's replies")
    curvature: str = _key(
        "none", _choice("none", "secant"), "as-lora: weigh scores by the loss's curvature"
    )
    blocks: str = _key("", _PATTERN, "as-lora: pattern of block names; empty = known families")
    seed: int = _key(42, _at_least(0), "seed of partition, adapters and cohorts")

    rank: int = _key(4, _at_least(1), "LoRA rank r")
    client_ranks: str = _key(
        "", _ANY, "flexlora: simulated clients' ranks in turn, e.g. '2,4,8'; empty = rank"
    )
    lora_alpha: float = _key(8.0, _above(0), "LoRA scaling is lora-alpha / rank")
    lora_dropout: float = _key(0.0, _between(0, 0.999), "dropout on the adapters' inputs")
    backbone_dropout: bool = _key(
        True, _ANY, "whether the backbone's own dropout is on in training"
    )
    lora_targets: str = _key("", _ANY, "pattern of adapted module names; empty = the task's")
    rslora: bool = _key(False, _ANY, "scale by lora-alpha / sqrt(rank)")
    train_head: bool = _key(True, _ANY, "train the task head in full")

    local_steps: int = _key(5, _at_least(1), "private steps K a client takes in a round")
    batch_size: int = _key(32, _at_least(1), "expected batch size b of a private step")
    microbatch_size: int = _key(0, _at_least(0), "records in one forward pass; 0 = all")
    optimizer: str = _key("sgd", _choice("sgd", "adamw"), "local optimiser")
    filter: str = _key(
        "none",
        _choice("none", "binomial", "laplacian", "ema", "doppler"),
        "low-pass filter on the privatised gradient",
    )
    precondition: bool = _key(False, _ANY, "solve each gradient by the other factor's Gram matrix")
    ridge: float = _key(0.1, _at_least(0), "added to that matrix's diagonal")
    lr_a: float = _key(0.5, _at_least(0), "learning rate of factor A")
    lr_b: float = _key(0.5, _at_least(0), "learning rate of factor B")
    lr_head: float = _key(0.5, _at_least(0), "learning rate of the head")
    momentum: float = _key(0.0, _between(0, 0.999), "momentum of sgd")
    weight_decay: float = _key(0.0, _at_least(0), "weight decay of what trains")

    epsilon: float = _key(8.0, _BUDGET, "privacy budget of each client; inf = no noise")
    delta: float = _key(1e-3, _between(1e-300, 1), "failure probability; below 1/n of any client")
    clip_norm: float = _key(1.0, _above(0), "C: largest norm of one record's gradient")
    max_rounds: int = _key(0, _at_least(0), "rounds a client may join; 0 = num-rounds")
    ledger_scope: str = _key(
        "run", _choice("run", "lifetime"), "what a budget covers: this run, or all runs on the data"
    )
    reproducible: bool = _key(False, _ANY, "simulations only: noise and batches follow the seed")
    secure_noise: bool = _key(False, _ANY, "noise from the operating system's generator")
    report_unprotected_metrics: bool = _key(False, _ANY, "also report figures without privacy")

    precision: str = _key(
        "fp32", _choice("fp32", "bf16"), "of the frozen backbone's products; what trains is fp32"
    )
    compile: str = _key(
        "none",
        _choice("none", "inductor", "aot_eager"),
        "backend of torch.compile for the frozen backbone",
    )
    share_weights: bool = _key(
        True, _ANY, "whether processes of a machine share the frozen weights, by a cached file"
    )
    device: str = _key("auto", _ANY, "where clients train: auto, cpu, cuda, cuda:1, …")
    client_threads: int = _key(1, _at_least(1), "CPU threads of one client")
    run_dir: str = _key("", _ANY, "absolute folder for results; empty = a new one")
    state_dir: str = _key("", _ANY, "absolute folder of the ledger; empty = the user's data folder")

    def __post_init__(self) -> None:
        for entry in fields(self):
            _check_field(entry, getattr(self, entry.name))
        if self.secure_noise and self.reproducible:
            raise InvalidValue(
                "secure-noise", True, "false where reproducible = true: such noise has no seed"
            )
        if self.weighting == "inverse-noise" and math.isinf(self.epsilon):
            raise InvalidValue("weighting", self.weighting, "another one where epsilon = inf")
        if self.max_rounds > self.num_rounds:
            raise InvalidValue("max-rounds", self.max_rounds, f"at most {self.num_rounds} rounds")
        self._check_methods()
        for key in ("run_dir", "state_dir"):
            if (folder := getattr(self, key)) and not Path(folder).is_absolute():
                raise InvalidValue(_dashed(key), folder, "an absolute path")

    def _check_methods(self) -> None:
        plain_sgd = self.optimizer == "sgd" and self.momentum == 0
        if self.precondition and self.optimizer != "sgd":
            raise InvalidValue("optimizer", self.optimizer, "'sgd' where precondition = true")
        if self.curvature == "secant" and not (
            plain_sgd and self.filter == "none" and not self.precondition
        ):
            raise InvalidValue(
                "curvature",
                self.curvature,
                "'none', or optimizer = 'sgd' with momentum = 0, filter = 'none' and precondition "
                "= false: else the noise in a step's movement is not known",
            )
        if self.quantization != "none" and self.strategy in ("flora", "fedex-lora"):
            raise InvalidValue(
                "quantization",
                self.quantization,
                f"'none' where strategy = {self.strategy!r}, which changes the frozen weights",
            )
        if self.average_decay and self.strategy in _NO_AVERAGE:
            raise InvalidValue(
                "average-decay",
                self.average_decay,
                f"0 where strategy = {self.strategy!r}: {_NO_AVERAGE[self.strategy]}",
            )
        if self.client_ranks and self.strategy != "flexlora":
            raise InvalidValue("client-ranks", self.client_ranks, "empty, or strategy = 'flexlora'")
        if not all(1 <= rank <= self.rank for rank in self._client_ranks()):
            raise InvalidValue("client-ranks", self.client_ranks, f"ranks of 1 to {self.rank}")

    def client_rank(self, partition_id: int) -> int:
        """Return the LoRA rank of a simulated client."""
        ranks = self._client_ranks()
        return ranks[partition_id % len(ranks)]

    def _client_ranks(self) -> list[int]:
        parts = [part for part in self.client_ranks.split(",") if part.strip()]
        try:
            return [int(part) for part in parts] or [self.rank]
        except ValueError as error:
            raise InvalidValue(
                "client-ranks", self.client_ranks, "whole numbers with commas between them"
            ) from error

    @classmethod
    def of(cls, *layers: Mapping[str, Any]) -> RunConfig:
        """Make a configuration from mappings of keys to values, later ones first in force.

        Raises
        ------
        InvalidValue
            A key is unknown, or a value cannot be used.
        """
        known = {_dashed(entry.name): entry for entry in fields(cls)}
        merged = {key: value for layer in layers for key, value in layer.items()}
        for key in merged:
            if key not in known:
                raise InvalidValue("configuration key", key, one_of(known, key))
        return cls(**{known[key].name: _widen(known[key], value) for key, value in merged.items()})

    @property
    def planned_steps(self) -> int:
        """Private steps that a client's budget must last for: T·K, or the declared cap."""
        return (self.max_rounds or self.num_rounds) * self.local_steps

    @property
    def private(self) -> bool:
        """Whether the run promises anything."""
        return math.isfinite(self.epsilon)

    def items(self) -> dict[str, Value]:
        """Return every key with its value."""
        return {_dashed(entry.name): getattr(self, entry.name) for entry in fields(self)}

    def to_toml(self) -> str:
        """Write the configuration in the form that ``flwr run --run-config FILE`` reads."""
        return "".join(f"{key} = {_toml(value)}\n" for key, value in self.items().items())


def read_toml(path: Path) -> dict[str, Any]:
    """Read a recipe: a flat TOML file of configuration keys.

    Raises
    ------
    InvalidValue
        The file is missing or no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # No file, no UTF-8, no TOML.
        raise InvalidValue("recipe", str(path), f"a readable TOML file ({error})") from error


def parse_overrides(pairs: Iterable[str]) -> dict[str, Any]:
    """Read ``key=value`` pairs as typed on a command line; values are TOML, or plain text.

    Raises
    ------
    InvalidValue
        A pair has no ``=``.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator:
            raise InvalidValue("-c", pair, "key=value")
        try:
            found[key.strip()] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            found[key.strip()] = text.strip()
    return found


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _type(entry: Field[Any]) -> type:
    return type(entry.default)


def _widen(entry: Field[Any], value: Any) -> Any:
    return float(value) if _type(entry) is float and type(value) is int else value


def _check_field(entry: Field[Any], value: Any) -> None:
    check, allowed = entry.metadata["check"]
    kind = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    if type(value) is not _type(entry):
        raise InvalidValue(_dashed(entry.name), value, kind[_type(entry)])
    if not check(value):
        raise InvalidValue(_dashed(entry.name), value, allowed)


def _toml(value: Value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # TOML knows no surrogate pairs, and wants DEL escaped, which JSON does not.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
