"""``[run]``: where and how a process runs."""

from __future__ import annotations

from dataclasses import dataclass

from fedlora_flwr.config.keys import ANY, FLAG, Decider, at_least, between, choice, key

_DEVICE, _LIMITED, _RUN, _PACKAGE = Decider.DEVICE, Decider.LIMITED, Decider.RUN, Decider.PACKAGE
_SERVER = "Only the server reads it."
_HARDWARE = "It depends on the device's hardware."


@dataclass(frozen=True)
class RunSection:
    """Where and how a process runs."""

    seed: int = key(
        42, between(0, 2**63 - 1), "seed of partition, adapters and cohorts",
        _RUN, "All devices start from the same adapters; on a device, noise never depends on it.",
    )  # fmt: skip
    eval_every: int = key(
        1, at_least(1), "rounds between two evaluations by the server", _RUN, _SERVER
    )
    early_stopping_patience: int = key(
        0, at_least(0), "evaluations without a better one after which the run ends; 0 = never",
        _RUN, _SERVER,
    )  # fmt: skip
    early_stopping_threshold: float = key(
        0.0, at_least(0), "how much better an evaluation must be for the run to wait on",
        _RUN, _SERVER,
    )  # fmt: skip
    metric_for_best_model: str = key(
        "", ANY, "metric of the evaluations that finds the best adapter; empty = the task's",
        _RUN, _SERVER,
    )  # fmt: skip
    trackers: str = key(
        "", ANY, "tensorboard, mlflow, wandb or your own module:Class, with commas between them",
        _PACKAGE, "Only the server loads and calls them.",
    )  # fmt: skip
    precision: str = key(
        "fp32", choice("fp32", "bf16", "auto"),
        "precision of the frozen backbone's products; auto = what is faster on this machine",
        _LIMITED, "Clipping and noise are fp32 in both.", device_check=choice("fp32", "bf16"),
    )  # fmt: skip
    compile: str = key(
        "none", choice("none", "inductor", "aot_eager"),
        "backend of torch.compile for the frozen backbone",
        _DEVICE, "It makes and runs code on the device.",
    )  # fmt: skip
    share_weights: bool = key(
        True, FLAG,
        "whether processes of a machine share the frozen weights through a cached file",
        _DEVICE, "It writes a file, and a device has only one process.", on_device=False,
    )  # fmt: skip
    prefix_cache: float = key(
        4.0, at_least(0),
        "size in GiB of what each process keeps of the frozen layers below the first that trains",
        _DEVICE, "Activations of private records go to the device's disk while it trains.",
        on_device=0.0,
    )  # fmt: skip
    device: str = key(
        "auto", ANY, "where clients train: auto, cpu, cuda, cuda:1, …", _DEVICE, _HARDWARE
    )
    client_threads: int = key(1, at_least(1), "CPU threads of one client", _DEVICE, _HARDWARE)
    run_dir: str = key(
        "", ANY, "absolute folder for results; empty = a new one",
        _PACKAGE, "Only the server writes results.",
    )  # fmt: skip
    resume: str = key(
        "", ANY, "absolute folder of a run to continue; empty = a new run",
        _PACKAGE, "Only the server continues; a message says which run it is.",
    )  # fmt: skip
    start: str = key(
        "", ANY, "absolute folder of a PEFT adapter to begin from; empty = fresh adapters",
        _PACKAGE, "Only the server reads it, and sends its arrays.",
    )  # fmt: skip
    state_dir: str = key(
        "", ANY, "absolute folder of the ledger; empty = the user's data folder",
        _DEVICE, "A new folder would be a new budget.",
    )  # fmt: skip
