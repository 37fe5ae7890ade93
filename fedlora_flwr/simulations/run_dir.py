"""The run directory: everything a run leaves behind."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.files import private_folder, replace_file


class RunDirectory:
    """Files of one run.

    ``config.toml`` (resolved), ``rounds.jsonl``, ``clients.jsonl``, ``summary.json``, ``run.log``
    and ``adapter/``.

    Parameters
    ----------
    path : Path
        The folder; made if missing, and then for its owner alone.
    """

    def __init__(self, path: Path) -> None:
        private_folder(path)
        self.path = path

    @classmethod
    def new(cls, parent: Path, config: RunConfig) -> RunDirectory:
        """Make ``<parent>/<time>-<task>-<strategy>`` and point ``<parent>/latest`` at it."""
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        name = f"{stamp}-{config.task.replace(':', '.')}-{config.strategy}"
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

    def check_unused(self) -> None:
        """Refuse a folder with results in it, whose rows would mix with this run's.

        Raises
        ------
        InvalidValue
            The folder holds another run's results.
        """
        if self.rows("rounds") or self.summary():
            raise InvalidValue("run-dir", str(self.path), "a folder without another run's results")

    @property
    def log(self) -> Path:
        """Where Flower's and Ray's own output goes."""
        return self.path / "run.log"

    @property
    def adapter(self) -> Path:
        """Folder of the exported PEFT adapter."""
        return self.path / "adapter"

    def write_config(self, config: RunConfig) -> Path:
        """Write the resolved configuration; it is a recipe that repeats the run."""
        target = self.path / "config.toml"
        target.write_text(config.to_toml(), encoding="utf-8")
        return target

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Append a row to ``<name>.jsonl``."""
        with (self.path / f"{name}.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(_dumps(row) + "\n")

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Return the complete rows of ``<name>.jsonl``; none if there is no such file yet."""
        path = self.path / f"{name}.jsonl"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return [json.loads(line) for line in text.split("\n")[:-1] if line]

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json`` in one piece."""
        content = _dumps(summary, indent=2) + "\n"
        replace_file(self.path / "summary.json", content.encode())

    def summary(self) -> dict[str, Any] | None:
        """Return the summary, or None while the run has not ended."""
        path = self.path / "summary.json"
        if not path.exists():
            return None
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found


def _dumps(row: Mapping[str, Any], indent: int | None = None) -> str:
    return json.dumps(_finite(row), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    """JSON has no infinity: an ε without bound is null."""
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
