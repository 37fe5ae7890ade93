"""The run directory: everything a run leaves behind."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, cast

from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.files import FileTrouble, private_folder, replace_file, to_json, write_json
from fedlora_flwr.operating_system import READERS, abandoned, host_sign, try_lock
from fedlora_flwr.places import is_held, tracker_names
from fedlora_flwr.server.rounds import RoundRow
from fedlora_flwr.server.rows_file import RowsFile

CLAIM = "FEDLORA_CLAIM"
"""Environment variable with the claim of the run that this process works for."""
ROWS = ("rounds", "clients")
REPORT, SPLIT, AUDIT = "report.html", "split.json", "audit.json"
SAMPLES = "samples.json"
_CLAIM = ".claim"
AT_REST = "a run that no other process is working on"
"""What a folder must hold where a run is to continue, in the words of the refusal."""
NOISE = "FEDLORA_LARGEST_NOISE"
"""Environment variable with the most noise of a client, from the start of a simulation."""
_RESULTS = (
    "config.toml",
    "rounds.jsonl",
    "clients.jsonl",
    "summary.json",
    "run.log",
    "adapter",
    "best",
    AUDIT,
    SPLIT,
    SAMPLES,
    REPORT,
)


class RunDirectory:
    """Files of one run.

    ``config.toml`` (resolved), ``rounds.jsonl``, ``clients.jsonl``, ``summary.json``,
    ``report.html``, ``run.log``, ``adapter/`` and ``best/``; on one machine ``split.json``, too;
    and ``samples.json`` where a language model writes answers.

    Parameters
    ----------
    path : Path
        The folder; made if missing, and then for its owner alone. One that is there is only read
        until a run takes it, so it may be an archive that cannot be written to.
    claim : str, optional
        The claim of a run that several processes write to; a new one if empty.
    resume : bool (default: False)
        Whether a run continues that has begun in the folder.

    Attributes
    ----------
    claim : str
        What the folder's ``.claim`` holds after `take`.
    """

    def __init__(self, path: Path, claim: str = "", *, resume: bool = False) -> None:
        if resume and not has_begun(path):
            raise InvalidValue("resume", str(path), "the folder of a run that has begun")
        self.path = path if path.is_dir() else private_folder(path)
        self.claim = claim or secrets.token_hex(16)
        self.resume = resume
        self._rows = {name: RowsFile(self.path / f"{name}.jsonl") for name in ROWS}

    @classmethod
    def new(cls, parent: Path, config: RunConfig) -> RunDirectory:
        """Make ``<parent>/<time>-<task>-<strategy>`` and point ``<parent>/latest`` at it."""
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        name = f"{stamp}-{config.task}-{config.strategy}".replace(":", ".")
        path, count = private_folder(parent) / name, 1
        while True:
            try:
                path.mkdir(mode=0o700)
                break
            except FileExistsError:
                count += 1
                path = parent / f"{name}-{count}"
            except OSError as error:
                raise FileTrouble.of(error, path) from error
        link = parent / f".latest-{os.getpid()}"
        try:
            link.unlink(missing_ok=True)
            link.symlink_to(path.name, target_is_directory=True)
            link.replace(parent / "latest")
        except OSError as error:
            raise FileTrouble.of(error, parent / "latest") from error
        return cls(path)

    def take(self) -> None:
        """Take the folder for this run permanently; do nothing if this run has it already.

        Raises
        ------
        InvalidValue
            The folder is another run's, which is left as it is.
        FileTrouble
            This process cannot write to the folder.
        """
        marker, told = private_folder(self.path) / _CLAIM, f"{self.claim}\n{host_sign()}"
        if self._claimed()[0] == self.claim:
            return
        if self.resume:
            with self.working():  # Not while another process is at work.
                try:
                    marker.write_text(told, encoding="ascii")
                except OSError as error:
                    raise FileTrouble.of(error, marker) from error
            return
        check_unused(self.path)
        try:
            # If several runs try at once, one succeeds.
            with marker.open("x", encoding="ascii") as stream:
                stream.write(told)
        except FileExistsError:
            raise _used(self.path) from None
        except OSError as error:
            marker.unlink(missing_ok=True)  # Else the folder would seem to be another run's.
            raise FileTrouble.of(error, marker) from error

    @contextmanager
    def working(self) -> Iterator[None]:
        """Hold the folder while rounds are written to it; the kernel lets go if the process dies.

        Raises
        ------
        InvalidValue
            Another process holds the folder.
        """
        with (self.path / _CLAIM).open("r+b") as stream:
            try:
                if not (free := try_lock(stream.fileno())):
                    time.sleep(READERS)  # `abandoned` has the lock for an instant.
                    free = try_lock(stream.fileno())
            except OSError as error:
                raise FileTrouble.of(error, self.path / _CLAIM) from error
            if not free:
                allowed = f"{AT_REST}. End that process first"
                raise InvalidValue("resume", str(self.path), allowed)
            yield

    def abandoned(self) -> bool:
        """Tell whether the run has ended without a summary, as one that was killed may have.

        Nothing has been written for a minute then, and no process holds the folder. A run of
        another machine is never taken for abandoned, because its lock may not be seen from here.
        """
        names = (_CLAIM, "config.toml", "run.log", *(f"{name}.jsonl" for name in ROWS))
        files = (self.path / name for name in names)
        host = self._claimed()[1]
        return not self.summary_file.exists() and abandoned(self.path / _CLAIM, host, files)

    def ending(self) -> str | None:
        """Return in words how the run has ended, or None while it goes on."""
        if (summary := self.summary()) is not None:
            return str(summary.get("error") or summary.get("end") or "completed")
        if self.abandoned():
            return f"without a summary, probably killed; continue it with --resume {self.path}"
        return None

    def _claimed(self) -> tuple[str, str]:
        """Return the claim that the folder holds, and the sign of the machine that took it."""
        marker = self.path / _CLAIM
        text = marker.read_text(encoding="ascii") if marker.exists() else ""
        claim, _, host = text.partition("\n")
        return claim, host

    @property
    def log(self) -> Path:
        """Where Flower's and Ray's own output goes."""
        return self.path / "run.log"

    @property
    def summary_file(self) -> Path:
        """Where the summary is, once the run has ended."""
        return self.path / "summary.json"

    @property
    def adapter(self) -> Path:
        """Folder of the exported PEFT adapter."""
        return self.path / "adapter"

    @property
    def best(self) -> Path:
        """Folder of the adapter that was measured best, in the same format."""
        return self.path / "best"

    def write_config(self, config: RunConfig) -> Path:
        """Write the resolved configuration; it is a recipe that repeats the run.

        It names no folder of this run's, so that a repeated run gets its own.
        """
        target, own = self.path / "config.toml", str(self.path.resolve())
        state_dir = "" if config.state_dir == own else config.state_dir
        # An object of this process is in no file.
        trackers = ",".join(n for n in tracker_names(config.trackers) if not is_held(n))
        recipe = replace(config, run_dir="", resume="", state_dir=state_dir, trackers=trackers)
        replace_file(target, recipe.to_toml().encode())
        return target

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Append a row to ``<name>.jsonl``."""
        self._rows[name].append(f"{to_json(row)}\n".encode())

    def write_split(self, split: Mapping[str, Any]) -> None:
        """Write ``split.json``: how a run on one machine deals records out to its clients."""
        write_json(self.path / SPLIT, split)

    def durable_rows(self) -> dict[str, tuple[int, str]]:
        """Sync the files of rows; return the bytes of each, and their SHA-256."""
        return {name: rows.durable() for name, rows in self._rows.items()}

    def rewind(self, files: Mapping[str, Sequence[Any]]) -> None:
        """Cut the files of rows to what they were (`durable_rows`); forget summary and report.

        Raises
        ------
        InvalidValue
            A file is not the one that was written. Nothing is changed.
        """
        for name, (size, digest) in files.items():
            self._rows[name].check(size, digest)
        for name, (size, _) in files.items():
            self._rows[name].cut(size)
        self.summary_file.unlink(missing_ok=True)
        (self.path / REPORT).unlink(missing_ok=True)

    def clear(self) -> None:
        """Forget the rows and the summary of a run that ended before its first checkpoint."""
        nothing = {name: (0, hashlib.sha256().hexdigest()) for name in ROWS}
        self.rewind(nothing)

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Return the complete rows of ``<name>.jsonl``; none if there is no such file yet."""
        path = self.path / f"{name}.jsonl"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return [json.loads(line) for line in text.split("\n")[:-1] if line]

    def rounds(self) -> list[RoundRow]:
        """Return the complete rows of ``rounds.jsonl``."""
        return cast("list[RoundRow]", self.rows("rounds"))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json``; a reader sees all of it or nothing."""
        write_json(self.summary_file, summary)

    def summary(self) -> dict[str, Any] | None:
        """Return the summary, or None while the run has not ended."""
        if not self.summary_file.exists():
            return None
        found: dict[str, Any] = json.loads(self.summary_file.read_text(encoding="utf-8"))
        return found


def has_begun(folder: Path) -> bool:
    """Tell whether a run has taken a folder."""
    return (folder / _CLAIM).exists()


def check_unused(folder: Path) -> None:
    """Refuse a folder that a run has written to, whose results would mix with another's.

    Raises
    ------
    InvalidValue
        There is a run's file in it.
    """
    if any((folder / name).exists() for name in (_CLAIM, *_RESULTS)):
        raise _used(folder)


def _used(folder: Path) -> InvalidValue:
    return InvalidValue("run-dir", str(folder), "a folder that no other run has written to")
