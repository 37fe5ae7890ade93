"""``[data]``: the records, and how they are read."""

from __future__ import annotations

from dataclasses import dataclass

from fedlora_flwr.config.keys import ANY, Decider, at_least, between, key

_DEVICE = Decider.DEVICE
_READS = "It selects which private records are read, or how."


@dataclass(frozen=True)
class DataSection:
    """The records, and how they are read."""

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
    user_column: str = key(
        "", ANY, "unit = user: column that names the user of each record", _DEVICE,
        "It decides which records are protected together.",
    )  # fmt: skip
    num_classes: int = key(
        0, between(0, 1_000_000), "number of classes; 0 = count those of the private records",
        _DEVICE, "A number that is counted from the records would tell the largest class.",
    )  # fmt: skip
    class_names: str = key(
        "", ANY, "names of the classes in the order of their numbers, e.g. 'negative,positive'",
        _DEVICE, "An order that is taken from the records would differ between devices.",
    )  # fmt: skip
    train_limit: int = key(
        0, at_least(0), "private records to use, drawn at random; 0 = all", _DEVICE, _READS
    )
    test_limit: int = key(
        0, at_least(0), "records of each public split to use; 0 = all",
        _DEVICE, "A limit of one would tell one record's figures.",
    )  # fmt: skip
    generation_limit: int = key(
        0, between(0, 1_000_000),
        "public records that the server lets a language model answer in each evaluation; 0 = none",
        Decider.PACKAGE, "A device writes no answers, which could repeat private records.",
    )  # fmt: skip
    eval_batch_size: int = key(
        256, at_least(1), "records in a forward pass of an evaluation",
        _DEVICE, "It depends on the device's memory.",
    )  # fmt: skip
