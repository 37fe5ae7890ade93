"""A run's rows, read as they are written: each call reads only what is new."""

from __future__ import annotations

import json
import time
from collections import Counter, deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from fedlora_flwr.server.rounds import RoundRow
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.strategies.cohort import DECLINED
from fedlora_flwr.wire import CLIENT

_KEPT = 5
"""Failures that are kept, the last ones."""


@dataclass(frozen=True)
class Seen:
    """The last row of a client.

    Parameters
    ----------
    row : dict
        The row of ``clients.jsonl``.
    at : float or None
        When it was written, in seconds since the epoch; None if it was there before.
    """

    row: dict[str, Any]
    at: float | None


class Followed:
    """What a run has written so far.

    Parameters
    ----------
    run_dir : RunDirectory
        The run's folder.

    Attributes
    ----------
    last : RoundRow or None
        The last round's row.
    clients : dict[str, Seen]
        The last row of each client, by name.
    failures : deque[str]
        The last failures, each with its round.
    failed : int
        Number of failures in all rounds.
    failed_by : Counter[str]
        Number of failures of each client, by name.
    suspects : dict[str, int]
        Rounds in which a client was suspect, by name.
    declined : dict[str, int]
        The round since which a client takes no part for lack of budget, by name.
    """

    def __init__(self, run_dir: RunDirectory) -> None:
        self.run_dir = run_dir
        self._forget()

    def _forget(self) -> None:
        self.last: RoundRow | None = None
        self.clients: dict[str, Seen] = {}
        self.failures: deque[str] = deque(maxlen=_KEPT)
        self.failed = 0
        self.failed_by: Counter[str] = Counter()
        self.suspects: dict[str, int] = {}
        self.declined: dict[str, int] = {}
        self._read: dict[str, int] = {}

    def new_rounds(self) -> list[RoundRow]:
        """Read what is new, and return the rounds that have ended since the last call."""
        if any(self._size(name) < size for name, size in self._read.items()):
            self._forget()  # A run that continues has cut its files to a checkpoint.
        first = not self._read
        for told in self._new("clients"):
            self.clients[str(told[CLIENT])] = Seen(told, None if first else time.time())
        rounds = [cast("RoundRow", row) for row in self._new("rounds")]
        for row in rounds:
            self.last = row
            lines = [*row.get("failures", ()), *row.get("declined", ())]
            self.failed += len(row.get("failures", ()))
            self.failed_by.update(line.partition(": ")[0] for line in row.get("failures", ()))
            self.failures.extend(f"round {row['round']}: {line}" for line in lines)
            for line in row.get("declined", ()):
                self.declined[line.removesuffix(f": {DECLINED}")] = row["round"]
            for name in row.get("suspects", ()):
                self.suspects[name] = self.suspects.get(name, 0) + 1
        for name in [name for name, since in self.declined.items() if self._took_part(name, since)]:
            del self.declined[name]
        return rounds

    def _took_part(self, name: str, since: int) -> bool:
        """Tell whether a client has trained after a round: a run that continues asks it again."""
        seen = self.clients.get(name)
        return seen is not None and seen.row.get("round", 0) > since

    def _file(self, name: str) -> Path:
        return self.run_dir.path / f"{name}.jsonl"

    def _size(self, name: str) -> int:
        file = self._file(name)
        return file.stat().st_size if file.exists() else 0

    def _new(self, name: str) -> list[dict[str, Any]]:
        """Return the whole rows that were written since the last call."""
        begin = self._read.setdefault(name, 0)
        if not self._file(name).exists():
            return []
        with self._file(name).open("rb") as stream:
            stream.seek(begin)
            whole, _, _ = stream.read().rpartition(b"\n")
        if not whole:
            return []
        self._read[name] = begin + len(whole) + 1
        return [json.loads(line) for line in whole.split(b"\n") if line]
