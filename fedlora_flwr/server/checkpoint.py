"""Checkpoints, from which a run continues after its server was killed: one file per round.

It holds what the server has: the global arrays, what the strategy carries from one round to the
next, averages, the server's optimizer, the configuration, and how far the files of rows are valid.
About clients it holds only what they sent. Drawing cohorts and modes needs no
state, since streams of random numbers are named by the round.

The file is a line with a SHA-256, and then arrays in safetensors' format; the rest is JSON in an
array of bytes. Nothing in it can run code. It is written beside its place, synced and renamed, and
the folder is synced. The last two are kept, so that a disk that lost the newest costs one round.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Set
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from fedlora_flwr.algebra.means import Arrays
from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.keys import Value
from fedlora_flwr.errors import FedLoRAError, InvalidValue
from fedlora_flwr.files import FileTrouble, private_folder, replace_file
from fedlora_flwr.operating_system import sync_path
from fedlora_flwr.places import is_held

FOLDER = "checkpoints"
_KEPT = 2
_FORM = "fedlora-checkpoint-"
_MAGIC = f"{_FORM}1"
_TEXT = "json"
_MAY_DIFFER = (
    "run-dir", "state-dir", "resume", "start",
    # Keys for how long the server waits, for how many clients, and for a better evaluation.
    "min-clients", "min-completion", "round-timeout",
    "early-stopping-patience", "early-stopping-threshold",
    # Who looks at the run changes nothing in it.
    "trackers",
    # Keys of the machine. Another machine may round differently.
    "device", "client-threads", "share-weights", "prefix-cache",
)  # fmt: skip


class ConfigurationChanged(FedLoRAError):
    """A run cannot continue another configuration."""


class OtherVersion(FedLoRAError):
    """A checkpoint was written by a version of this package that keeps other things in it.

    Parameters
    ----------
    differs : str
        How it differs, as the end of a sentence.
    """

    def __init__(self, differs: str) -> None:
        super().__init__(
            f"Another version of fedlora-flwr wrote this run's checkpoint: {differs}. Continue the "
            "run with that version, or begin a new run from its adapter with -c start=RUN/adapter."
        )


@dataclass(frozen=True)
class Checkpoint:
    """A run after a round.

    Parameters
    ----------
    round : int
        The round; 0 before the first.
    run : str
        Identity under which the clients' ledgers know the run.
    config : Mapping[str, Value]
        Its configuration, by key.
    fingerprint : str
        Hash of the backbone.
    files : Mapping[str, list]
        For each file of rows, its bytes and their SHA-256.
    seconds : float
        Wall time that the run has taken.
    arrays : Arrays
        The global arrays.
    strategy, average, opener, best : Mapping[str, Any]
        What they carry between rounds: arrays and plain values.
    """

    round: int
    run: str
    config: Mapping[str, Value]
    fingerprint: str
    files: Mapping[str, tuple[int, str]]
    seconds: float
    arrays: Arrays
    strategy: Mapping[str, Any]
    average: Mapping[str, Any]
    opener: Mapping[str, Any]
    best: Mapping[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Return the file's content."""
        arrays: dict[str, np.ndarray[Any, Any]] = {}
        text = json.dumps(_flat({e.name: getattr(self, e.name) for e in fields(self)}, arrays))
        arrays[_TEXT] = np.frombuffer(text.encode(), np.uint8)
        content: bytes = save(arrays)
        return f"{_MAGIC} {hashlib.sha256(content).hexdigest()}\n".encode() + content

    @classmethod
    def from_bytes(cls, content: bytes) -> Checkpoint:
        """Read a file's content.

        Raises
        ------
        ValueError
            The content is damaged.
        OtherVersion
            It is whole, and does not hold what this version keeps.
        """
        line, _, content = content.partition(b"\n")
        form, _, digest = line.decode("ascii", "replace").partition(" ")
        if not form.startswith(_FORM) or digest != hashlib.sha256(content).hexdigest():
            raise ValueError("its content has changed since it was written")
        if form != _MAGIC:
            raise OtherVersion(f"its form is {form}, and this version reads {_MAGIC}")
        arrays = load(content)
        found = _whole(json.loads(arrays[_TEXT].tobytes()), arrays)
        kept = {entry.name for entry in fields(cls)}
        needed = {entry.name for entry in fields(cls) if entry.default_factory is MISSING}
        if not needed <= found.keys() <= kept:
            differs = _differences(found.keys() - kept, needed - found.keys(), "part")
            raise OtherVersion(differs)
        return cls(**found)

    def check(self, config: RunConfig) -> None:
        """Refuse a configuration with which the run would have other results.

        Folders, patience and the machine may differ, and more rounds may follow where a client's
        plan stays what it was.

        Raises
        ------
        ConfigurationChanged
            Keys differ; the message names them.
        OtherVersion
            The version that wrote the checkpoint had other keys.
        """
        now, before = config.items(), dict(self.config)
        added, missing = (
            # A key with a dot belongs to a method, so it may come and go with the strategy.
            {key for key in ones.keys() - others.keys() if "." not in key}
            for ones, others in ((before, now), (now, before))
        )
        if added or missing:
            raise OtherVersion(_differences(added, missing, "key"))
        differ = [key for key in {**before, **now} if now.get(key) != before.get(key)]
        # An object has a new name in each call. The fingerprint tells whether the model differs.
        given = {
            key for key in differ if is_held(str(now.get(key))) and is_held(str(before.get(key)))
        }
        if changed := sorted(set(differ) - given - {*_MAY_DIFFER, "num-rounds"}):
            each = "; ".join(f"{k} = {now.get(k)!r}, was {before.get(k)!r}" for k in changed)
            raise ConfigurationChanged(
                f"The run cannot continue with another configuration: {each}. Set the old values, "
                "or begin a new run."
            )
        rounds = config.num_rounds
        if rounds < self.round:
            allowed = f"at least {self.round}, the number of rounds that are done"
            raise InvalidValue("num-rounds", rounds, allowed)
        if "num-rounds" in differ and config.private and not config.max_rounds:
            was = before["num-rounds"]
            raise InvalidValue(
                "num-rounds", rounds,
                f"{was}, as before: the noise was set for {was} rounds, which spend all of ε. To "
                "train longer, begin a new run with start = ADAPTER. If a run begins with "
                "max-rounds, its noise is set for that many rounds per client, and num-rounds may "
                "change later",
            )  # fmt: skip


