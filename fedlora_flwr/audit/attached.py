"""An audit's record beside a run: ``audit.json``, and a section of its card and of its report."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from fedlora_flwr.audit.record import AuditRecord
from fedlora_flwr.config.recipes import load_recipe
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.files import replace_file, write_json
from fedlora_flwr.server.report import write_report
from fedlora_flwr.server.run_dir import AUDIT, REPORT, RunDirectory

SAME = ("task", "strategy", "trust-model", "epsilon", "delta", "clip-norm")
"""Keys that an audit and a run must share: they make the promise that was attacked."""
_CARDS = ("adapter/README.md", "best/README.md")
_SECTION = re.compile(r"## Audit\n.*?(?=^## )", re.DOTALL | re.MULTILINE)
_BEFORE = "## Training\n"


def check_attachable(settings: Mapping[str, object], run: Path) -> None:
    """Refuse to attach an audit of other settings than the run's.

    Parameters
    ----------
    settings : Mapping
        The audit's settings, by key.
    run : Path
        The run's folder.

    Raises
    ------
    InvalidValue
        The folder holds no run, or its run has other values for a key in `SAME`.
    """
    file = run / "config.toml"
    if not file.is_file():
        raise InvalidValue("attach", str(run), "the folder of a run, with config.toml")
    own = load_recipe(str(file)).items()
    for key in SAME:
        if own[key] != settings[key]:
            allowed = f"a run with {key} = {settings[key]!r}; this one has {own[key]!r}"
            raise InvalidValue("attach", str(run), allowed)


def attach(record: AuditRecord, run: Path) -> list[Path]:
    """Write a record into a run's folder, its cards and its report; return the files.

    Parameters
    ----------
    record : AuditRecord
        The record. One that was attached before is replaced.
    run : Path
        The run's folder.

    Raises
    ------
    InvalidValue
        As `check_attachable`.
    """
    check_attachable(record.settings, run)
    write_json(run / AUDIT, record.as_json())
    for card in _cards(run):
        text = _SECTION.sub("", card.read_text("utf-8"))
        replace_file(card, text.replace(_BEFORE, section(record) + _BEFORE, 1).encode())
    write_report(RunDirectory(run))
    return files_of(run)


def files_of(run: Path) -> list[Path]:
    """Return the files of a run that hold an attached record: the record, cards and report."""
    return [run / AUDIT, *_cards(run), run / REPORT]


def _cards(run: Path) -> list[Path]:
    return [run / name for name in _CARDS if (run / name).is_file()]


def section(record: AuditRecord) -> str:
    """Return a card's section on an audit."""
    best = max(record.bounds, key=lambda bound: bound.epsilon)
    assumes = f"assumes {best.assumes}" if best.assumes else "assumes nothing"
    return (
        f"## Audit\n\nThe promise was attacked in {record.counts.runs_in_words} with these "
        f"settings, by {record.attack}. At {100 * record.confidence:g} % confidence the attack "
        f"shows ε ≥ {best.epsilon:.2f} ({best.statistic}, which {assumes}). The claim of "
        f"what was attacked was ε = {record.claim:.2f}. Verdict: {record.verdict}.\n\n"
    )
