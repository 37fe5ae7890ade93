"""The table of what a run's folder on the server holds, in the style of `wire_table`."""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from fedlora_flwr.config import RunConfig
from fedlora_flwr.wire import CLIENT
from tests.deploy.wire_heard import Heard
from tests.deploy.wire_table import OPTED, PROTECTED, PUBLIC, SIDE, tells

_MODEL = (PROTECTED, "The mean of uploads, and the server's settings.")
_COUNT = (PUBLIC, "The server's own count.")
_SIZE = (PUBLIC, "Lengths of arrays, which follow from settings.")
_SETTING = (PUBLIC, "A setting of the run.")
_FIGURE = (OPTED, "On the server's public records, or the mean that devices told of theirs.")
_TIME = (SIDE, "The server's clock.")
_ACCOUNT = (SIDE, "The largest that devices told.")
_COMPARED = (PROTECTED, "The server compares uploads.")
_ANSWER = (PUBLIC, "Errors and answers, as devices told them.")
FILES = {
    ".claim": (PUBLIC, "A random number and a sign of the server's."),
    "config.toml": _SETTING,
    "rounds.jsonl": (PUBLIC, "See the rows below."),
    "clients.jsonl": (OPTED, "Values that crossed the wire, by the same names."),
    "summary.json": (PUBLIC, "See the rows below."),
    "report.html": (OPTED, "The content of the files above, as a page."),
    "adapter/*": _MODEL,
    "best/*": _MODEL,
    "checkpoints/*": _MODEL,
}
ROUNDS = {
    "round": _COUNT,
    "seconds": _TIME,
    "loss": _FIGURE,
    "accuracy": _FIGURE,
    "plan": _SETTING,
    "epsilon_max": _ACCOUNT,
    **dict.fromkeys(("clients_asked", "clients_used", "clients_absent"), _COUNT),
    **dict.fromkeys(("declined", "failures", "suspects"), _ANSWER),
    **dict.fromkeys(("bytes_down", "bytes_up", "bytes_up_adapters", "bytes_plain"), _SIZE),
    **dict.fromkeys(("agreement", "signal", "spread", "mean_error"), _COMPARED),
}
SUMMARY = {
    **dict.fromkeys(
        ("task", "strategy", "num_rounds", "metric", "robust", "seed", "reproducible_noise",
         "simulated", "weighting", "precision", "trust_model", "blocks", "remarks"),
        _SETTING,
    ),
    **dict.fromkeys(("status", "end", "num_clients", "rounds_done"), _COUNT),
    **dict.fromkeys(("failures", "declined", "suspects"), _COUNT),
    **dict.fromkeys(("initial_accuracy", "final_accuracy", "best"), _FIGURE),
    "epsilon_max": _ACCOUNT,
    "epsilon_budget": (PUBLIC, "Devices' files."),
    "delta": (PUBLIC, "Devices' files."),
    "accountant": (PUBLIC, "How ε is counted."),
    **dict.fromkeys(("bytes_down", "bytes_up", "bytes_up_adapters", "bytes_plain"), _SIZE),
    "seconds": _TIME,
    "unprotected_metrics": (PUBLIC, "Whether a device told any."),
    "versions": (PUBLIC, "The server's software."),
}  # fmt: skip


def files_of(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield every file below a folder, with its path in it."""
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            yield file.relative_to(folder).as_posix(), file


def account_for_files(
    folder: Path,
    told: dict[str, dict[str, set[Any]]],
    seen: Counter[str],
    of_rounds: Mapping[str, tuple[str, str]] = ROUNDS,
) -> list[str]:
    """Return what a run's folder holds and should not; count each row in ``seen``."""
    faults = []
    for name, _ in files_of(folder):
        known = [pattern for pattern in FILES if fnmatch(name, pattern)]
        seen.update(known)
        faults += [] if known else [f"file {name}"]
    settings = tomllib.loads((folder / "config.toml").read_text())
    short = {key for table in settings.values() for key in table}
    faults += [f"config.toml: {key}" for key in short - RunConfig().items().keys()]
    rows = [("rounds.jsonl", of_rounds, row) for row in lines(folder / "rounds.jsonl")]
    summary = json.loads((folder / "summary.json").read_text())
    for name, table, row in (*rows, ("summary.json", SUMMARY, summary)):
        seen.update(f"{name}: {key}" for key in row)
        faults += [f"{name}: {key}" for key in row.keys() - table.keys()]
    for row in lines(folder / "clients.jsonl"):
        values = told[row[CLIENT]]
        faults += [
            f"clients.jsonl: {key} = {value}"
            for key, value in row.items()
            if key != "round" and value not in values.get(key, ())
        ]
    return faults


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def table_of_files() -> dict[str, tuple[str, str]]:
    """Return all rows in one table."""
    return {
        **FILES,
        **{f"rounds.jsonl: {key}": row for key, row in ROUNDS.items()},
        **{f"summary.json: {key}": row for key, row in SUMMARY.items()},
    }


def values_of(heard: Heard) -> dict[str, set[Any]]:
    """Return every number and text of a device's reports, by its word on the wire."""
    found: dict[str, set[Any]] = {}
    for one in heard.pushed.values():
        if one.kind in ("MetricRecord", "ConfigRecord"):
            for key, value in one.items().items():
                found.setdefault(key, set()).add(value)
    return found


def number_is_told(folder: Path, number: int) -> list[str]:
    """Return the keys of a run's folder under which a number stands."""
    rows = [*lines(folder / "rounds.jsonl"), *lines(folder / "clients.jsonl")]
    rows.append(json.loads((folder / "summary.json").read_text()))
    return [key for row in rows for key, value in row.items() if tells(value, number)]
