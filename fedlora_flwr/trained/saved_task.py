"""``fedlora.toml`` in an adapter's folder: what it takes to build its task again.

A run's ``config.toml`` says this too, and more, but an adapter's folder travels without it. Both
may come from somebody else, so of both only the keys of a task and its records are read, and no
strategy's code is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedlora_flwr.config import RunConfig, read_toml
from fedlora_flwr.config.names import by_section, by_short_name
from fedlora_flwr.config.toml import toml_value
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.files import replace_file
from fedlora_flwr.lora.exported import public_name

NAME = "fedlora.toml"
KEYS = (
    *("task", "model", "weights", "quantization", "pooling", "max-length", "max-new-tokens"),
    *("image-size", "split-qkv", "input-columns", "label-column", "num-classes", "class-names"),
    *("precision", "seed"),
)
"""Keys on which a task's model depends, and those that say how a record is read."""
_FILES = ("model", "weights")
_RECORDS = (
    *("dataset", "dataset-subset", "train-split", "test-split", "train-limit", "test-limit"),
    *("generation-limit", "eval-batch-size", "partition-column", "device"),
)
"""Keys that a run's configuration has beside those."""
READ = (*KEYS, *_RECORDS)
"""Every key that a command on a saved adapter follows."""


def write_task(folder: Path, config: RunConfig, classes: Sequence[str]) -> None:
    """Write the settings of an adapter's task beside it, without folders of this machine.

    Parameters
    ----------
    folder : Path
        The adapter's folder.
    config : RunConfig
        The run.
    classes : Sequence[str]
        Names of the classes in the order of their numbers; none if the task has no classes.
    """
    values = {key: config.items()[key] for key in KEYS}
    values.update({key: public_name(str(values[key])) for key in _FILES if values[key]})
    if classes and not any("," in name or name != name.strip() for name in classes):
        values["class-names"], values["num-classes"] = ",".join(classes), len(classes)
    parts = [
        f"[{section}]\n" + "".join(f"{key} = {toml_value(values[key])}\n" for key in keys)
        for section, keys in by_section(KEYS).items()
    ]
    replace_file(folder / NAME, "\n".join(parts).encode())


def read_task(folder: Path) -> RunConfig:
    """Return the settings of an adapter's task.

    Parameters
    ----------
    folder : Path
        An adapter's folder, or that of a merged model. For an adapter, the configuration of the run
        in the folder above has precedence, because it knows where the model is on this machine.

    Raises
    ------
    InvalidValue
        There are no such settings.
    """
    run, own = folder.resolve().parent / "config.toml", folder / NAME
    written = _values(own, KEYS)
    # What is beside a merged model need not be the run that it came from.
    of_run = _values(run, READ) if is_adapter(folder) else {}
    if not written and not of_run:
        allowed = f"the folder of a run, or of an adapter with {NAME}"
        raise InvalidValue("adapter", str(folder), allowed)
    if of_run:
        kept = ("num-classes", "class-names")
        written = {key: written[key] for key in kept if key in written}
    return RunConfig.received(of_run, written)


def is_adapter(folder: Path) -> bool:
    """Tell whether a folder holds an adapter in PEFT's format."""
    return (folder / "adapter_config.json").is_file()


def _values(file: Path, keys: Sequence[str]) -> dict[str, Any]:
    found = by_short_name(read_toml(file)) if file.is_file() else {}
    return {key: value for key, value in found.items() if key in keys}
