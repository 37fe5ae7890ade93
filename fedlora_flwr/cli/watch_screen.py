"""What ``fedlora watch`` shows of a run: its state, its clients, and what failed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedlora_flwr.cli.watch_page import RELOAD
from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.recipes import load_recipe
from fedlora_flwr.report.facts import number
from fedlora_flwr.report.page import run_report
from fedlora_flwr.server.followed import Followed, Seen
from fedlora_flwr.server.report import facts_of
from fedlora_flwr.server.rounds import describe_round
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.terminal import Table
from fedlora_flwr.wire import EPSILON, EPSILON_BUDGET, SECONDS

MOST = 20
"""Clients that are shown: those that have the least of their budget left."""
HEADS = ("client", "last seen", "ε spent", "budget left", "seconds")


class WatchedRun:
    """A run, read from its folder.

    Parameters
    ----------
    folder : Path
        The run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self._run_dir = RunDirectory(folder)
        self._config = load_recipe(str(folder / "config.toml"))
        self._metric, self._followed = facts_of(self._run_dir).metric, Followed(self._run_dir)

    def news(self) -> Iterator[str]:
        """Yield a line on each round that has ended since the last call."""
        for row in self._followed.new_rounds():
            line = f"round {row['round']}/{self._config.num_rounds}: "
            yield plain(line + describe_round(row, self._metric))

    def lines(self, width: int | None) -> list[str]:
        """Return the lines of `screen`."""
        return screen(self._followed, self._config, self._metric, width)

    def closing(self) -> list[str]:
        """Return the table of clients, and what failed."""
        return self.lines(None)[2:]

    def ending(self) -> str | None:
        """Return in words how the run has ended, or None while it goes on."""
        ending = self._run_dir.ending()
        return None if ending is None else plain(ending)

    def page(self) -> str:
        """Return the run's report, which reloads while the run goes on."""
        reload = RELOAD if self._run_dir.ending() is None else None
        return run_report(facts_of(self._run_dir), reload)


def screen(followed: Followed, config: RunConfig, metric: str, width: int | None) -> list[str]:
    """Return the lines that show a run as it is now.

    Parameters
    ----------
    followed : Followed
        What the run has written.
    config : RunConfig
        The run.
    metric : str
        The task's metric.
    width : int, optional
        Width of the terminal in characters.
    """
    last = followed.last
    done = last["round"] if last else 0
    state = describe_round(last, metric) if last else "starting"
    lines = [
        f"{config.task}, {config.strategy}: round {done} of {config.num_rounds}",
        state,
        "",
        *clients_table(followed.clients, width, followed.declined),
    ]
    if followed.suspects:
        named = (f"{name} in {count}" for name, count in followed.suspects.items())
        lines += ["", f"Suspects, by rounds: {', '.join(named)}"]
    if followed.failures:
        heads = []
        if count := len(followed.declined):
            heads.append(f"{count} {'client' if count == 1 else 'clients'} declined")
        if followed.failed or not heads:
            heads.append(f"{followed.failed} failed replies")
        lines += ["", f"{', '.join(heads)}; the last lines:", *followed.failures]
    return [plain(line) for line in lines]


def clients_table(
    clients: Mapping[str, Seen], width: int | None, declined: Mapping[str, int] | None = None
) -> list[str]:
    """Return a row per client: those that declined, then that with the least budget left first."""
    out = declined or {}
    rest = sorted(clients.keys() - out.keys(), key=lambda name: (_left(clients[name].row), name))
    order = [*sorted(out), *rest]
    rows = [
        _declined(name, clients.get(name), out[name]) if name in out else _row(name, clients[name])
        for name in order[:MOST]
    ]
    found = Table(HEADS, rows, "<<>>>").lines(width) if rows else []
    if len(order) > MOST:
        found.append(f"and {len(order) - MOST} more clients, which have more left")
    return found


def plain(text: str) -> str:
    """Return a text without control characters, by which a name could command a terminal."""
    return "".join(sign if sign.isprintable() else "\ufffd" for sign in text)


def _row(name: str, seen: Seen) -> tuple[str, ...]:
    row = seen.row
    ago = "" if seen.at is None else f", {max(0, time.time() - seen.at):.0f} s ago"
    left = _left(row)
    return (
        name,
        f"round {row.get('round', '–')}{ago}",
        _figure(row.get(EPSILON)),
        "–" if left == float("inf") else f"{left:.2f}",
        _figure(row.get(SECONDS)),
    )


def _declined(name: str, seen: Seen | None, since: int) -> tuple[str, ...]:
    """Return the row of a client whose budget does not hold the run; it may hold a smaller one."""
    row = seen.row if seen else {}
    spent = _figure(row.get(EPSILON))
    return name, f"declined in round {since}", spent, "0 for this run", _figure(row.get(SECONDS))


def _left(row: Mapping[str, Any]) -> float:
    spent, budget = number(row.get(EPSILON)), number(row.get(EPSILON_BUDGET))
    return float("inf") if spent is None or budget is None else budget - spent


def _figure(value: object) -> str:
    found = number(value)
    return "–" if found is None else f"{found:.2f}"
