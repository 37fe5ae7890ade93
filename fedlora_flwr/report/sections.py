"""The parts of one run's report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from fedlora_flwr.config.keys import fields_by_key
from fedlora_flwr.config.names import full_name
from fedlora_flwr.plan import PARTS
from fedlora_flwr.report.answers import answers_parts
from fedlora_flwr.report.charts import Chart, Line
from fedlora_flwr.report.facts import RunFacts, number
from fedlora_flwr.report.grids import modes_grid, split_bubbles
from fedlora_flwr.report.html import Markup, element, folded, joined, table
from fedlora_flwr.report.outcome import outcome
from fedlora_flwr.report.privacy import audit_parts, privacy_parts
from fedlora_flwr.report.scales import (
    BESIDE,
    duration,
    heading,
    in_words,
    percent,
    plain,
    size,
)

_OWNERS = ("task", "data", "partition", "run")
"""Sections of the configuration that name files, columns and classes of the owners."""
_MOST = 200
"""Rounds of which failures are told."""


@dataclass(frozen=True)
class Section:
    """A part of a report, with its name and its anchor."""

    anchor: str
    name: str
    parts: list[Markup]

    def __str__(self) -> str:
        """Return the part as HTML."""
        head = element("h2", self.name, id=f"{self.anchor}-name")
        return str(
            element(
                "section", head, self.parts, id=self.anchor, aria_labelledby=f"{self.anchor}-name"
            )
        )


def sections_of(facts: RunFacts) -> list[Section]:
    """Return the parts of a run's report that have something to say."""
    found = [
        Section("result", "Result", [*_tiles(facts), *_measured(facts)]),
        Section("answers", "Answers before and after", answers_parts(facts)),
        Section("privacy", "Privacy", privacy_parts(facts)),
        Section("cost", "Bytes and seconds", _cost(facts)),
        Section("choices", "Choices of factors", _choices(facts)),
        Section("uploads", "What uploads share", _uploads(facts)),
        Section("split", "How records are split", _split(facts)),
        Section("failures", "Failures and suspects", _failures(facts)),
        Section("audit", "Audit", audit_parts(facts)),
        Section("configuration", "Configuration", _configuration(facts)),
    ]
    return [section for section in found if section.parts]


def _counted(facts: RunFacts) -> Markup:
    """Say how many replies could not be used, without the names of clients."""
    counts = [
        sum(len(row.get(key) or ()) for row in facts.rounds)
        for key in ("failures", "declined", "suspects")
    ]
    failed, declined, suspect = counts
    return element(
        "p",
        f"Failed replies: {failed}. Declined for lack of budget: {declined}. Suspect uploads: "
        f"{suspect}.",
    )


def _tiles(facts: RunFacts) -> list[Markup]:
    summary, (first, last) = facts.summary, outcome(facts)
    rows: list[tuple[str, str]] = [
        (in_words(facts.metric), f"{first} → {last}"),
        ("rounds", f"{max(len(facts.rounds) - 1, 0)} of {facts.config.num_rounds}"),
    ]
    best = summary.get("best") or {}
    value = number((best.get("metrics") or {}).get(best.get("chosen_by")))
    if value is not None:
        shown = percent(value) if best["chosen_by"] == facts.metric else plain(value)
        rows.append((f"best, round {best['round']} (optimistic)", shown))
    if (spent := number(summary.get("epsilon_max"))) is not None and facts.config.private:
        budget = number(summary.get("epsilon_budget"))
        rows.append(("largest ε spent", f"{plain(spent)} of {plain(budget or math.inf)}"))
    if "bytes_up" in summary:
        rows.append(
            ("sent up, down", f"{size(summary['bytes_up'])}, {size(summary['bytes_down'])}")
        )
    if "seconds" in summary:
        rows.append(("time", duration(summary["seconds"])))
    if "num_clients" in summary:
        rows.append(("clients", str(summary["num_clients"])))
    tiles = (element("div", element("dt", name), element("dd", text)) for name, text in rows)
    remarks = summary.get("remarks") or {}
    notes = [element("p", f"{name.capitalize()}: {text}.") for name, text in remarks.items()]
    return [element("dl", tiles, class_="tiles"), *notes]


def _measured(facts: RunFacts) -> list[Markup]:
    """Return the charts of what was measured: the task's metric as a share, others as they are."""
    metric, charts = facts.metric, []
    shares = {metric, *BESIDE} - {"loss", "perplexity"}
    for name in dict.fromkeys([metric, "loss", "perplexity", *BESIDE]):
        if points := facts.points(name):
            words = in_words(name)
            shown = percent if name in shares and "loss" not in name else plain
            title = f"{heading(name)} on the public records"
            charts.append(Chart(title, "round", words, [Line(words, points)], shown))
    return _charts(charts)


