"""``[federation]``: the clients of each round, and how their uploads are combined."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedlora_flwr.algebra.optimizer_names import OPTIMIZERS
from fedlora_flwr.config.keys import (
    ANY,
    FLAG,
    PATTERN,
    QUICK_PATTERN,
    Decider,
    above,
    at_least,
    between,
    between_or_inf,
    choice,
    key,
)
from fedlora_flwr.wire import WEIGHTINGS

RULES = ("trimmed-mean", "median", "krum")
"""What may take the place of a mean of uploads (see `fedlora_flwr.strategies.robust`)."""
_DEVICE, _LIMITED, _RUN = Decider.DEVICE, Decider.LIMITED, Decider.RUN
_SERVER = "Only the server reads it."


@dataclass(frozen=True)
class FederationSection:
    """The clients of each round, and how their uploads are combined."""

    strategy: str = key(
        "rolora", ANY, "which LoRA factors train, and how they are averaged",
        _RUN, "A device obeys any plan under the same private step.",
    )  # fmt: skip
    num_clients: int = key(
        0, at_least(0),
        "clients of `fedlora run` and `simulate`; 0 = as many as the partitioner makes, or else 10",
        _RUN, _SERVER,
    )  # fmt: skip
    min_clients: int = key(
        2, at_least(1), "clients that must be connected for a round", _RUN, _SERVER
    )
    num_rounds: int = key(
        20, between(1, 1_000_000), "rounds T",
        _LIMITED, "The noise is made for all planned steps, which the ledger reserves.",
    )  # fmt: skip
    fraction_train: float = key(
        1.0, between(1e-9, 1), "share of the clients in each round", _RUN, _SERVER
    )
    weighting: str = key(
        "uniform", choice(*WEIGHTINGS), "how clients' uploads are weighted in their mean",
        _DEVICE, "It decides whether a client tells its number of records or its noise.",
    )  # fmt: skip
    share_head: bool = key(
        True, FLAG, "whether clients' heads are averaged; false leaves each client its own",
        _RUN, "What stays with the client went through the same private steps.",
    )  # fmt: skip
    robust: str = key(
        "auto", choice("auto", "none", "norm-bound", *RULES),
        "rule against harmful uploads; auto = norm-bound if the bound follows from public numbers",
        _RUN, _SERVER,
    )  # fmt: skip
    robust_share: float = key(
        0.2, between(0.01, 0.49),
        "trimmed-mean, krum: share of a round's clients that may be bad", _RUN, _SERVER,
    )  # fmt: skip
    largest_noise: float = key(
        math.inf, between_or_inf(0, 1e6),
        "largest noise multiplier of an honest client, for the norm bound; inf = not known, and "
        "simulations calculate it",
        _RUN, _SERVER,
    )  # fmt: skip
    server_optimizer: str = key(
        "none", choice(*OPTIMIZERS),
        "moves the model by the mean of the clients' updates; none = by exactly this mean",
        _RUN, _SERVER,
    )  # fmt: skip
    server_lr: float = key(
        0.0, between(0, 10_000),
        "server-optimizer: learning rate η; 0 = 1 for momentum, 0.01 for adam and yogi",
        _RUN, _SERVER,
    )  # fmt: skip
    server_beta_1: float = key(
        0.9, between(0, 0.9999),
        "server-optimizer: decay β₁ of the momentum or of the first moment", _RUN, _SERVER,
    )  # fmt: skip
    server_beta_2: float = key(
        0.99, between(0, 0.9999), "server-optimizer: decay β₂ of the second moment", _RUN, _SERVER
    )
    server_tau: float = key(
        1e-3, between(1e-9, 1),
        "server-optimizer: τ, added to the root of the second moment", _RUN, _SERVER,
    )  # fmt: skip
    average_decay: float = key(
        0.0, between(0, 0.9999),
        "weight of the past in the moving average of rounds that is evaluated and kept; 0 = the "
        "last round only",
        _RUN, _SERVER,
    )  # fmt: skip
    min_completion: float = key(
        0.5, between(0, 1), "share of a round's clients that must answer", _RUN, _SERVER
    )
    round_timeout: float = key(
        3600.0, above(0), "seconds to wait for a round's replies", _RUN, _SERVER
    )
    blocks: str = key(
        "", PATTERN, "as-lora: pattern of block names; empty = known families",
        _RUN, "A slow pattern could keep a device busy forever.", device_check=QUICK_PATTERN,
    )  # fmt: skip
