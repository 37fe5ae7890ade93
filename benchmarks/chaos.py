"""What both parts of the soak have in common: a run, and kills of processes that are drawn."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from benchmarks.marked import by_kind


@dataclass
class Chaos:
    """A run that is killed and continued.

    Parameters
    ----------
    folder : Path
        An empty folder.
    mark : str
        What all processes of the run have in their environment.
    rounds : int
        Rounds of the run.
    kills : int
        The most kills. After them the run is left alone.
    seed : int
        Decides who is killed, and when.
    say : callable
        Shows one sentence.

    Attributes
    ----------
    spared : tuple[str, ...]
        Kinds of processes that are never killed.
    killed : Counter
        Kills by kind of process.
    """

    spared: ClassVar[tuple[str, ...]] = ()
    folder: Path
    mark: str
    rounds: int
    kills: int
    seed: int
    say: Callable[[str], object]
    killed: Counter[str] = field(default_factory=Counter, init=False)

    @property
    def stride(self) -> int:
        """Rounds from one kill to the next, so that kills are spread over the run."""
        return max(self.rounds // max(self.kills, 1), 1)

    @property
    def over(self) -> bool:
        """Whether there were as many kills as there may be."""
        return self.killed.total() >= self.kills

    def kill_one(self, draw: random.Random) -> str:
        """Kill a process that is drawn; return its kind, or nothing if it has just ended."""
        found = {kind: all_ for kind, all_ in by_kind(self.mark).items() if kind not in self.spared}
        if not found:
            return ""
        kind = draw.choice(sorted(found))
        try:
            os.kill(draw.choice(found[kind]), signal.SIGKILL)
        except ProcessLookupError:
            return ""
        self.killed[kind] += 1
        return kind
