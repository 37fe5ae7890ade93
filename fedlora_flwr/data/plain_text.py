"""Text files as text: UTF-8, or one sentence that names the file and the line."""

from __future__ import annotations

import codecs
from pathlib import Path

from fedlora_flwr.errors import InvalidValue, one_line

# The longer mark first, as it begins with the shorter one.
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def plain_text(path: Path) -> str:
    """Return the text of a file, without a byte-order mark.

    Raises
    ------
    InvalidValue
        It is not UTF-8, or has zero bytes, as UTF-16 without a mark has.
    """
    content = path.read_bytes()
    for mark, name in _MARKS.items():
        if content.startswith(mark):
            raise unreadable(path, f"UTF-8 text, and it is {name}. Save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        found = f"UTF-8 text, and line {line} has the byte 0x{content[error.start]:02x}"
        raise unreadable(path, f"{found}. Save it as UTF-8") from error
    if (zero := text.find("\0")) >= 0:
        found = f"UTF-8 text, and line {line_of(text, zero)} has a zero byte"
        raise unreadable(path, f"{found}. Save it as UTF-8")
    return text


def line_of(text: str, position: int) -> int:
    """Return the line, counted from 1, that a position in a text is in."""
    return text.count("\n", 0, position) + 1


def unreadable(path: Path, expected: str) -> InvalidValue:
    """Return the error of a file that cannot be read as it should be."""
    return InvalidValue("dataset", str(path), expected)


def reason(error: BaseException) -> str:
    """Return what a library says of a file, in one line without a full stop."""
    return one_line(error).rstrip(". ")
