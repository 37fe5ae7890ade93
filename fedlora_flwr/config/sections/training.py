"""Keys of the federation, the adapters and the local training."""

from __future__ import annotations

from dataclasses import dataclass

from fedlora_flwr.config.keys import (
    ANY,
    FLAG,
    PATTERN,
    QUICK_PATTERN,
    Check,
    Decider,
    above,
    at_least,
    between,
    choice,
    key,
)
from fedlora_flwr.schedules import ALLOWED, is_schedule
from fedlora_flwr.wire import WEIGHTINGS

_DEVICE, _LIMITED, _RUN, _PACKAGE = Decider.DEVICE, Decider.LIMITED, Decider.RUN, Decider.PACKAGE
_SERVER = "Only the server reads it."
_AFTER = "It acts on gradients that already carry the noise."
_RATE = "It acts on gradients that already carry the noise; the range keeps arrays finite."
_RATE_CHANGE = "It only lowers rates, which act on gradients that already carry the noise."
_MOST_RATE = 10_000.0
_SCHEDULE = Check(is_schedule, ALLOWED)
_OWN_SCHEDULE = Check(lambda text: not text or is_schedule(text), f"empty, or {ALLOWED}")


@dataclass(frozen=True)
class FederationKeys:
    """Who takes part in which round, and what becomes of the uploads."""

    strategy: str = key(
        "rolora", ANY, "which LoRA factors train, and how they are averaged",
        _RUN, "A device obeys any plan under the same private step.",
    )  # fmt: skip
    num_clients: int = key(
        10, at_least(1), "clients that `fedlora run` and `simulate` make", _RUN, _SERVER
    )
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
        "uniform", choice(*WEIGHTINGS), "weights of the clients' means",
        _DEVICE, "It decides whether the number of records, or the noise, is told.",
    )  # fmt: skip
    share_head: bool = key(
        True, FLAG, "whether clients' heads are averaged; false leaves each client its own",
        _RUN, "What stays with the client went through the same private steps.",
    )  # fmt: skip
    average_decay: float = key(
        0.0, between(0, 0.9999),
        "evaluate and keep a moving average of the rounds; 0 = the last", _RUN, _SERVER,
    )  # fmt: skip
    min_completion: float = key(
        0.5, between(0, 1), "share of a round's clients that must answer", _RUN, _SERVER
    )
    round_timeout: float = key(
        3600.0, above(0), "seconds to wait for a round's replies", _RUN, _SERVER
    )
    blocks: str = key(
        "", PATTERN, "as-lora: pattern of block names; empty = known families",
        _RUN, "A slow pattern would keep a device busy without end.", device_check=QUICK_PATTERN,
    )  # fmt: skip
    seed: int = key(
        42, between(0, 2**63 - 1), "seed of partition, adapters and cohorts",
        _RUN, "All devices start from the same adapters; noise never follows it there.",
    )  # fmt: skip


@dataclass(frozen=True)
class LoRAKeys:
    """The adapters."""

    rank: int = key(
        4, between(1, 4_096), "LoRA rank r",
        _LIMITED, "All coordinates are clipped together; it costs memory and time.",
    )  # fmt: skip
    client_ranks: str = key(
        "", ANY, "flexlora: simulated clients' ranks in turn, e.g. '2,4,8'; empty = rank",
        _PACKAGE, "It gives ranks to the partitions of a simulation.",
    )  # fmt: skip
    lora_alpha: float = key(
        8.0, between(1e-3, 1e5), "LoRA scaling is lora-alpha / rank",
        _LIMITED, "It scales gradients before they are clipped.",
    )  # fmt: skip
    lora_dropout: float = key(
        0.0, between(0, 0.999), "dropout on the adapters' inputs",
        _RUN, "Its masks come from the device's own secret generator.",
    )  # fmt: skip
    backbone_dropout: bool = key(
        True, FLAG, "whether the backbone's own dropout is on in training",
        _RUN, "Its masks come from the device's own secret generator.",
    )  # fmt: skip
    lora_targets: str = key(
        "", ANY, "pattern of adapted module names; empty = the task's",
        _LIMITED, "Any set of layers is clipped together; a slow pattern would never end.",
        device_check=QUICK_PATTERN,
    )  # fmt: skip
    split_qkv: bool = key(
        False, FLAG, "timm: adapt q, k and v of a fused qkv layer apart, as …attn.qkv.q and so on",
        _RUN, "All that trains is clipped together, however a layer is cut.",
    )  # fmt: skip
    rslora: bool = key(
        False, FLAG, "scale by lora-alpha / sqrt(rank)",
        _RUN, "It scales gradients before they are clipped.",
    )  # fmt: skip
    train_head: bool = key(
        True, FLAG, "train the task head in full",
        _RUN, "The head is clipped together with the adapters.",
    )  # fmt: skip


@dataclass(frozen=True)
class TrainingKeys:
    """Local steps and the optimizer."""

    local_steps: int = key(
        5, between(1, 100_000), "private steps K that a client takes per round",
        _LIMITED, "The noise is made for all planned steps, which the ledger reserves.",
    )  # fmt: skip
    batch_size: int = key(
        32, between(1, 10_000_000), "expected batch size b of a private step",
        _LIMITED, "The noise is made for the sampling rate b/n.",
    )  # fmt: skip
    microbatch_size: int = key(
        0, at_least(0), "records in one forward pass; 0 = all",
        _DEVICE, "It depends on the device's memory.",
    )  # fmt: skip
    optimizer: str = key(
        "sgd", choice("sgd", "adamw", "adamw-plain"),
        "local optimizer; adamw takes the noise out of its second moment, adamw-plain does not",
        _RUN, _AFTER,
    )  # fmt: skip
    filter: str = key(
        "none", choice("none", "binomial", "laplacian", "ema", "doppler"),
        "low-pass filter on the privatized gradient", _RUN, _AFTER,
    )  # fmt: skip
    precondition: bool = key(
        False, FLAG, "solve each gradient by the other factor's Gram matrix", _RUN, _AFTER
    )
    ridge: float = key(0.1, between(0, 1e6), "added to that matrix's diagonal", _RUN, _AFTER)
    lr_a: float = key(0.5, between(0, _MOST_RATE), "learning rate of factor A", _LIMITED, _RATE)
    lr_b: float = key(0.5, between(0, _MOST_RATE), "learning rate of factor B", _LIMITED, _RATE)
    lr_head: float = key(0.5, between(0, _MOST_RATE), "learning rate of the head", _LIMITED, _RATE)
    lr_schedule: str = key(
        "constant", _SCHEDULE,
        "how the rates change over rounds, e.g. 'exponential:0.99' or 'warmup:5 cosine:0'",
        _RUN, _RATE_CHANGE,
    )  # fmt: skip
    lr_schedule_a: str = key(
        "", _OWN_SCHEDULE, "that of factor A; empty = lr-schedule", _RUN, _RATE_CHANGE
    )
    lr_schedule_b: str = key(
        "", _OWN_SCHEDULE, "that of factor B; empty = lr-schedule", _RUN, _RATE_CHANGE
    )
    lr_schedule_head: str = key(
        "", _OWN_SCHEDULE, "that of the head; empty = lr-schedule", _RUN, _RATE_CHANGE
    )
    momentum: float = key(0.0, between(0, 0.999), "momentum of sgd", _RUN, _AFTER)
    weight_decay: float = key(0.0, between(0, 1_000), "weight decay of what trains", _RUN, _AFTER)
