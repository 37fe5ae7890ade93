"""``[privacy]``: the privacy promise for a client's records."""

from __future__ import annotations

from dataclasses import dataclass

from fedlora_flwr.config.keys import (
    BUDGET,
    FLAG,
    PRINTABLE,
    Decider,
    at_least,
    between,
    between_or_inf,
    choice,
    key,
)
from fedlora_flwr.config.unit import RECORD, UNITS

_DEVICE, _LIMITED, _PACKAGE = Decider.DEVICE, Decider.LIMITED, Decider.PACKAGE
_WEIGHT = "A record moves the weighted sum by C at most, under any weights."
SMALLEST_WEIGHT, LARGEST_WEIGHT = 1e-3, 1e3
"""Limits of the weights with which parts enter the joint clip."""
_PROMISE = "It is the promise that the device makes to its records."


@dataclass(frozen=True)
class PrivacySection:
    """The privacy promise for a client's records."""

    epsilon: float = key(
        8.0, BUDGET, "privacy budget of each client; inf = no noise", _DEVICE, _PROMISE
    )
    delta: float = key(
        1e-3, between(1e-300, 1), "failure probability; below 1/n of any client",
        _DEVICE, _PROMISE,
    )  # fmt: skip
    unit: str = key(
        RECORD, choice(*UNITS),
        "what the promise is for: each record, or all records of each user of a client together",
        _DEVICE, _PROMISE,
    )  # fmt: skip
    max_records_per_user: int = key(
        16, between(1, 1_000_000),
        "unit = user: most records of a user that count in a step, drawn afresh for each step",
        _LIMITED, "The mean over a user's records is clipped to C; it costs memory and time.",
    )  # fmt: skip
    run_epsilon: float = key(
        0.0, at_least(0), "part of a lifetime's epsilon that one run may plan for; 0 = all",
        _DEVICE, _PROMISE,
    )  # fmt: skip
    trust_model: str = key(
        "local", choice("local", "secure-sum"),
        "local: each client adds all of its noise; secure-sum: clients share the noise, and only "
        "their sum is opened",
        _DEVICE, _PROMISE,
    )  # fmt: skip
    sample_rate: float = key(
        0.0, between(0, 1),
        "secure-sum: probability q with which each record, or user, joins a round, instead of "
        "batch-size",
        _LIMITED, "The noise is made for this rate.",
    )  # fmt: skip
    dropouts: int = key(
        0, between(0, 1_000_000), "secure-sum: clients of a round that may fail to answer",
        _LIMITED, "More dropouts make each client's share of the noise larger.",
    )  # fmt: skip
    colluding: int = key(
        0, between(0, 1_000_000), "secure-sum: clients of a round that may side with the server",
        _DEVICE, _PROMISE,
    )  # fmt: skip
    least_shares: int = key(
        1, between(1, 1_000_000),
        "secure-sum: least number of clients that share the noise, without dropouts and colluding",
        _DEVICE, _PROMISE, on_device=2,
    )  # fmt: skip
    sum_records: int = key(
        0, between(0, 1_000_000_000),
        "secure-sum: most records, or users, of all clients together, a public number; 0 = a "
        "simulation counts them",
        _LIMITED, "A client's delta must be below 1/sum-records, and the grid is made for it.",
    )  # fmt: skip
    peers: str = key(
        "", PRINTABLE,
        "secure-sum: a device's file with the identities of all devices; any = trust the server "
        "not to invent devices",
        _DEVICE, _PROMISE,
    )  # fmt: skip
    clip_norm: float = key(
        1.0, between_or_inf(1e-6, 1e6),
        "C: largest norm of the gradient of one record, or user; inf = no clipping, only with "
        "epsilon = inf",
        _LIMITED, "Noise is drawn in units of C; the range keeps the product exact.",
        device_check=between(1e-6, 1e6),
    )  # fmt: skip
    clip_weight_a: float = key(
        1.0, between(SMALLEST_WEIGHT, LARGEST_WEIGHT),
        "what A's gradients are multiplied by before the joint clip, and divided by after the "
        "noise",
        _LIMITED, _WEIGHT,
    )  # fmt: skip
    clip_weight_b: float = key(
        1.0, between(SMALLEST_WEIGHT, LARGEST_WEIGHT), "the same for B", _LIMITED, _WEIGHT
    )
    clip_weight_head: float = key(
        1.0, between(SMALLEST_WEIGHT, LARGEST_WEIGHT),
        "the same for the head; below 1 leaves more of C to the adapters", _LIMITED, _WEIGHT,
    )  # fmt: skip
    max_rounds: int = key(
        0, between(0, 1_000_000), "most rounds that a client may join; 0 = num-rounds",
        _LIMITED, "The noise is made for all planned steps, which the ledger reserves.",
    )  # fmt: skip
    ledger_scope: str = key(
        "run", choice("run", "lifetime"),
        "what a budget covers: this run, or all runs on the data",
        _DEVICE, _PROMISE, on_device="lifetime",
    )  # fmt: skip
    reproducible: bool = key(
        False, FLAG, "simulations only: noise and batches follow the seed",
        _DEVICE, "Anyone who knows the seed knows the noise.",
    )  # fmt: skip
    secure_noise: bool = key(
        False, FLAG, "noise from the operating system's generator",
        _DEVICE, "It chooses the source of the noise.",
    )  # fmt: skip
    exact_passes: bool = key(
        False,
        FLAG,
        "fill up passes over texts, so that shapes tell nothing, and check the model in each round",
        _PACKAGE,
        "If a server chose the arrays, rounding could tell how long other records are.",
        on_device=True,
    )
    report_unprotected_metrics: bool = key(
        False, FLAG, "also report figures without privacy",
        _DEVICE, "Such figures are outside the promise.",
    )  # fmt: skip
