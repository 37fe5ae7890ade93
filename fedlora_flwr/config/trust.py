"""Checks of a run's settings against its trust model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fedlora_flwr.config.keys import dashed
from fedlora_flwr.errors import InvalidValue

if TYPE_CHECKING:
    from fedlora_flwr.config.run_config import RunConfig

LOCAL, SECURE_SUM = "local", "secure-sum"
ANYBODY = "any"
"""Value of ``peers`` that replaces a list: the server is trusted not to invent clients."""
_HERE = f"where trust-model = {SECURE_SUM!r}"


def check_trust(config: RunConfig) -> None:
    """Refuse settings that contradict the trust model.

    Raises
    ------
    InvalidValue
        There is such a setting. The error names it and the allowed values.
    """
    rows = _of_a_sum(config) if config.trust_model == SECURE_SUM else _of_clients(config)
    for name, good, allowed in rows:
        if not good:
            raise InvalidValue(dashed(name), getattr(config, name), allowed)


def _of_clients(config: RunConfig) -> Iterator[tuple[str, Any, str]]:
    """Yield the conditions if each client adds all of its noise: name, whether it holds, words."""
    for name in ("sample_rate", "dropouts", "colluding", "sum_records"):
        yield name, not getattr(config, name), f"0, or trust-model = {SECURE_SUM!r}"


def _of_a_sum(config: RunConfig) -> Iterator[tuple[str, Any, str]]:
    """Yield the conditions under a secure sum: name, whether it holds, allowed values in words."""
    yield (
        "sample_rate",
        config.sample_rate,
        f"a number above 0 {_HERE}: all clients draw their records, or users, with one q",
    )
    yield (
        "local_steps",
        config.local_steps == 1,
        f"1 {_HERE}: after a first step, a record also influences the gradients of all others, "
        "which the noise of one sum does not cover",
    )
    yield (
        "epsilon",
        math.isfinite(config.epsilon),
        f"a finite number {_HERE}; for a run without noise set trust-model = 'local'",
    )
    yield (
        "weighting",
        config.weighting == "uniform",
        f"'uniform' {_HERE}: all records have the same weight in a sum",
    )
    allowed = f"true {_HERE}: a head that stays with its client is not in the sum"
    yield "share_head", config.share_head, allowed
    yield (
        "client_ranks",
        not config.client_ranks,
        f"empty {_HERE}: arrays of different shapes cannot be added",
    )
    yield (
        "robust",
        config.robust in ("auto", "none"),
        f"'auto' or 'none' {_HERE}: the server sees no single upload and cannot leave one out",
    )
    yield (
        "server_optimizer",
        config.server_optimizer == "none",
        f"'none' {_HERE}: there the server steps by the opened sum, and the step has its own keys, "
        "optimizer, momentum and the learning rates",
    )
    most = config.num_clients - 1 - config.colluding
    yield (
        "dropouts",
        not config.num_clients or config.dropouts <= most,  # 0 = not counted yet.
        f"at most num-clients - 1 - colluding = {most}: one client must be left to add noise",
    )
