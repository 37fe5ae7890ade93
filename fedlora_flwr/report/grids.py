"""Charts of rows and columns: the factor of each block and round, records by client and class."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from fedlora_flwr.report.charts import framed, label, legend, runs_of
from fedlora_flwr.report.html import Markup, element, folded, table
from fedlora_flwr.report.scales import plain, thinned, ticks

MODE_NAMES = {"A": "A", "B": "B", "AB": "A and B", "": "neither"}
_WIDTH, _NAMES, _RIGHT, _FOOT = 960, 190, 16, 46
_ROW, _LETTERS, _COLUMNS = 22, 48, 30
_MOST_CELLS = 2000
MOST_ROWS, MOST_CLASSES = 60, 100
"""Blocks or clients, and classes, that a chart shows at most."""


def modes_grid(
    modes: Sequence[Sequence[str]], blocks: Sequence[str], rounds: Sequence[int]
) -> Markup:
    """Return the chart of which factor each block trained in each round.

    Parameters
    ----------
    modes : Sequence[Sequence[str]]
        The factors of each round and block: ``"A"``, ``"B"``, ``"AB"`` or ``""``.
    blocks : Sequence[str]
        Names of the blocks.
    rounds : Sequence[int]
        Numbers of the rounds.
    """
    title = "Factors that each block trained"
    wide = _wide(len(rounds))
    rows = blocks[:MOST_ROWS]
    lines = [[column[row] for column in modes] for row in range(len(rows))]
    draw = _cells if sum(len(runs_of(line)) for line in lines) <= _MOST_CELLS else _strips
    parts: list[Markup] = []
    for row, (name, line) in enumerate(zip(rows, lines, strict=True)):
        parts.append(label(_NAMES - 8, row * _ROW + 15, short(name), "end"))
        parts += draw(name, line, rounds, row * _ROW)
    bottom = len(rows) * _ROW
    marked = {int(value) for value in ticks(rounds[0], rounds[-1], 20, whole=True)}
    for column, number in enumerate(rounds):
        if number in marked or len(rounds) == 1:
            parts.append(label(_NAMES + (column + 0.5) * wide, bottom + 16, str(number)))
    parts += _names("round", "block", bottom)
    there = {mode for column in modes for mode in column}
    keys = legend((f"mode mode-{m or 'none'}", n) for m, n in MODE_NAMES.items() if m in there)
    text = f"{title}: {len(blocks)} blocks, {len(rounds)} rounds."
    return framed(title, _drawing(parts, bottom, text), keys, _shares(modes, blocks), wide=True)


def _cells(name: str, line: Sequence[str], rounds: Sequence[int], y: int) -> list[Markup]:
    """Return a box for each stretch of rounds in which a block trained the same factor."""
    wide, parts = _wide(len(rounds)), []
    for begin, end, mode in runs_of(line):
        first, last = rounds[begin], rounds[end - 1]
        when = f"round {first}" if first == last else f"rounds {first} to {last}"
        box = {
            "x": round(_NAMES + begin * wide, 1), "width": round((end - begin) * wide - 0.5, 1),
            "y": y + 1, "height": _ROW - 2, "class_": f"mode mode-{mode or 'none'}",
        }  # fmt: skip
        parts.append(
            element("rect", element("title", f"{name}, {when}: {MODE_NAMES[mode]}"), **box)
        )
        if len(rounds) <= _LETTERS and mode:
            parts += [
                label(_NAMES + (n + 0.5) * wide, y + 15, mode, class_="in")
                for n in range(begin, end)
            ]
    return parts


def _strips(name: str, line: Sequence[str], rounds: Sequence[int], y: int) -> list[Markup]:
    """Return one shape per factor, where boxes of their own would make the page too large."""
    wide, parts = _wide(len(rounds)), []
    for mode in dict.fromkeys(line):
        boxes = [
            f"M{_NAMES + begin * wide:.1f} {y + 1}h{(end - begin) * wide:.1f}v{_ROW - 2}"
            f"h-{(end - begin) * wide:.1f}z"
            for begin, end, found in runs_of(line)
            if found == mode
        ]
        text = f"{name}: {MODE_NAMES[mode]} in {line.count(mode)} of {len(line)} rounds"
        look = f"mode mode-{mode or 'none'}"
        parts.append(element("path", element("title", text), d="".join(boxes), class_=look))
    return parts


def _shares(modes: Sequence[Sequence[str]], blocks: Sequence[str]) -> Markup:
    rows = []
    for number, name in enumerate(blocks):
        counts = Counter(column[number] for column in modes)
        rows.append([name, *(str(counts[mode]) for mode in MODE_NAMES)])
    head = ["block", *(f"rounds with {name}" for name in MODE_NAMES.values())]
    return folded("Numbers", table("Rounds in which each block trained a factor", head, rows))


def split_bubbles(clients: Sequence[Mapping[str, int]], classes: Sequence[str]) -> Markup:
    """Return the chart of each client's records by class: a disk's area is their number.

    Parameters
    ----------
    clients : Sequence[Mapping[str, int]]
        Records by class, of each client.
    classes : Sequence[str]
        Names of the classes.
    """
    title = "Records by client and class"
    rows, columns = clients[:MOST_ROWS], classes[:MOST_CLASSES]
    most = max((count for client in rows for count in client.values()), default=1) or 1
    wide = _wide(len(columns))
    parts: list[Markup] = []
    for number, client in enumerate(rows):
        y = number * _ROW + _ROW / 2
        parts += [
            label(_NAMES - 8, y + 4, f"client {number}", "end"),
            element("line", class_="rule", x1=_NAMES, x2=_WIDTH - _RIGHT, y1=y, y2=y),
        ]
        for place, name in enumerate(columns):
            if count := client.get(name, 0):
                text = f"client {number}, class {name}: {plain(count)} records"
                radius = max(1.0, (_ROW / 2 - 1) * math.sqrt(count / most))
                disk = {
                    "cx": round(_NAMES + (place + 0.5) * wide, 1),
                    "cy": y,
                    "r": round(radius, 1),
                }
                parts.append(element("circle", element("title", text), class_="disk", **disk))
    bottom = len(rows) * _ROW
    for place, name in thinned([*enumerate(columns)], 20):
        parts.append(label(_NAMES + (place + 0.5) * wide, bottom + 16, short(name, 12)))
    parts += _names("class", "client", bottom)
    text = f"{title}: {len(clients)} clients, {len(classes)} classes. The largest disk is {most}."
    return framed(title, _drawing(parts, bottom, text), _counts(clients, columns), wide=True)


def _counts(clients: Sequence[Mapping[str, int]], columns: Sequence[str]) -> Markup:
    few = columns[:_COLUMNS]
    rows = [
        [str(n), str(sum(client.values())), *(str(client.get(name, 0)) for name in few)]
        for n, client in enumerate(clients[:MOST_ROWS])
    ]
    return folded("Numbers", table("Records by client and class", ["client", "all", *few], rows))


def _wide(columns: int) -> float:
    """Return the width of a column."""
    return (_WIDTH - _NAMES - _RIGHT) / columns


def _drawing(parts: Sequence[Markup], bottom: float, text: str) -> Markup:
    box = f"0 0 {_WIDTH} {bottom + _FOOT}"
    return element(
        "svg", parts, class_="cells", viewBox=box, role="img", tabindex=0, aria_label=text
    )


def _names(x: str, y: str, bottom: float) -> list[Markup]:
    middle = (_NAMES + _WIDTH) / 2
    turned = f"rotate(-90 14 {bottom / 2:.1f})"
    return [
        label(middle, bottom + 38, x, class_="name"),
        label(14, bottom / 2, y, class_="name", transform=turned),
    ]


def short(name: str, most: int = 22) -> str:
    """Return the end of a name that is too long to fit."""
    return name if len(name) <= most else f"…{name[1 - most :]}"