def _cost(facts: RunFacts) -> list[Markup]:
    names = {"bytes_up": "up", "bytes_down": "down", "bytes_plain": "plain averaging, both ways"}
    lines = [Line(name, points) for key, name in names.items() if (points := facts.points(key))]
    charts = []
    if lines:
        title = "Bytes of arrays, all clients together"
        charts.append(Chart(title, "round", "bytes", lines, size, zero=True))
    if seconds := facts.points("seconds"):
        title = "Seconds per round, evaluation included"
        line = [Line("seconds", seconds)]
        charts.append(Chart(title, "round", "seconds", line, zero=True))
    return _charts(charts)


def _choices(facts: RunFacts) -> list[Markup]:
    modes = facts.modes()
    if not modes:
        return []
    blocks = [str(name) for name in facts.summary["blocks"]]
    return [modes_grid(modes, blocks, [int(row["round"]) for row in facts.rounds[1:]])]


def _uploads(facts: RunFacts) -> list[Markup]:
    lines = [
        Line(part if part == "head" else f"factor {part}", points)
        for part in PARTS
        if (points := facts.points("agreement", part))
    ]
    charts = []
    if lines:
        title = "Agreement of the uploads: 1 if all move alike, about 0 if they show only noise"
        charts.append(Chart(title, "round", "mean cosine of all pairs", lines))
    if error := facts.points("mean_error"):
        title = "Error of averaging factors, relative to the mean of the products"
        charts.append(Chart(title, "round", "error", [Line("error", error)], zero=True))
    return _charts(charts)


def _split(facts: RunFacts) -> list[Markup]:
    clients = facts.split.get("clients") or []
    if not clients:
        return _many(facts)
    counts = [{str(k): int(v) for k, v in one["by_class"].items()} for one in clients]
    classes = [*dict.fromkeys(name for one in counts for name in one)]
    told = (
        f"This run dealt the records out to {len(counts)} simulated clients by the partitioner "
        f"{facts.split.get('partitioner')}. These counts have no noise. If the records are "
        "private, do not hand out this page."
    )
    return [element("p", told), split_bubbles(counts, classes)]


def _many(facts: RunFacts) -> list[Markup]:
    """Say how the records of very many clients are split, which are not listed one by one."""
    sizes = facts.split.get("sizes")
    if not sizes:
        return []
    least, median, most = (plain(sizes[name]) for name in ("least", "median", "most"))
    told = (
        f"This run dealt the records out to {facts.split['num_clients']:,} simulated clients by "
        f"the partitioner {facts.split['partitioner']}. A client has {least} to {most} "
        f"{facts.split['unit']}s, and half of the clients have {median} or fewer."
    )
    return [element("p", told)]


def _failures(facts: RunFacts) -> list[Markup]:
    names = {"failures": "failed", "declined": "declined, budget spent", "suspects": "suspect"}
    rows: list[list[Any]] = []
    for row in facts.rounds:
        for key, name in names.items():
            rows += [[str(row["round"]), name, str(text)] for text in row.get(key) or ()]
    parts = []
    if facts.status != "completed":
        why = facts.summary.get("error") or "There is no summary, so it is still at work or killed."
        shown = "" if facts.public else f" {why}"
        parts.append(element("p", f"The run has the status {facts.status}.{shown}", class_="bad"))
    if facts.public:
        return [*parts, _counted(facts)]
    if not rows:
        return [*parts, element("p", "No reply failed, and no upload was suspect.")]
    caption = "Replies that could not be used, and suspects"
    if len(rows) > _MOST:
        caption += f" (the last {_MOST} of {len(rows)}; rounds.jsonl has all)"
    head = ("round", "what", "client or reason")
    return [*parts, table(caption, head, rows[-_MOST:], numbers=False)]


def _configuration(facts: RunFacts) -> list[Markup]:
    declared = fields_by_key(facts.config)
    changed: list[list[str]] = []
    rest: list[list[str]] = []
    for key, value in facts.config.items().items():
        if facts.public and full_name(key).partition(".")[0] in _OWNERS:
            continue
        row = [full_name(key), shown_value(value)]
        is_own = key in declared and value == declared[key].default
        (rest if is_own else changed).append(row)
    head = ("key", "value")
    versions: Mapping[str, Any] = facts.summary.get("versions") or {}
    installed = [[name, str(text)] for name, text in versions.items()]
    parts = [
        table("Keys that differ from their default", head, changed, numbers=False),
        folded("All other keys", table("Keys at their default", head, rest, numbers=False)),
    ]
    if installed:
        packages = table("Packages of the server", ("package", "version"), installed, numbers=False)
        parts.append(folded("Versions", packages))
    return parts


def shown_value(value: object) -> str:
    """Write a value. Of a path, only its last part is told: a report may be handed out."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    path = PurePath(text)
    return f"…/{path.name}" if path.is_absolute() else text


def _charts(charts: list[Chart]) -> list[Markup]:
    # A chart of zeros alone tells nothing.
    told = [chart for chart in charts if any(y for line in chart.lines for _, y in line.points)]
    figures: Iterator[Markup] = (chart.figure() for chart in told)
    return [element("div", joined(figures), class_="charts")] if told else []
