"""HTML from parts. Text is always escaped, since names and messages of a run may hold markup."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

# Characters that no XML document may hold, and halves of a pair, which cannot be encoded.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_VOID = ("meta", "link")


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Child = str | Iterable[str]
"""What an element may hold: text, which is escaped, or markup, or several of them."""


def escaped(text: object) -> Markup:
    """Return a text as markup, without characters that a document may not hold."""
    if isinstance(text, Markup):
        return text
    return Markup(html.escape(_FORBIDDEN.sub("\ufffd", str(text))))


def joined(*children: Child) -> Markup:
    """Return several children as one piece of markup."""
    parts: list[str] = []
    for child in children:
        parts += [escaped(child)] if isinstance(child, str) else [escaped(one) for one in child]
    return Markup("".join(parts))


def element(name: str, /, *children: Child, **attributes: object) -> Markup:
    """Return an element.

    Parameters
    ----------
    name : str
        Its tag.
    *children : str or Iterable[str]
        What it holds. Everything that is not `Markup` is escaped.
    **attributes : object
        Its attributes. An underscore becomes a dash, one at the end is dropped (``class_``), None
        leaves the attribute out, and True gives it its own name as its value.
    """
    written = "".join(
        f' {_attribute(key)}="{escaped(_attribute(key) if value is True else value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Markup(f"<{name}{written}/>")
    return Markup(f"<{name}{written}>{joined(*children)}</{name}>")


def table(
    caption: str, head: Sequence[str], rows: Iterable[Sequence[Child]], numbers: bool = True
) -> Markup:
    """Return a table in a part of its own, which scrolls on a narrow screen.

    Parameters
    ----------
    caption : str
        What the table shows.
    head : Sequence[str]
        Names of the columns.
    rows : Iterable[Sequence[str]]
        The cells; the first of a row is its head.
    numbers : bool (default: True)
        Whether the other columns are numbers, which are set flush right.
    """
    columns = (element("th", name, scope="col") for name in head)
    lines = (
        element("tr", element("th", row[0], scope="row"), (element("td", one) for one in row[1:]))
        for row in rows
    )
    inner = element(
        "table",
        element("caption", caption),
        element("thead", element("tr", columns)),
        element("tbody", lines),
        class_="numbers" if numbers else None,
    )
    # The browser gives a keyboard no other way to scroll.
    return element("div", inner, class_="scroll", tabindex=0, role="region", aria_label=caption)


def folded(name: str, *children: Child) -> Markup:
    """Return a part that opens when a reader asks for it."""
    return element("details", element("summary", name), *children)


def _attribute(key: str) -> str:
    return key.removesuffix("_").replace("_", "-") if key != "viewBox" else key
