"""What a language model wrote to a few public prompts, side by side."""

from __future__ import annotations

from fedlora_flwr.report.facts import RunFacts
from fedlora_flwr.report.html import Markup, element, table


def answers_parts(facts: RunFacts) -> list[Markup]:
    """Return a table of answers before training and after it; nothing where none were kept.

    Texts of a model may hold markup, so they are shown as text.

    Parameters
    ----------
    facts : RunFacts
        The run.
    """
    samples = facts.samples
    if not samples:
        return []
    asked, first, last = samples["asked"], samples["first"], samples["last"]
    told = (
        f"The server let the model answer {samples['answered']:,} public records in each "
        f"evaluation, and these are the first {len(asked)} of them. Nothing is drawn at random, so "
        "the same model gives the same answers. Prompts come from the public test split alone."
    )
    parts = [element("p", told)]
    if not facts.config.private:
        warning = (
            "This run had no privacy, so answers may repeat private records. If these are not "
            "yours to show, do not hand out this page."
        )
        parts.append(element("p", warning, class_="bad"))
    rows = [
        (one["prompt"], " / ".join(one["right"]), before, after)
        for one, before, after in zip(asked, first["said"], last["said"], strict=True)
    ]
    head = ("prompt", "right answer", f"round {first['round']}", f"round {last['round']}")
    parts.append(
        element(
            "div", table("Answers to public prompts", head, rows, numbers=False), class_="texts"
        )
    )
    return parts
