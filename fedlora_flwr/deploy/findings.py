"""Findings of a check of a fleet's folder. Each is one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora_flwr.config import OWN
from fedlora_flwr.errors import FedLoRAError, InvalidValue, one_line


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Parameters
    ----------
    subject : str
        What was checked, e.g. ``"server certificate"``.
    good : bool
        Whether it is in order.
    text : str
        What was found.
    fix : str
        What to do if it is not in order.
    """

    subject: str
    good: bool
    text: str
    fix: str = ""


def whole(subject: str, findings: Iterator[Finding]) -> Iterator[Finding]:
    """Yield findings; an error becomes one more finding, so that other checks still run."""
    try:
        yield from findings
    except Exception as error:
        text = f"could not be checked further ({type(error).__name__}: {one_line(error)})"
        yield Finding(subject, False, text, "correct or restore the file in this message")


def tried(subject: str, work: Callable[[], Any], fix: str, file: Path | None = None) -> Any:
    """Return the result of ``work()``, or a finding with the error that it raised.

    Parameters
    ----------
    subject : str
        What is checked.
    work : callable
        The check.
    fix : str
        What to do if it fails.
    file : Path, optional
        The device's file. Where the error is about one of its keys, the fix names that key instead.
    """
    try:
        return work()
    except (FedLoRAError, OSError) as error:
        key = error.key if isinstance(error, InvalidValue) and file else ""
        own = key if key in OWN else ""
        return Finding(subject, False, str(error), f"correct {own} in {file}" if own else fix)