class Checkpoints:
    """The checkpoints of one run.

    Parameters
    ----------
    run : Path
        The run's folder.
    """

    def __init__(self, run: Path) -> None:
        self._run = run
        self.folder = run / FOLDER

    def save(self, checkpoint: Checkpoint) -> None:
        """Keep a checkpoint, and the one before it.

        Raises
        ------
        FileTrouble
            The file cannot be written. Earlier checkpoints are left unchanged.
        """
        folder = private_folder(self.folder)
        replace_file(self._file(checkpoint.round), checkpoint.to_bytes())
        try:
            sync_path(folder)
        except OSError as error:
            raise FileTrouble.of(error, folder) from error
        for number in self.rounds()[:-_KEPT]:
            self._file(number).unlink(missing_ok=True)

    def any(self) -> bool:
        """Tell whether there is a checkpoint, whole or not."""
        return bool(self.rounds())

    def last(self) -> tuple[Checkpoint, list[str]]:
        """Return the newest checkpoint that is whole, and a sentence on each newer file.

        Raises
        ------
        InvalidValue
            No checkpoint is whole.
        """
        damaged: list[str] = []
        for number in reversed(self.rounds()):
            path = self._file(number)
            try:
                return Checkpoint.from_bytes(path.read_bytes()), damaged
            except (ValueError, TypeError, KeyError, OSError) as error:
                damaged.append(
                    f"{path} cannot be used ({error}). The checkpoint before it is used instead."
                )
        allowed = "the folder of a run with a checkpoint; a run writes its first before round 1"
        if damaged:
            allowed = f"a run with an undamaged checkpoint; all those in {self.folder} are damaged"
        raise InvalidValue("resume", str(self._run), f"{allowed}. Begin a new run")

    def forget_after(self, number: int) -> None:
        """Remove files of later rounds, which are damaged."""
        for later in self.rounds():
            if later > number:
                self._file(later).unlink(missing_ok=True)

    def _file(self, number: int) -> Path:
        return self.folder / f"round-{number:07d}"

    def rounds(self) -> list[int]:
        """Return the rounds that have a checkpoint, whole or not, in ascending order."""
        found = (path.name.removeprefix("round-") for path in self.folder.glob("round-*"))
        return sorted(int(name) for name in found if name.isdecimal())


def _differences(added: Set[str], missing: Set[str], what: str) -> str:
    """Say what a checkpoint has that this version does not know, and what it lacks."""
    sides = (("has", added, "does not know"), ("lacks", missing, "has"))
    return ", and ".join(
        f"it {verb} the {what}{'' if len(names) == 1 else 's'} {', '.join(sorted(names))}, which "
        f"this version {here}"
        for verb, names, here in sides
        if names
    )


def _flat(value: Any, arrays: dict[str, np.ndarray[Any, Any]]) -> Any:
    """Return a value as JSON can hold it; its arrays go to a list of their own."""
    if isinstance(value, np.ndarray):
        name = str(len(arrays))
        arrays[name] = np.ascontiguousarray(value).reshape(value.shape)
        return {"array": name}
    if isinstance(value, Mapping):
        return {"map": {name: _flat(inner, arrays) for name, inner in value.items()}}
    if isinstance(value, list | tuple):
        return [_flat(inner, arrays) for inner in value]
    return value


def _whole(value: Any, arrays: Mapping[str, np.ndarray[Any, Any]]) -> Any:
    if isinstance(value, list):
        return [_whole(inner, arrays) for inner in value]
    if not isinstance(value, dict):
        return value
    if "array" in value:
        return arrays[value["array"]]
    return {name: _whole(inner, arrays) for name, inner in value["map"].items()}
