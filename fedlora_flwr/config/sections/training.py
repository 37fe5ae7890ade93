"""``[training]``: local steps and the optimizer."""

from __future__ import annotations

from dataclasses import dataclass

from fedlora_flwr.config.keys import FLAG, Check, Decider, at_least, between, choice, key
from fedlora_flwr.schedules import ALLOWED, is_schedule

_DEVICE, _LIMITED, _RUN = Decider.DEVICE, Decider.LIMITED, Decider.RUN
_AFTER = "It acts on gradients that already carry the noise."
_RATE = "It acts on gradients that already carry the noise; the range keeps arrays finite."
_RATE_CHANGE = "It only lowers rates, which act on gradients that already carry the noise."
_MOST_RATE = 10_000.0
_SCHEDULE = Check(is_schedule, ALLOWED)
_OWN_SCHEDULE = Check(lambda text: not text or is_schedule(text), f"empty, or {ALLOWED}")


@dataclass(frozen=True)
class TrainingSection:
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
    gradient_checkpointing: bool = key(
        False, FLAG,
        "compute activations again in the backward pass instead of keeping them: less memory, "
        "more time",
        _DEVICE, "It depends on the device's memory.",
    )  # fmt: skip
    augmentation: str = key(
        "none", choice("none", "shift", "shift-mirror"),
        "pictures: train on views that are shifted by up to an eighth of the side, or also "
        "mirrored left to right",
        _RUN, "A view is made from one record alone, before the clip.",
    )  # fmt: skip
    views: int = key(
        1, between(1, 64),
        "augmentation: views K of each picture, whose gradients are averaged before the clip",
        _LIMITED, "The mean over views is clipped to C; it costs K times the memory and time.",
    )  # fmt: skip
    optimizer: str = key(
        "sgd", choice("sgd", "adamw", "adamw-plain"),
        "local optimizer; adamw corrects its second moment for the noise, adamw-plain does not",
        _RUN, _AFTER,
    )  # fmt: skip
    filter: str = key(
        "none", choice("none", "binomial", "laplacian", "ema", "doppler"),
        "low-pass filter on the privatized gradient", _RUN, _AFTER,
    )  # fmt: skip
    precondition: bool = key(
        False, FLAG, "multiply gradients by the inverse of the other factor's Gram matrix",
        _RUN, _AFTER,
    )  # fmt: skip
    ridge: float = key(
        0.1, between(0, 1e6), "precondition: number added to the Gram matrix's diagonal",
        _RUN, _AFTER,
    )  # fmt: skip
    lr_a: float = key(0.5, between(0, _MOST_RATE), "learning rate of factor A", _LIMITED, _RATE)
    lr_b: float = key(0.5, between(0, _MOST_RATE), "learning rate of factor B", _LIMITED, _RATE)
    lr_head: float = key(0.5, between(0, _MOST_RATE), "learning rate of the head", _LIMITED, _RATE)
    lr_schedule: str = key(
        "constant", _SCHEDULE,
        "how the rates change over rounds, e.g. 'exponential:0.99' or 'warmup:5 cosine:0'",
        _RUN, _RATE_CHANGE,
    )  # fmt: skip
    lr_schedule_a: str = key(
        "", _OWN_SCHEDULE, "schedule of lr-a; empty = lr-schedule", _RUN, _RATE_CHANGE
    )
    lr_schedule_b: str = key(
        "", _OWN_SCHEDULE, "schedule of lr-b; empty = lr-schedule", _RUN, _RATE_CHANGE
    )
    lr_schedule_head: str = key(
        "", _OWN_SCHEDULE, "schedule of lr-head; empty = lr-schedule", _RUN, _RATE_CHANGE
    )
    momentum: float = key(0.0, between(0, 0.999), "momentum of sgd", _RUN, _AFTER)
    weight_decay: float = key(
        0.0, between(0, 1_000), "weight decay of the trained parameters", _RUN, _AFTER
    )
