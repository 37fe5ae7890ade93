"""A run's configuration, checked.

The short name of a key is the name of a field of `RunConfig` with dashes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedlora_flwr.config.keys import Value, check_value, dashed, fields_by_key, widen
from fedlora_flwr.config.methods import OWN_KEY, PERSONAL, check_method, checked_own
from fedlora_flwr.config.names import by_section, by_short_name, full_name
from fedlora_flwr.config.sections import (
    ASLoRASection,
    DataSection,
    FederationSection,
    LoRASection,
    PartitionSection,
    PrivacySection,
    RunSection,
    TaskSection,
    TrainingSection,
)
from fedlora_flwr.config.toml import toml_value
from fedlora_flwr.config.trust import SECURE_SUM, check_trust
from fedlora_flwr.config.unit import check_unit
from fedlora_flwr.errors import InvalidValue, unknown
from fedlora_flwr.places import check_strategy_name, check_task_name, tracker_names
from fedlora_flwr.schedules import Schedule

MOST_STEPS = 1_000_000_000
"""Largest number of private steps that a run may plan for: the accountants' limit."""


@dataclass(frozen=True)
class RunConfig(
    # A dataclass takes the fields of its last base first, so the sections are in reverse order.
    RunSection,
    PrivacySection,
    TrainingSection,
    LoRASection,
    ASLoRASection,
    FederationSection,
    PartitionSection,
    DataSection,
    TaskSection,
):
    """All settings of a run, checked.

    Make one with `RunConfig.of`; on a device, use `fedlora_flwr.config.device_config`.

    Parameters
    ----------
    own : tuple[tuple[str, Value], ...]
        Settings of methods that have their own tables: pairs of key (``"table.name"``) and value.

    Raises
    ------
    InvalidValue
        A value is of the wrong type or out of range, or two values contradict each other.

    Examples
    --------
    >>> RunConfig(epsilon=3, strategy="ffa-lora").epsilon
    3.0
    >>> RunConfig.of({"num-rounds": 5}, {"lr-a": 0.1}).num_rounds
    5
    """

    own: tuple[tuple[str, Value], ...] = ()

    def __post_init__(self) -> None:
        for entry in fields_by_key(self).values():
            value = widen(entry, getattr(self, entry.name))
            object.__setattr__(self, entry.name, value)
            check_value(entry, value)
        if self.secure_noise and self.reproducible:
            raise InvalidValue(
                "secure-noise", True, "false where reproducible = true: such noise has no seed"
            )
        if self.weighting == "inverse-noise" and math.isinf(self.epsilon):
            allowed = "'uniform' or 'size' where epsilon = inf, which adds no noise"
            raise InvalidValue("weighting", self.weighting, allowed)
        if math.isinf(self.clip_norm) and self.private:
            allowed = "a finite number, to which noise is scaled, or epsilon = inf"
            raise InvalidValue("clip-norm", self.clip_norm, allowed)
        if self.max_rounds > self.num_rounds:
            allowed = f"at most num-rounds = {self.num_rounds}"
            raise InvalidValue("max-rounds", self.max_rounds, allowed)
        if self.planned_steps > MOST_STEPS:
            allowed = f"fewer: all rounds together may take {MOST_STEPS:,} steps at most"
            raise InvalidValue("local-steps", self.local_steps, allowed)
        if self.run_epsilon > self.epsilon:
            raise InvalidValue("run-epsilon", self.run_epsilon, f"at most epsilon = {self.epsilon}")
        self._check_beginning()
        self._check_methods()
        check_trust(self)
        check_unit(self)
        for key in ("run_dir", "state_dir", "resume", "start"):
            if (folder := getattr(self, key)) and not Path(folder).is_absolute():
                raise InvalidValue(dashed(key), folder, "an absolute path")

    def _check_beginning(self) -> None:
        if self.views > 1 and self.augmentation == "none":
            allowed = "1 where augmentation = 'none', since all views would be the same"
            raise InvalidValue("views", self.views, allowed)
        if self.lora_init != "random" and (self.start or self.client_ranks):
            other = "start" if self.start else "client-ranks"
            allowed = f"'random' where {other} is set, which brings other factors"
            raise InvalidValue("lora-init", self.lora_init, allowed)

    def _check_methods(self) -> None:
        if self.gradient_checkpointing and self.compile != "none":
            allowed = "'none' where gradient-checkpointing = true, which runs modules twice"
            raise InvalidValue("compile", self.compile, allowed)
        plain_sgd = self.optimizer == "sgd" and self.momentum == 0
        if self.precondition and self.optimizer != "sgd":
            raise InvalidValue("optimizer", self.optimizer, "'sgd' where precondition = true")
        if self.curvature == "secant" and not (
            plain_sgd
            and self.filter == "none"
            and not self.precondition
            and self.server_optimizer == "none"
        ):
            raise InvalidValue(
                "curvature",
                self.curvature,
                "'none', or optimizer = 'sgd' with momentum = 0, filter = 'none', precondition = "
                "false and server-optimizer = 'none': with others, the gradient and the step "
                "cannot be read off an update",
            )
        if self.groups == "layer" and self.blocks:
            raise InvalidValue("groups", self.groups, "'block' or 'tied' where blocks is set")
        if not self.share_head and not self.train_head:
            raise InvalidValue("share-head", False, "true, or train-head = true")
        if self.average_decay and not self.share_head:
            allowed = f"0 where share-head = false: {PERSONAL}"
            raise InvalidValue("average-decay", self.average_decay, allowed)
        self._check_server_optimizer()
        if not self.share_head and (key := self.asks_server_to_measure):
            raise InvalidValue(
                key, self.items()[key], f"no value with share-head = false: {PERSONAL}"
            )
        if self.early_stopping_threshold and not self.early_stopping_patience:
            allowed = "0, or early-stopping-patience above 0"
            raise InvalidValue("early-stopping-threshold", self.early_stopping_threshold, allowed)
        if not all(1 <= rank <= self.rank for rank in self._client_ranks()):
            allowed = f"ranks from 1 to rank = {self.rank}"
            raise InvalidValue("client-ranks", self.client_ranks, allowed)

    def _check_server_optimizer(self) -> None:
        if self.server_optimizer == "none":
            if self.server_lr:
                allowed = "0, or set server-optimizer, which has this learning rate"
                raise InvalidValue("server-lr", self.server_lr, allowed)
        elif not self.share_head:
            allowed = "'none' where share-head = false: each client keeps its head"
            raise InvalidValue("server-optimizer", self.server_optimizer, allowed)

    def learning_rates(self, server_round: int) -> tuple[float, float, float]:
        """Return the learning rates of A, B and the head in a round, which is counted from 1."""
        a, b, head = (s.factor(server_round, self.num_rounds) for s in self._schedules)
        return a * self.lr_a, b * self.lr_b, head * self.lr_head

    @property
    def rates_change(self) -> bool:
        """Whether a learning rate depends on the round."""
        return any(schedule != Schedule() for schedule in self._schedules)

    @property
    def _schedules(self) -> list[Schedule]:
        own = (self.lr_schedule_a, self.lr_schedule_b, self.lr_schedule_head)
        return [Schedule.parse(text or self.lr_schedule) for text in own]

    def client_rank(self, partition_id: int) -> int:
        """Return the LoRA rank of a simulated client; partitions are counted from 0."""
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
        """Make a configuration from mappings of keys to values; later mappings override earlier.

        A key is written in short (``epsilon``), in full (``privacy.epsilon``), or in the table of
        its section.

        The strategy's code is loaded only if a value depends on the strategy's abilities, or is one
        of its own settings.

        Raises
        ------
        InvalidValue
            A key is unknown or given twice in one mapping, or a value cannot be used.
        """
        config = cls.received(*layers)
        check_task_name(config.task)
        check_strategy_name(config.strategy)
        tracker_names(config.trackers)
        check_method(config)
        if not config.own:
            return config
        own = checked_own(config.strategy, dict(config.own), fields_by_key(cls))
        return replace(config, own=tuple(own.items()))

    @classmethod
    def received(cls, *layers: Mapping[str, Any]) -> RunConfig:
        """Make a configuration as a client does, without loading the strategy's code.

        Settings of methods are kept unchecked, because only the server reads them.

        Raises
        ------
        InvalidValue
            A key is unknown or given twice in one mapping, or a value cannot be used.
        """
        known = fields_by_key(cls)
        merged = {key: value for layer in layers for key, value in by_short_name(layer).items()}
        own = {key: value for key, value in merged.items() if OWN_KEY.fullmatch(key)}
        for key in merged:
            if key not in known and key not in own:
                raise unknown("configuration key", key, known, listed_by="fedlora keys")
        values = {known[k].name: v for k, v in merged.items() if k not in own}
        return cls(**values, own=tuple(own.items()))

    @property
    def planned_steps(self) -> int:
        """Number of private steps that a client's budget must cover.

        It is K local steps in each of T rounds, or of ``max-rounds`` rounds if that is set.
        """
        return (self.max_rounds or self.num_rounds) * self.local_steps

    @property
    def asks_server_to_measure(self) -> str:
        """The first key that is set and needs evaluations by the server; empty if none is."""
        keys = ("early-stopping-patience", "metric-for-best-model", "generation-limit")
        return next((key for key in keys if self.items()[key]), "")

    @property
    def block_pattern(self) -> str:
        """Pattern of block names (see `fedlora_flwr.layout.Layout`)."""
        return ".+" if self.groups == "layer" else self.blocks

    @property
    def secure_sum(self) -> bool:
        """Whether the server may see only sums of uploads."""
        return self.trust_model == SECURE_SUM

    @property
    def private(self) -> bool:
        """Whether the run has a privacy promise: whether ε is finite."""
        return math.isfinite(self.epsilon)

    def items(self) -> dict[str, Value]:
        """Return every key with its value, by its short name."""
        values = {key: getattr(self, entry.name) for key, entry in fields_by_key(self).items()}
        return {**values, **dict(self.own)}

    def to_toml(self, table: str = "") -> str:
        """Write the configuration in the form that ``flwr run --run-config FILE`` reads.

        Parameters
        ----------
        table : str (default: none)
            Prefix of each section's header, with a dot at its end.
        """
        values = {full_name(key): value for key, value in self.items().items()}
        parts = []
        for section, keys in by_section(self.items()).items():
            lines = (f"{key} = {toml_value(values[f'{section}.{key}'])}\n" for key in keys)
            parts.append(f"[{table}{section}]\n" + "".join(lines))
        return "\n".join(parts)
