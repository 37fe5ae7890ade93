"""Keys of the task and its records."""

from __future__ import annotations

from dataclasses import dataclass

from fedlora_flwr.config.keys import (
    ANY,
    Decider,
    above,
    at_least,
    between,
    choice,
    key,
)

_DEVICE, _LIMITED, _RUN, _PACKAGE = Decider.DEVICE, Decider.LIMITED, Decider.RUN, Decider.PACKAGE
_READS = "It selects which private records are read, or how."
_WHOLE = "A device trains on all of its records, so nothing splits them."
_SERVER = "Only the server reads it."


@dataclass(frozen=True)
class TaskKeys:
    """What is learned, on which backbone."""

    task: str = key(
        "digits", ANY, "what is learned: a task's name, or your own as module:function",
        _DEVICE, "It chooses the code that reads the records.",
    )  # fmt: skip
    model: str = key(
        "", ANY, "transformers or timm model: a name, or a folder",
        _DEVICE, "A model can mix records, and its files can hold code and templates.",
    )  # fmt: skip
    weights: str = key(
        "pretrained", ANY, "pretrained, random, or a file for a timm model",
        _DEVICE, "It can name a file of the device.",
    )  # fmt: skip
    quantization: str = key(
        "none", choice("none", "8bit", "4bit"), "of a transformers backbone, on CUDA GPUs",
        _DEVICE, "It depends on the device's hardware.",
    )  # fmt: skip
    pooling: str = key(
        "model", choice("model", "mean"),
        "texts: classify by the model's own state, or by the mean",
        _RUN, "Both ways treat each record on its own.",
    )  # fmt: skip


@dataclass(frozen=True)
class DataKeys:
    """Which records there are, and how they are read."""

    dataset: str = key(
        "", ANY, "files, a folder, or the name of a data set on the hub", _DEVICE, _READS
    )
    dataset_subset: str = key(
        "", ANY, "folder in the data set, or the hub's configuration name", _DEVICE, _READS
    )
    train_split: str = key("train", ANY, "split with the private records", _DEVICE, _READS)
    test_split: str = key(
        "validation", ANY, "public splits to evaluate on, e.g. 'a,b'",
        _DEVICE, "Figures on private records are not protected; naming a split asks for them.",
        on_device="",
    )  # fmt: skip
    input_columns: str = key(
        "", ANY, "columns to learn from, e.g. 'premise,hypothesis'", _DEVICE, _READS
    )
    label_column: str = key("label", ANY, "column with the class", _DEVICE, _READS)
    num_classes: int = key(
        0, between(0, 1_000_000), "classes; 0 = those of the private records",
        _DEVICE, "Counted from the records, it would tell the largest class.",
    )  # fmt: skip
    class_names: str = key(
        "", ANY, "names of the classes in the order of their numbers, e.g. 'negative,positive'",
        _DEVICE, "Taken from the records, the order would differ between devices.",
    )  # fmt: skip
    train_limit: int = key(
        0, at_least(0), "private records to use, drawn at random; 0 = all", _DEVICE, _READS
    )
    test_limit: int = key(
        0, at_least(0), "records of each public split to use; 0 = all",
        _DEVICE, "A limit of one would tell one record's figures.",
    )  # fmt: skip
    max_length: int = key(
        128, between(8, 1_000_000), "tokens of a record that are read",
        _LIMITED, "Devices must agree on it; it costs memory and time.",
    )  # fmt: skip
    image_size: int = key(
        0, between(0, 4_096), "height and width of pictures; 0 = the model's own",
        _LIMITED, "Devices must agree on it; it costs memory and time.",
    )  # fmt: skip
    eval_batch_size: int = key(
        256, at_least(1), "records in a forward pass of an evaluation",
        _DEVICE, "It depends on the device's memory.",
    )  # fmt: skip
    eval_every: int = key(
        1, at_least(1), "rounds from one evaluation by the server to the next", _RUN, _SERVER
    )


@dataclass(frozen=True)
class PartitionKeys:
    """How a simulation splits the records over its clients."""

    partitioner: str = key(
        "dirichlet", ANY, "how a simulation splits the records over clients",
        _PACKAGE, _WHOLE, on_device="iid",
    )  # fmt: skip
    dirichlet_alpha: float = key(
        0.5, above(0), "Dirichlet concentration; small = unequal", _PACKAGE, _WHOLE
    )
    min_records: int = key(
        40, at_least(1), "records that the smallest simulated client has",
        _PACKAGE, _WHOLE, on_device=1,
    )  # fmt: skip
    classes_per_client: int = key(
        2, at_least(1), "pathological, shard: classes, or shards, of each client",
        _PACKAGE, _WHOLE,
    )  # fmt: skip
    partition_column: str = key(
        "", ANY, "column that the partitioner splits by; empty = the label", _PACKAGE, _WHOLE
    )
    partition_sizes: str = key(
        "", ANY, "size: records of each client, e.g. '100,200,300'", _PACKAGE, _WHOLE
    )
    label_shares: str = key(
        "", ANY,
        "label-shares: each client's shares of the classes, e.g. '0.9,0.1; 0.1,0.9; 0.5,0.5'",
        _PACKAGE, _WHOLE,
    )  # fmt: skip
