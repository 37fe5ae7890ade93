"""Rows of ``rounds.jsonl``: the server writes one per round; screens and plots read them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypedDict, cast

from fedlora_flwr.report.scales import BESIDE, WRITTEN, in_words
from fedlora_flwr.wire import OWN_LABELS


class RoundRow(TypedDict, total=False):
    """What is known of one round.

    Round 0, before training, has metrics and seconds alone. Beside these keys a row holds the
    task's metrics, and what a strategy tells of its own (see `by_name`).

    Parameters
    ----------
    round : int
        Round, from 0.
    seconds : float
        Wall time since the row before.
    loss : float
        Mean loss on the public records, where the round was measured.
    plan : str
        The plan's wire string.
    epsilon_max : float or None
        Largest ε that a client of this round has spent; None if no client tells.
    clients_asked, clients_used, clients_absent : int
        Messages sent, uploads averaged, and nodes that are not connected any more.
    declined, failures : list[str]
        Who has spent the budget, and why other answers could not be used; one line each.
    suspects : list[str]
        Clients whose uploads look as if they were meant to do harm.
    bytes_down, bytes_up, bytes_up_adapters, bytes_plain : int
        See `fedlora_flwr.strategies.replies.RoundReport`.
    agreement, signal, spread : dict[str, float]
        How far uploads agree, by part (see `fedlora_flwr.strategies.agreement.describe`).
    rouge_l, exact_match : float
        Figures of answers that a language model wrote (`fedlora_flwr.tasks.answers.figures`).
    noise : dict[str, float]
        Norm of the noise in the mean, by part, where the weights tell it.
    mean_error : float
        Error of averaging factors, relative to the mean of the products.
    """

    round: int
    seconds: float
    loss: float
    rouge_l: float
    exact_match: float
    plan: str
    epsilon_max: float | None
    clients_asked: int
    clients_used: int
    clients_absent: int
    declined: list[str]
    failures: list[str]
    suspects: list[str]
    bytes_down: int
    bytes_up: int
    bytes_up_adapters: int
    bytes_plain: int
    agreement: dict[str, float]
    signal: dict[str, float]
    spread: dict[str, float]
    noise: dict[str, float]
    mean_error: float


OnRound = Callable[[RoundRow], None]


def by_name(row: RoundRow) -> dict[str, Any]:
    """Return the same row, for metrics whose names only the task knows."""
    return cast("dict[str, Any]", row)


def first_and_last(rows: Sequence[RoundRow], metric: str) -> dict[str, float | None]:
    """Return what a summary tells of the task's metric, and of the figures beside it.

    Parameters
    ----------
    rows : Sequence[RoundRow]
        Rows of a run, round 0 included.
    metric : str
        The task's metric. Its figures are None where it was not measured.

    Returns
    -------
    dict[str, float or None]
        ``initial_<name>`` and ``final_<name>`` of each figure. Before training no client has a
        model of its own, so the figure on own labels has no initial one.
    """
    found: dict[str, float | None] = {}
    for name in (metric, *BESIDE):
        values = [by_name(row)[name] for row in rows if name in by_name(row)]
        if name != OWN_LABELS and (values or name == metric):
            found[f"initial_{name}"] = values[0] if values else None
        if values or name == metric:
            found[f"final_{name}"] = values[-1] if values else None
    return found


def describe_round(row: RoundRow, metric: str = "accuracy") -> str:
    """Return the result of one round in one line."""
    parts = []
    if metric in row:
        parts.append(f"{in_words(metric)} {by_name(row)[metric]:.1%}")
        if metric not in WRITTEN:
            shown = (name for name in BESIDE if name in row)
            parts += [f"{in_words(name)} {by_name(row)[name]:.1%}" for name in shown]
    elif "loss" in row:
        parts.append(f"loss {row['loss']:.4f}")
    spent = row.get("epsilon_max")
    if spent is not None and math.isfinite(spent):
        parts.append(f"ε {spent:.2f}")
    if row.get("failures"):
        parts.append(f"{len(row['failures'])} failed")
    if row.get("suspects"):
        parts.append(f"suspects: {', '.join(row['suspects'])}")
    return "  ".join(parts) or "not evaluated"
