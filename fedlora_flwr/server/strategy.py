"""Build the strategy of a run from its configuration."""

from __future__ import annotations

import inspect
from typing import Any

from fedlora_flwr.algebra.server_optimizer import ServerOptimizer
from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.keys import fields_by_key
from fedlora_flwr.config.own_project import check_own_project
from fedlora_flwr.config.sections.federation import RULES
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.privacy.budget import MIN_NOISE
from fedlora_flwr.server.norm_bound import NormBound, check_known, unknown
from fedlora_flwr.strategies import FedLoRA, strategy_class
from fedlora_flwr.strategies.robust import MEAN, Robust
from fedlora_flwr.wire.limits import MOST_RECORDS, MOST_WEIGHT


def strategy_of(config: RunConfig) -> FedLoRA:
    """Make the strategy that a configuration names, for a ServerApp of your own.

    It has all that the configuration says of it: cohorts, weighting, the defense against harmful
    uploads, and the method's own settings. Where ε is finite, it refuses uploads without an ε.

    Parameters
    ----------
    config : RunConfig
        The project's configuration, ``RunConfig.of(context.run_config)``.

    Returns
    -------
    FedLoRA
        The strategy; call its `start`.

    Raises
    ------
    InvalidValue
        There is no such strategy, or it cannot use a value; a key is set that only this package's
        own ServerApp reads; or ``trust-model`` is ``"secure-sum"``, which only that app opens.

    Examples
    --------
    >>> type(strategy_of(RunConfig(strategy="ffa-lora", fraction_train=0.5))).__name__
    'FFALoRA'
    """
    check_own_project(config)
    if config.secure_sum:
        allowed = "'local' in a project of your own: only this package's own ServerApp opens sums"
        raise InvalidValue("trust-model", config.trust_model, allowed)
    check_known(config)
    made = build_strategy(config)
    made.only_private = config.private
    return made


def build_strategy(config: RunConfig) -> FedLoRA:
    """Make the configured strategy.

    Raises
    ------
    InvalidValue
        There is no such strategy, or it cannot use a value.
    """
    chosen = strategy_class(config.strategy)
    arguments: dict[str, Any] = {
        "fraction_train": config.fraction_train,
        "min_train_nodes": 1,
        "min_available_nodes": config.min_clients,
        "seed": config.seed,
        "weighting": config.weighting,
        "min_completion": config.min_completion,
        "max_rounds": config.max_rounds,
        "blocks": config.block_pattern,
        "local_steps": config.local_steps,
        "max_weight": max_weight(config),
        "share_head": config.share_head,
        **{name: getattr(config, name) for name in chosen.reads},
        **_own_settings(config, chosen),
    }
    try:
        inspect.signature(chosen).bind(**arguments)
    except TypeError as error:
        allowed = f"a class that takes FedLoRA's arguments and its own settings ({error})"
        raise InvalidValue("strategy", config.strategy, allowed) from error
    made = chosen(**arguments)
    made.by_sum = config.secure_sum
    if config.start and made.shared:
        allowed = "no value with a strategy that leaves a factor or the head with each client"
        raise InvalidValue("start", config.start, allowed)
    if config.lora_init != "random" and made.shared:
        allowed = "'random' with a strategy that leaves a factor or the head with each client"
        raise InvalidValue("lora-init", config.lora_init, allowed)
    made.robust = _robust(config)
    made.server_optimizer = ServerOptimizer(
        config.server_optimizer,
        config.server_lr,
        config.server_beta_1,
        config.server_beta_2,
        config.server_tau,
    )
    return made


def _robust(config: RunConfig) -> Robust:
    """Return what is done against bad uploads: a rule, after the norm bound where there is one."""
    if config.robust == "none":
        return Robust()
    rule = config.robust if config.robust in RULES else MEAN
    return Robust(rule, config.robust_share, None if unknown(config) else NormBound(config))


def _own_settings(config: RunConfig, chosen: type[FedLoRA]) -> dict[str, Any]:
    """Return a method's own settings by name: keys of its table, or of the configuration."""
    keys, table = fields_by_key(RunConfig), dict(config.own)
    found: dict[str, Any] = {}
    for key, entry in fields_by_key(chosen.settings).items():
        if keys.get(key) is entry:
            found[entry.name] = getattr(config, entry.name)
        elif f"{chosen.name}.{key}" in table:
            found[entry.name] = table[f"{chosen.name}.{key}"]
    return found


def max_weight(config: RunConfig) -> float:
    """Return the largest weight that a client can have, from what is public."""
    if config.weighting == "size":
        return float(MOST_RECORDS)
    # No calibration ends below the smallest σ.
    largest = config.batch_size / (MIN_NOISE * config.clip_norm)
    return min(largest * largest, MOST_WEIGHT) if config.weighting == "inverse-noise" else 1.0
