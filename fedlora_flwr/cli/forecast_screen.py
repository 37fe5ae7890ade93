"""Shows a forecast on a screen."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console

from fedlora_flwr.forecast.forecast import Forecast
from fedlora_flwr.forecast.participation import participation
from fedlora_flwr.terminal import Table, show, show_lines

# If there are more clients, only the smallest, the middle and the largest are shown.
_MOST_ROWS = 20

NOT_MEASURED = "not measured, because a client cannot keep the promise (see Warning)"


def show_forecast(found: Forecast, console: Console) -> None:
    """Print a forecast: clients, noise, memory, bytes, advice, warnings."""
    show(console, _clients(found))
    text = ", ".join(filter(None, [f"{len(found.clients):,}", found.config.clients_are]))
    if many := len(found.clients) > _MOST_ROWS:
        text += ": the smallest, the middle and the largest are shown"
    if many or found.config.clients_are:
        show_lines(console, [("Clients", text)])
    lines = [*(("Records", line) for line in found.read), *_lines(found)]
    if found.precision:
        lines.append(("Precision", found.precision))
    if found.broken:
        lines += [("Gradient", NOT_MEASURED), ("Time", NOT_MEASURED)]
    if found.duration:
        lines.append(("Time", str(found.duration)))
    lines.append(("Advice", found.advice.text))
    show_lines(console, [*lines, *(("Warning", text) for text in found.warnings)])


def show_budgets(found: Sequence[Forecast], console: Console) -> None:
    """Print a row for each forecast of the same run at another ε, then advice and warnings."""
    heads = ("ε", "δ", "noise multiplier σ", "noise / signal", "clients that cannot keep it")
    rows = [
        (
            _budget(one),
            f"{one.config.delta:g}" if one.config.private else "–",
            _multipliers(one),
            "–" if one.noise_to_signal is None else f"{one.noise_to_signal:.2f}",
            f"{one.broken} of {len(one.clients)}",
        )
        for one in found
    ]
    show(console, Table(heads, rows, ">>>>>"))
    lines = [("Advice", f"{_at(one)}: {one.advice.text}") for one in found]
    lines += [("Warning", f"{_at(one)}: {text}") for one in found for text in one.warnings]
    show_lines(console, lines)


def _at(found: Forecast) -> str:
    return f"at ε = {_budget(found)}" if found.config.private else "without privacy"


def _budget(found: Forecast) -> str:
    return f"{found.config.epsilon:g}" if found.config.private else "none"


def _multipliers(found: Forecast) -> str:
    """Return the least and the most σ of a client."""
    sigmas = [one.mechanism.noise_multiplier for one in found.clients if one.mechanism]
    if not sigmas:
        return "impossible"
    least, most = f"{min(sigmas):.3f}", f"{max(sigmas):.3f}"
    return least if least == most else f"{least} to {most}"


def _clients(found: Forecast) -> Table:
    named = [found.config.partition_column] if any(one.value for one in found.clients) else []
    heads = ("client", *named, f"{found.config.unit}s", "q = b/n", "σ", "steps")
    rows = sorted(enumerate(found.clients), key=lambda row: (row[1].records, row[0]))
    if len(rows) > _MOST_ROWS:
        rows = [rows[0], rows[len(rows) // 2], rows[-1]]
    else:
        rows.sort()
    cells = [
        (
            str(number),
            *([client.value] if named else []),
            f"{client.records:,}",
            f"{client.mechanism.sample_rate:.5f}" if client.mechanism else "–",
            f"{client.mechanism.noise_multiplier:.3f}" if client.mechanism else "impossible",
            str(found.config.planned_steps),
        )
        for number, client in rows
    ]
    return Table(heads, cells, ">" + "<" * len(named) + ">>>>")


def _lines(found: Forecast) -> list[tuple[str, str]]:
    config, memory = found.config, found.memory
    promise = (
        f"ε ≤ {config.epsilon:g} at δ = {config.delta:g} for each {config.unit} of a client, clip "
        f"norm {config.clip_norm:g}"
        if config.private
        else "none: epsilon = inf adds no noise"
    )
    ratio = found.noise_to_signal
    noise = "none" if ratio is None else f"{ratio:.2f} × the largest possible signal"
    stands_out = found.worst and found.worst.stands_out(len(found.clients))
    worst = f"; {found.worst}" if stands_out else ""
    norms = found.gradients.lines() if found.gradients else ()
    kept = "not known" if memory.activations is None else megabytes(memory.activations)
    rounds = participation(config)
    messages = round(rounds.mean * config.num_clients)
    return [
        ("Privacy", promise),
        ("Rounds", str(rounds)),
        (
            "Trains",
            f"{found.trained:,} parameters, {found.coordinates:,} of them in each step, in "
            f"{found.layers} layers of {found.blocks} blocks",
        ),
        ("Noise", f"in the mean of a round's uploads: {noise}{worst}"),
        *(("Gradient", line) for line in norms),
        (
            "Memory",
            f"{megabytes(memory.total)} per client: frozen weights "
            f"{megabytes(memory.backbone)}, activations {kept}, per-record gradients "
            f"{megabytes(memory.per_record)}, trained parameters {megabytes(memory.trained)}",
        ),
        (
            "Bytes",
            f"{megabytes(found.bytes_up)} up and {megabytes(found.bytes_down)} down per client and "
            f"round; {megabytes(messages * (found.bytes_up + found.bytes_down))} for the run",
        ),
    ]


def megabytes(count: float) -> str:
    """Write a number of bytes as MB, with at least two digits, or three decimals."""
    digits = max(0, 1 - math.floor(math.log10(count / 1e6))) if count > 0 else 0
    return f"{count / 1e6:,.{min(digits, 3)}f} MB"
