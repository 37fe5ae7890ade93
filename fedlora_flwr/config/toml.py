"""TOML files of configuration keys."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from fedlora_flwr.config.keys import Value
from fedlora_flwr.errors import InvalidValue


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file of configuration keys.

    Raises
    ------
    InvalidValue
        The file is missing or no TOML.
    """
    try:
        # Editors on Windows begin a file with a byte-order mark.
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:  # No file, no UTF-8, no TOML.
        raise InvalidValue("recipe", str(path), f"a readable TOML file ({error})") from error


def toml_value(value: Value) -> str:
    """Write a value."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # TOML knows no surrogate pairs, and wants DEL escaped, which JSON does not.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
