"""What docs/commands.md says of a command's JSON document."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "commands.md"


def fields(command: str) -> set[str]:
    """Return the field names that the page promises for a command, in its own document."""
    (line,) = re.findall(rf"^\| `{command}`.* \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.M)
    return set(re.findall(r"`([\w-]+)`", re.sub(r"\(each .*?\)", "", line)))
