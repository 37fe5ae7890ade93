"""Reading of UTF-8 text files, with errors that name the file and, if known, the line."""

from __future__ import annotations

import codecs
from pathlib import Path

from fedlora_flwr.errors import InvalidValue, one_line

# UTF-32 comes first: its little-endian mark begins with the mark of UTF-16.
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
        The file is not UTF-8, or it has zero bytes, which often means UTF-16 without a mark.
    """
    content = path.read_bytes()
    for mark, name in _MARKS.items():
        if content.startswith(mark):
            raise unreadable(path, f"UTF-8 text, but it is {name}. Save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        found = f"UTF-8 text, but line {line} has the byte 0x{content[error.start]:02x}"
        raise unreadable(path, f"{found}. Save it as UTF-8") from error
    if (zero := text.find("\0")) >= 0:
        found = f"UTF-8 text, but line {line_of(text, zero)} has a zero byte"
        raise unreadable(path, f"{found}. Save it as UTF-8")
    return text


def line_of(text: str, position: int) -> int:
    """Return the number of the line, counted from 1, that holds a position of a text."""
    return text.count("\n", 0, position) + 1


def unreadable(path: Path, expected: str) -> InvalidValue:
    """Return the error for a file whose content is not as ``expected``."""
    return InvalidValue("dataset", str(path), expected)


def reason(error: BaseException) -> str:
    """Return the message of a library's error, in one line without a final period."""
    return one_line(error).rstrip(". ")
