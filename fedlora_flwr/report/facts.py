"""What a report knows of a run: the content of the files in its folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.plan import ComponentPlan

Rows = Sequence[Mapping[str, Any]]
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class RunFacts:
    """What a run has left in its folder.

    Parameters
    ----------
    name : str
        Name of the folder.
    config : RunConfig
        Its configuration.
    summary : Mapping[str, Any]
        ``summary.json``; a run that was killed has a short one, and one that is at work has none.
    rounds, clients : Sequence[Mapping[str, Any]]
        Rows of ``rounds.jsonl`` and of ``clients.jsonl``.
    split : Mapping[str, Any]
        ``split.json``, which a run on one machine has.
    audit : Mapping[str, Any]
        ``audit.json``, if an audit is attached.
    samples : Mapping[str, Any]
        ``samples.json``, if a language model wrote answers.
    public : bool (default: False)
        Whether the report is for others, without clients, split, answers and paths (see
        `for_others`).
    """

    name: str
    config: RunConfig
    summary: Mapping[str, Any]
    rounds: Rows
    clients: Rows = ()
    split: Mapping[str, Any] = field(default_factory=dict)
    audit: Mapping[str, Any] = field(default_factory=dict)
    samples: Mapping[str, Any] = field(default_factory=dict)
    public: bool = False

    def for_others(self) -> RunFacts:
        """Return what may be handed out: no client by name, no split, answer, error or path."""
        hidden = ("error", "suspects")
        told = {key: value for key, value in self.summary.items() if key not in hidden}
        told |= {"simulated": self.simulated, "num_clients": self.num_clients}
        return replace(self, name="", summary=told, clients=(), split={}, samples={}, public=True)

    @property
    def metric(self) -> str:
        """Name of the task's metric."""
        return str(self.summary.get("metric") or self._guessed)

    @property
    def _guessed(self) -> str:
        known = {"round", "seconds", "loss"}
        first = self.rounds[0] if self.rounds else {}
        return next((name for name in first if name not in known), "accuracy")

    @property
    def title(self) -> str:
        """What the run is, in a line."""
        config = self.config
        budget = f"ε = {config.epsilon:g}" if config.private else "no privacy"
        return f"{config.task}, {config.strategy}, {budget}, seed {config.seed}"

    @property
    def status(self) -> str:
        """How the run ended; a run without a summary is still at work, or was killed."""
        return str(self.summary.get("status", "not ended"))

    @property
    def simulated(self) -> bool:
        """Whether one machine simulated the clients; only such a run has a split of its own."""
        return bool(self.summary.get("simulated", bool(self.split)))

    @property
    def num_clients(self) -> int:
        """How many clients took part, as far as the files tell."""
        heard = len({row["client"] for row in self.clients})
        return int(self.summary.get("num_clients") or self.config.num_clients or heard)

    def points(self, name: str, part: str | None = None) -> Points:
        """Return a figure by round, where it is a finite number.

        Parameters
        ----------
        name : str
            The figure's name in ``rounds.jsonl``.
        part : str, optional
            Key of the figure's part if it has parts.
        """
        found = []
        for row in self.rounds:
            value = row.get(name)
            if part is not None:
                value = value.get(part) if isinstance(value, Mapping) else None
            if (here := number(value)) is not None:
                found.append((float(row["round"]), here))
        return found

    def last_of_clients(self) -> dict[str, Mapping[str, Any]]:
        """Return the last row of each client, in the order of their names."""
        found = {str(row["client"]): row for row in self.clients}
        return dict(sorted(found.items()))

    def modes(self) -> list[list[str]]:
        """Return the factors of each block by round; nothing where the plan treats all alike."""
        blocks, plans = len(self.summary.get("blocks") or ()), []
        for row in self.rounds[1:]:
            try:
                plan = ComponentPlan.parse(str(row.get("plan", "")))
                plan.check(blocks)
            except InvalidValue:
                return []
            plans.append(plan)
        if blocks < 2 or not any(len(step) == blocks for plan in plans for step in plan.steps):
            return []
        return [[plan.factors_of_round(block) for block in range(blocks)] for plan in plans]


def number(value: object) -> float | None:
    """Return a finite number, or None for anything else that a row may hold."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None
