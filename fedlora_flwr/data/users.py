"""The users that records belong to: read from a column, carried by records, and counted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedlora_flwr.config.unit import RECORD, USER, counted
from fedlora_flwr.data.missing import missing
from fedlora_flwr.data.parts import Parts
from fedlora_flwr.errors import InvalidValue, unknown

if TYPE_CHECKING:
    from fedlora_flwr.data.records import Records

_KEY = "user-column"


def numbered_users(values: NDArray[Any], column: str) -> NDArray[np.int64]:
    """Turn the names of users into numbers; equal names are one user.

    Parameters
    ----------
    values : NDArray
        The user of each record, text or whole numbers, shape (n,). Names are compared as they are
        written: "ann" and "Ann " are two users.
    column : str
        Where the names come from, for errors.

    Returns
    -------
    NDArray[np.int64]
        A number from 0 for each record, shape (n,).

    Raises
    ------
    InvalidValue
        A record names no user, or the values are neither text nor whole numbers.

    Examples
    --------
    >>> numbered_users(np.array(["ann", "bob", "ann"]), "user").tolist()
    [0, 1, 0]
    """
    if missing(values).any():
        # If such records were one user each, a person with several would have no promise.
        allowed = "a column that names a user for each record, but some records have no value there"
        raise InvalidValue(_KEY, column, allowed)
    names = np.array([str(value) for value in values]) if values.dtype.kind == "O" else values
    texts = values.dtype.kind != "O" or all(isinstance(value, str | int) for value in values)
    if names.dtype.kind not in "iuUT" or names.ndim != 1 or not texts:
        raise InvalidValue(_KEY, column, "a column of text or of whole numbers")
    return np.unique(names, return_inverse=True)[1].astype(np.int64).reshape(-1)


def users_in(columns: Any, column: str) -> NDArray[np.int64] | None:
    """Return the user of each row of a table, as a number; None where no column is named.

    Parameters
    ----------
    columns : Dataset or DataFrame
        The table.
    column : str
        Its column that names users; may be empty.

    Raises
    ------
    InvalidValue
        There is no such column, or it cannot be used (see `numbered_users`).
    """
    if not column:
        return None
    known = list(getattr(columns, "column_names", None) or columns.columns)
    if column not in known:
        raise unknown(_KEY, column, known)
    return numbered_users(np.asarray(columns[column][:]), column)


def about_users(users: NDArray[np.int64], parts: Parts | None = None) -> list[str]:
    """Return sentences on the users of a simulation, whose records may be on several clients.

    Parameters
    ----------
    users : NDArray[np.int64]
        The user of each record, shape (n,).
    parts : Parts, optional
        Positions of each client's records.

    Examples
    --------
    >>> about_users(np.array([0, 0, 1]), Parts(np.arange(3), np.array([1, 2])))[0]
    '2 users, with 1 to 2 records each'
    """
    sizes = np.unique(users, return_counts=True)[1]
    found = [f"{counted(len(sizes), USER)}, with {min(sizes)} to {max(sizes)} records each"]
    clients_of_user = () if parts is None else np.bincount(parts.pairs(users)[1])
    if several := int(np.count_nonzero(np.asarray(clients_of_user) > 1)):
        found.append(
            f"warning: {several:,} of them have records on several clients. Each client promises ε "
            "to its own part of a user, and these add up. To keep each user on one client, split "
            "by a column with groups of users (partitioner = 'natural-id')"
        )
    return found


def users_of(records: Records) -> NDArray[np.int64] | None:
    """Return the user of each record as a number, shape (n,), or None where records have no users.

    They come from the records' attribute ``users``.
    """
    found: NDArray[np.int64] | None = getattr(records, "users", None)
    return found


def count_units(unit: str, records: Records) -> int:
    """Return n, the number of units of the promise: records, or users.

    Parameters
    ----------
    unit : str
        One of `fedlora_flwr.config.unit.UNITS`.
    records : Records
        A client's records.

    Raises
    ------
    InvalidValue
        Users are asked for, and the records do not name theirs.

    Examples
    --------
    >>> import torch
    >>> from fedlora_flwr import TensorRecords
    >>> records = TensorRecords({"x": torch.zeros(3, 2)}, users=np.array([4, 9, 4]))
    >>> count_units("user", records), count_units("record", records)
    (2, 3)
    """
    return len(records) if unit == RECORD else len(np.unique(required_users(records)))


def units_by_client(unit: str, parts: Parts, users: NDArray[np.int64] | None) -> NDArray[np.int64]:
    """Return n of each client of a simulation, as `count_units` counts it, shape (clients,).

    Parameters
    ----------
    unit : str
        One of `fedlora_flwr.config.unit.UNITS`.
    parts : Parts
        Positions of each client's records.
    users : NDArray[np.int64] or None
        The user of each record.

    Raises
    ------
    InvalidValue
        Users are asked for, and the records do not name theirs.
    """
    if unit == RECORD:
        return parts.sizes
    if users is None:
        raise _without_users()
    return np.bincount(parts.pairs(users)[0], minlength=len(parts))


def required_users(records: Records) -> NDArray[np.int64]:
    """Return the user of each record, shape (n,).

    Raises
    ------
    InvalidValue
        The records do not name their users, or not one user for each record.
    """
    users = users_of(records)
    if users is None:
        raise _without_users()
    if np.shape(users) != (len(records),):
        allowed = f"one user for each of {len(records)} records"
        raise InvalidValue("users", np.shape(users), allowed)
    return np.asarray(users)


def _without_users() -> InvalidValue:
    allowed = (
        "'record', because the records of this task name no users. Name the column in "
        "user-column; records of your own have the users as an attribute `users`"
    )
    return InvalidValue("unit", "user", allowed)
