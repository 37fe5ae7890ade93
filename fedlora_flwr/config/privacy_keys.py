"""Keys of the privacy budget, and of where and how a process runs."""

from __future__ import annotations

from dataclasses import dataclass

from fedlora_flwr.config.keys import (
    ANY,
    BUDGET,
    FLAG,
    Decider,
    at_least,
    between,
    between_or_inf,
    choice,
    key,
)

_DEVICE, _LIMITED, _PACKAGE = Decider.DEVICE, Decider.LIMITED, Decider.PACKAGE
_PROMISE = "It is the promise that the device makes to its records."
_HARDWARE = "It depends on the device's hardware."


@dataclass(frozen=True)
class PrivacyKeys:
    """The promise."""

    epsilon: float = key(
        8.0, BUDGET, "privacy budget of each client; inf = no noise", _DEVICE, _PROMISE
    )
    delta: float = key(
        1e-3, between(1e-300, 1), "failure probability; below 1/n of any client",
        _DEVICE, _PROMISE,
    )  # fmt: skip
    run_epsilon: float = key(
        0.0, at_least(0), "part of a lifetime's epsilon that one run may plan for; 0 = all",
        _DEVICE, _PROMISE,
    )  # fmt: skip
    trust_model: str = key(
        "local", choice("local", "secure-sum"),
        "who adds the noise: each client all of it, or all together for a sum that alone is opened",
        _DEVICE, _PROMISE,
    )  # fmt: skip
    sample_rate: float = key(
        0.0, between(0, 1),
        "secure-sum: q with which each record of any client joins a round, in place of batch-size",
        _LIMITED, "The noise is made for this rate.",
    )  # fmt: skip
    dropouts: int = key(
        0, between(0, 1_000_000), "secure-sum: clients of a round that may fail to answer",
        _LIMITED, "Each client's share of the noise is larger for it.",
    )  # fmt: skip
    colluding: int = key(
        0, between(0, 1_000_000), "secure-sum: clients of a round that may side with the server",
        _LIMITED, "Each client's share of the noise is larger for it.",
    )  # fmt: skip
    least_shares: int = key(
        1, between(1, 1_000_000),
        "secure-sum: fewest clients, dropouts and colluding left out, that must share the noise",
        _DEVICE, _PROMISE, on_device=2,
    )  # fmt: skip
    clip_norm: float = key(
        1.0, between_or_inf(1e-6, 1e6),
        "C: largest norm of one record's gradient; inf = no clipping, where epsilon = inf",
        _LIMITED, "Noise is drawn in units of C; the range keeps the product exact.",
        device_check=between(1e-6, 1e6),
    )  # fmt: skip
    max_rounds: int = key(
        0, between(0, 1_000_000), "rounds a client may join; 0 = num-rounds",
        _LIMITED, "The noise is made for all planned steps, which the ledger reserves.",
    )  # fmt: skip
    ledger_scope: str = key(
        "run", choice("run", "lifetime"),
        "what a budget covers: this run, or all runs on the data",
        _DEVICE, _PROMISE, on_device="lifetime",
    )  # fmt: skip
    reproducible: bool = key(
        False, FLAG, "simulations only: noise and batches follow the seed",
        _DEVICE, "Whoever knows the seed knows the noise.",
    )  # fmt: skip
    secure_noise: bool = key(
        False, FLAG, "noise from the operating system's generator",
        _DEVICE, "It chooses the source of the noise.",
    )  # fmt: skip
    exact_passes: bool = key(
        False,
        FLAG,
        "fill passes over texts so that their shapes tell nothing, and check the model each round",
        _PACKAGE,
        "Arrays that a server chose could let rounding tell how long other records are.",
        on_device=True,
    )
    report_unprotected_metrics: bool = key(
        False, FLAG, "also report figures without privacy",
        _DEVICE, "Such figures are outside the promise.",
    )  # fmt: skip


@dataclass(frozen=True)
class ProcessKeys:
    """Where and how a process runs."""

    precision: str = key(
        "fp32", choice("fp32", "bf16"),
        "of the frozen backbone's products; what trains is fp32",
        _LIMITED, "Clipping and noise are fp32 in both.",
    )  # fmt: skip
    compile: str = key(
        "none", choice("none", "inductor", "aot_eager"),
        "backend of torch.compile for the frozen backbone",
        _DEVICE, "It makes and runs code on the device.",
    )  # fmt: skip
    share_weights: bool = key(
        True, FLAG,
        "whether processes of a machine share the frozen weights, by a cached file",
        _DEVICE, "It writes a file; a device's process is alone.", on_device=False,
    )  # fmt: skip
    device: str = key(
        "auto", ANY, "where clients train: auto, cpu, cuda, cuda:1, …", _DEVICE, _HARDWARE
    )
    client_threads: int = key(1, at_least(1), "CPU threads of one client", _DEVICE, _HARDWARE)
    run_dir: str = key(
        "", ANY, "absolute folder for results; empty = a new one",
        _PACKAGE, "Only the server writes results.",
    )  # fmt: skip
    state_dir: str = key(
        "", ANY, "absolute folder of the ledger; empty = the user's data folder",
        _DEVICE, "A new folder would be a new budget.",
    )  # fmt: skip
