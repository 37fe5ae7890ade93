"""The part of a report on privacy: the promise, ε by client against its budget, and an audit."""

from __future__ import annotations

import math

from fedlora_flwr.report.charts import Chart, Line
from fedlora_flwr.report.facts import RunFacts, number
from fedlora_flwr.report.html import Markup, element, folded, table
from fedlora_flwr.report.promise import promise
from fedlora_flwr.report.scales import duration, plain, thinned
from fedlora_flwr.wire import EPSILON_BUDGET

FIRST, MOST = 30, 500
"""Clients that are shown at once, and at most."""
_HEAD = ("client", "share", "ε", "budget", "δ", "last round", "seconds")


def privacy_parts(facts: RunFacts) -> list[Markup]:
    """Return the promise, the chart of ε by round, and the table of clients."""
    told = element("p", promise(facts))
    if points := facts.points("epsilon_max"):
        budget = number(facts.summary.get("epsilon_budget")) or number(facts.config.epsilon)
        chart = Chart(
            "Largest ε of the clients of a round", "round", "ε spent",
            [Line("ε", points)], zero=True, limit=(budget, "budget") if budget else None,
        )  # fmt: skip
        told = element("div", told, chart.figure(), class_="charts")
    return [told, *_clients(facts)]


def _clients(facts: RunFacts) -> list[Markup]:
    if not facts.clients:
        return []
    seconds: dict[str, float] = {}
    for row in facts.clients:
        name = str(row["client"])
        seconds[name] = seconds.get(name, 0.0) + (number(row.get("seconds")) or 0.0)
    last = facts.last_of_clients()
    order = sorted(last, key=lambda name: -(_share(last[name]) or 0.0))[:MOST]
    rows = []
    for name in order:
        row, share = last[name], _share(last[name])
        rows.append([
            name, "–" if share is None else _bar(share), _plain(row.get("epsilon")),
            _plain(row.get(EPSILON_BUDGET)), _plain(row.get("delta")),
            str(row.get("round", "–")), duration(seconds[name]),
        ])  # fmt: skip
    caption = "ε by client against its budget, the largest share first"
    if len(order) < len(last):
        caption += f" ({len(order)} of {len(last)} clients)"
    found = [table(caption, _HEAD, rows[:FIRST])]
    if len(rows) > FIRST:
        found.append(
            folded(f"{len(rows) - FIRST} more clients", table(caption, _HEAD, rows[FIRST:]))
        )
    return found


def _share(row: object) -> float | None:
    """Return the share of its budget that a client has spent."""
    told = row if isinstance(row, dict) else {}
    spent, budget = number(told.get("epsilon")), number(told.get(EPSILON_BUDGET))
    return spent / budget if spent is not None and budget else None


def _bar(share: float) -> Markup:
    drawn = element(
        "svg",
        element("rect", class_="bar-ground", width=100, height=10),
        element("rect", class_="bar", width=round(100 * min(max(share, 0.0), 1.0), 1), height=10),
        viewBox="0 0 100 10", class_="share", preserveAspectRatio="none", aria_hidden="true",
    )  # fmt: skip
    return element("span", drawn, element("b", f"{share:.0%}", class_="figure"))


def _plain(value: object) -> str:
    found = number(value)
    return "–" if found is None else plain(found)


def audit_parts(facts: RunFacts) -> list[Markup]:
    """Return what an attached audit has found; nothing if there is none."""
    audit = facts.audit
    if not audit:
        return []
    claim, delta = float(audit["claim"]), float(audit["delta"])
    verdict = str(audit["verdict"])
    look = {"holds": "good", "violated": "bad"}.get(verdict)
    sentence = element(
        "p",
        f"The promise was attacked with the settings of this run, by {audit['attack']}. What was "
        f"attacked claimed ε = {claim:.2f}. The bounds below hold together at "
        f"{100 * float(audit['confidence']):g}% confidence. Verdict: ",
        element("strong", verdict, class_=look),
        ".",
    )
    rows = [
        [str(bound["statistic"]), plain(bound["epsilon"]), str(bound["assumes"] or "nothing")]
        for bound in audit["bounds"]
    ]
    bounds = table("Lower bounds on ε", ("statistic", "ε at least", "assumes"), rows, numbers=False)
    curve = sorted((float(alarm), float(miss)) for alarm, miss in audit["curve"])
    allowed = [(n / 100, _least(n / 100, claim, delta)) for n in range(101)]
    chart = Chart(
        "What the attacker reached, and what the claim allows",
        "false alarms: absent, attacker says present", "misses: present, attacker says absent",
        [
            Line("the attacker", thinned(curve)), Line("fewest misses at the claim", allowed),
            Line("guesses without a look", [(0.0, 1.0), (1.0, 0.0)]),
        ],
        whole=False,
    )  # fmt: skip
    return [sentence, element("div", chart.figure(), bounds, class_="charts")]


def _least(alarms: float, epsilon: float, delta: float) -> float:
    """Return the fewest misses that (ε, δ) allows at a rate of false alarms.

    Source: Kairouz, Oh and Viswanath, The Composition Theorem for Differential Privacy, 2015.
    """
    one = 1 - delta - math.exp(min(epsilon, 700)) * alarms
    return max(0.0, one, math.exp(-epsilon) * (1 - delta - alarms))
