"""What a look at a fleet's folder finds: one finding a line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from fedlora_flwr.errors import FedLoRAError, one_line


@dataclass(frozen=True)
class Finding:
    """What was looked at, and what was found.

    Parameters
    ----------
    subject : str
        E.g. ``"server certificate"``.
    good : bool
        Whether it is fit.
    text : str
        What was found.
    fix : str
        What to do where it is not fit.
    """

    subject: str
    good: bool
    text: str
    fix: str = ""


def whole(subject: str, findings: Iterator[Finding]) -> Iterator[Finding]:
    """Yield findings, and one more for an error that ends them: what else there is is looked at."""
    try:
        yield from findings
    except Exception as error:
        text = f"cannot be looked at further ({type(error).__name__}: {one_line(error)})"
        yield Finding(subject, False, text, "see to the file that it is about")


def tried(subject: str, work: Callable[[], Any], fix: str) -> Any:
    """Return what a piece of work gives, or the finding that it cannot be done."""
    try:
        return work()
    except (FedLoRAError, OSError) as error:
        return Finding(subject, False, str(error), fix)
