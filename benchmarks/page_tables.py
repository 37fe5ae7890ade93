"""Tables that a benchmark writes into a page of the documentation, between two comments."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def asked_to_write(command: str, about: str | None, arguments: Sequence[str] | None) -> bool:
    """Read the arguments of a command that prints tables; tell whether it is to write them, too.

    Parameters
    ----------
    command : str
        Its module.
    about : str, optional
        What it does.
    arguments : Sequence[str], optional
        Its arguments; by default those of this process.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {command}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--write", action="store_true", help="write them where they belong")
    return bool(parser.parse_args(arguments).write)


def replaced(page: str, name: str, text: str) -> str:
    """Return a page with a text between its comments ``name begin`` and ``name end``.

    Parameters
    ----------
    page : str
        The page.
    name : str
        Name of the place.
    text : str
        What is to stand there.

    Raises
    ------
    ValueError
        The page lacks one of the two comments.
    """
    first, last = f"<!-- {name} begin -->", f"<!-- {name} end -->"
    before, begin, rest = page.partition(first)
    _, end, after = rest.partition(last)
    if not (begin and end):
        raise ValueError(f"The page has no {first} … {last}. Write both comments into it.")
    return f"{before}{first}\n{text}\n{last}{after}"
