"""Hook of MkDocs: tables of many columns, which a phone shows as one card per row.

Each cell gets its column's name, which the style sheet shows beside it where the page is narrow.
"""

from __future__ import annotations

import html
import re

FEWEST = 4
"""Columns of a table that does not fit a phone."""

_TABLE = re.compile(r"<table>.*?</table>", re.S)
_HEAD = re.compile(r"<th\b[^>]*>(.*?)</th>", re.S)
_ROW = re.compile(r"<tr>.*?</tr>", re.S)
_CELL = re.compile(r"<td(?=[ >])")
_TAG = re.compile(r"<[^>]+>")


def on_page_content(content: str, **_: object) -> str:
    """Return a page's HTML with named cells."""
    return _TABLE.sub(lambda table: _named(table.group()), content)


def _named(table: str) -> str:
    names = [html.escape(html.unescape(_TAG.sub("", head))) for head in _HEAD.findall(table)]
    if len(names) < FEWEST:
        return table
    rows = _ROW.sub(lambda row: _labeled(row.group(), names), table)
    return rows.replace("<table>", "<table data-wide>", 1)


def _labeled(row: str, names: list[str]) -> str:
    left = iter(names)
    return _CELL.sub(lambda _: f'<td data-column="{next(left)}"', row)
