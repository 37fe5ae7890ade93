"""A table of who decides each configuration key and each field of a message on a device.

The rows are made from the declarations that the code itself uses: a key's `Decider`, an order's
fields, a report's fields. The table therefore cannot differ from the package's behavior.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from fedlora_flwr.config.keys import Decider, allowed_values, fields_by_key
from fedlora_flwr.config.names import full_name, short_name
from fedlora_flwr.config.on_device import UNREAD
from fedlora_flwr.config.run_config import RunConfig
from fedlora_flwr.wire import ARRAYS
from fedlora_flwr.wire.order import ARRAYS_ALLOWED, ARRAYS_WHY, Order
from fedlora_flwr.wire.report import FURTHER, Report

OWN_SETTINGS = "<method>.<setting>"
HEADER = ("key", "who decides on a device", "accepted", "why")


@dataclass(frozen=True)
class Row:
    """One value, and who decides it on a device.

    Parameters
    ----------
    where : str
        ``"configuration"``, ``"order"`` (a message to a device) or ``"report"`` (its answer).
    key : str
        The key or field, as users write it.
    decides : str
        One of `Decider`.
    accepted : str
        The hard limits of type and range, in words.
    why : str
        The reason, in one sentence.
    default : object, optional
        The value on a device if neither its file nor the run gives one.
    """

    where: str
    key: str
    decides: str
    accepted: str
    why: str
    default: Any = None


def rows() -> Iterator[Row]:
    """Yield the whole table: configuration, order, report."""
    for key, entry in fields_by_key(RunConfig).items():
        about = entry.metadata
        yield Row(
            "configuration", full_name(key), about["decides"], allowed_values(entry), about["why"],
            about["on_device"],
        )  # fmt: skip
    # Arrays come in a separate record, so they are not a field of `Order`.
    yield Row("order", ARRAYS, Decider.RUN, ARRAYS_ALLOWED, ARRAYS_WHY)
    yield Row(
        "configuration", OWN_SETTINGS, Decider.RUN, UNREAD,
        "The server's strategy alone reads it, and no strategy is loaded on a device.",
    )  # fmt: skip
    for entry in fields(Order):
        about = entry.metadata
        yield Row("order", about["key"], about["decides"], about["allowed"], about["why"])
    for entry in fields(Report):
        about, word = entry.metadata, entry.metadata["word"]
        # These fields hold further numbers or texts, whose names are not fixed.
        key = word if word != FURTHER else f"further {entry.name}"
        yield Row("report", key, about["decides"], about["allowed"], about["why"])


def markdown() -> str:
    """Return the table as Markdown, one section for each kind of row."""
    parts = []
    titles = {
        "configuration": "Keys of the run configuration",
        "order": "Fields of a message to a device",
        "report": "Fields of a device's answer",
    }
    for where, title in titles.items():
        lines = [" | ".join(HEADER), "|".join(["---"] * len(HEADER))]
        lines += [
            f"`{row.key}` | {row.decides} | {_cell(row.accepted)} | {row.why}"
            for row in rows()
            if row.where == where
        ]
        parts.append(f"### {title}\n\n" + "\n".join(f"| {line} |" for line in lines) + "\n")
    return "\n".join(parts)


def in_force(settings: Mapping[str, Any], limits: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each key with its value on one device, or with who decides it, in words.

    Parameters
    ----------
    settings : Mapping[str, Any]
        Values that the device's file gives, by short key.
    limits : Mapping[str, Limit]
        Limits that the device's file sets for a run, by short key.
    """
    for row in rows():
        if row.where != "configuration":
            continue
        key = short_name(row.key)
        if row.decides == Decider.DEVICE:
            given = key in settings
            value = settings.get(key, row.default)
            yield row.key, f"{value!r}, {'its file' if given else 'default, not set in its file'}"
        elif row.decides == Decider.PACKAGE:
            yield row.key, f"{row.default!r}, always"
        elif key in limits:
            yield row.key, f"the run, {limits[key]}"
        else:
            yield row.key, f"the run, {row.accepted}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
