"""The document of a report."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from fedlora_flwr.report.comparison import comparison_sections
from fedlora_flwr.report.facts import RunFacts
from fedlora_flwr.report.html import Markup, element, joined
from fedlora_flwr.report.promise import in_short
from fedlora_flwr.report.script import SCRIPT
from fedlora_flwr.report.sections import Section, sections_of
from fedlora_flwr.report.study import study_sections
from fedlora_flwr.report.style import STYLE


def run_report(facts: RunFacts, reload: int | None = None) -> str:
    """Return the report of a run as an HTML document.

    Parameters
    ----------
    facts : RunFacts
        The run.
    reload : int, optional
        Seconds after which a browser loads the page again.
    """
    status = element("span", facts.status, class_="good" if facts.status == "completed" else "bad")
    named = [element("strong", facts.name), ", "] if facts.name else []
    about = joined(
        [element("p", "Run ", *named, status, "."), element("p", in_short(facts), id="in-short")]
    )
    return _document(f"{facts.title}: report", facts.title, about, sections_of(facts), reload)


def runs_report(runs: Sequence[RunFacts]) -> str:
    """Return a report that compares runs, with intervals over seeds, as an HTML document.

    Parameters
    ----------
    runs : Sequence[RunFacts]
        The runs. Those that differ by their seed alone are one setting.
    """
    about = element("p", "Runs that differ by their seed alone are one setting.")
    title = f"{len(runs)} runs compared"
    return _document(title, title, about, comparison_sections(runs))


def study_report(name: str, rows: Sequence[Mapping[str, Any]], reload: int | None = None) -> str:
    """Return the report of a comparison of methods as an HTML document.

    Parameters
    ----------
    name : str
        Name of the comparison's folder.
    rows : Sequence[Mapping[str, Any]]
        The rows of its ``rows.csv``.
    reload : int, optional
        Seconds after which a browser loads the page again.
    """
    about = element("p", f"{len(rows)} runs, those of tuning included.")
    return _document(name, name, about, study_sections(rows), reload)


def _document(
    title: str,
    heading: str,
    about: Markup,
    sections: Sequence[Section],
    reload: int | None = None,
) -> str:
    links = (element("li", element("a", one.name, href=f"#{one.anchor}")) for one in sections)
    head = element(
        "head",
        element("meta", charset="utf-8"),
        # The browser itself refuses all that would come from elsewhere, and any other script.
        element("meta", http_equiv="Content-Security-Policy", content=_policy()),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="refresh", content=reload) if reload else Markup(),
        element("title", title),
        element("style", Markup(STYLE)),
    )
    body = element(
        "body",
        element("a", "Skip to the content", href="#content", class_="skip"),
        element(
            "header",
            element("h1", heading),
            about,
            element("nav", element("ul", links), aria_label="Parts of this report"),
        ),
        element("main", (Markup(str(one)) for one in sections), id="content"),
        element("footer", element("p", "Made by fedlora-flwr, from files of the run alone.")),
        element("script", Markup(SCRIPT)),
    )
    return f"<!DOCTYPE html>\n{joined(element('html', head, body, lang='en'))}\n"


def _policy() -> str:
    script, style = (
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for text in (SCRIPT, STYLE)
    )
    return f"default-src 'none'; script-src {script}; style-src {style}"
