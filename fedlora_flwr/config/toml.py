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
        The file cannot be read or is not TOML.
    """
    try:
        # Some editors on Windows write a byte-order mark at the start of a file.
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:  # The file is missing, not UTF-8 or not TOML.
        raise InvalidValue("recipe", str(path), f"a readable TOML file ({error})") from error


def toml_value(value: Value) -> str:
    """Return a value as TOML text."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # TOML does not allow escaped surrogate pairs, so no ASCII escapes. Unlike JSON, it requires
        # DEL to be escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
