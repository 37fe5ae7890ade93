"""The run directory: everything a run leaves behind."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, cast

from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.files import append, private_folder, replace_file, to_json
from fedlora_flwr.server.rounds import RoundRow

CLAIM = "FEDLORA_CLAIM"
"""Environment variable with the claim of the run that this process works for."""
NOISE = "FEDLORA_LARGEST_NOISE"
"""Environment variable with the most noise of a client, from the start of a simulation."""
_RESULTS = ("config.toml", "rounds.jsonl", "clients.jsonl", "summary.json", "run.log", "adapter")


class RunDirectory:
    """Files of one run.

    ``config.toml`` (resolved), ``rounds.jsonl``, ``clients.jsonl``, ``summary.json``, ``run.log``
    and ``adapter/``.

    Parameters
    ----------
    path : Path
        The folder; made if missing, and then for its owner alone.
    claim : str, optional
        The claim of a run that several processes write to; a new one if empty.

    Attributes
    ----------
    claim : str
        What the folder's ``.claim`` holds after `take`.
    """

    def __init__(self, path: Path, claim: str = "") -> None:
        self.path = private_folder(path)
        self.claim = claim or secrets.token_hex(16)

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
        link = parent / f".latest-{os.getpid()}"
        link.unlink(missing_ok=True)
        link.symlink_to(path.name, target_is_directory=True)
        link.replace(parent / "latest")
        return cls(path)

    def take(self) -> None:
        """Take the folder for this run, for good; do nothing where that is done.

        Raises
        ------
        InvalidValue
            The folder is another run's, which is left as it is.
        """
        marker = self.path / ".claim"
        if marker.exists() and marker.read_text(encoding="ascii") == self.claim:
            return
        check_unused(self.path)
        try:
            # If several runs try at once, one succeeds.
            with marker.open("x", encoding="ascii") as stream:
                stream.write(self.claim)
        except FileExistsError:
            raise _used(self.path) from None

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

    def write_config(self, config: RunConfig) -> Path:
        """Write the resolved configuration; it is a recipe that repeats the run.

        It names no folder of this run's, so that a repeated run gets its own.
        """
        target, own = self.path / "config.toml", str(self.path.resolve())
        state_dir = "" if config.state_dir == own else config.state_dir
        recipe = replace(config, run_dir="", state_dir=state_dir)
        replace_file(target, recipe.to_toml().encode())
        return target

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Append a row to ``<name>.jsonl``."""
        append(self.path / f"{name}.jsonl", f"{to_json(row)}\n".encode())

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
        content = to_json(summary, indent=2) + "\n"
        replace_file(self.summary_file, content.encode())

    def summary(self) -> dict[str, Any] | None:
        """Return the summary, or None while the run has not ended."""
        if not self.summary_file.exists():
            return None
        found: dict[str, Any] = json.loads(self.summary_file.read_text(encoding="utf-8"))
        return found


def check_unused(folder: Path) -> None:
    """Refuse a folder that a run has written to, whose results would mix with another's.

    Raises
    ------
    InvalidValue
        There is a run's file in it.
    """
    if any((folder / name).exists() for name in (".claim", *_RESULTS)):
        raise _used(folder)


def _used(folder: Path) -> InvalidValue:
    return InvalidValue("run-dir", str(folder), "a folder that no other run has written to")
