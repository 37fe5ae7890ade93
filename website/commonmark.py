"""Hook of MkDocs: lists of CommonMark, which our pages are written in, for Python-Markdown.

CommonMark lets a list follow a paragraph without a blank line, and indents by three spaces what
belongs to ``1. ``. Python-Markdown wants a blank line and four spaces.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_ITEM = re.compile(r"(?:[-*]|\d+\.) ")
_NUMBERED = re.compile(r"\d+\. ")
_FENCE = re.compile(r" *```")


def on_page_markdown(markdown: str, **_: object) -> str:
    """Return a page's text as Python-Markdown reads it."""
    return "\n".join(_lines(markdown.split("\n")))


def _lines(lines: list[str]) -> Iterator[str]:
    before, in_list, numbered, fenced = "", False, False, False
    for line in lines:
        if not fenced and (item := _ITEM.match(line)):
            if before.strip() and not in_list:
                yield ""
            in_list, numbered = True, _NUMBERED.match(item.group()) is not None
        elif line.strip() and not line.startswith(" "):
            in_list = in_list and bool(before.strip()) and not line.startswith("#")
            numbered = numbered and in_list
        if _FENCE.match(line):
            fenced = not fenced
        yield " " + line if numbered and line.startswith("   ") else line
        before = line
