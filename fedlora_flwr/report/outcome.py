"""What a run has reached, from its summary or, if it was killed, from its rounds."""

from __future__ import annotations

from fedlora_flwr.report.facts import RunFacts, number
from fedlora_flwr.report.scales import percent


def outcome(facts: RunFacts) -> tuple[str, str]:
    """Return the metric before training and after the last round, in words."""
    values = [facts.summary.get(f"{when}_{facts.metric}") for when in ("initial", "final")]
    told = [number(value) for value in values]
    if measured := facts.points(facts.metric):  # The summary of a run that was killed is short.
        ends = (measured[0][1], measured[-1][1])
        told = [end if value is None else value for value, end in zip(told, ends, strict=True)]
    first, last = ("–" if value is None else percent(value) for value in told)
    return first, last
