"""The unit of the promise, in words: what one ε is about.

Screens, reports, model cards and errors take the word from here, so that none of them promises more
than the run keeps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedlora_flwr.errors import InvalidValue

if TYPE_CHECKING:
    from fedlora_flwr.config.run_config import RunConfig
    from fedlora_flwr.config.sections import PrivacySection

RECORD, USER = "record", "user"
UNITS = (RECORD, USER)


def counted(number: float, unit: str) -> str:
    """Return a number of units in words.

    Parameters
    ----------
    number : float
        How many.
    unit : str
        One of `UNITS`.

    Examples
    --------
    >>> counted(1200, USER), counted(1, RECORD)
    ('1,200 users', '1 record')
    """
    return f"{number:,} {unit}{'' if number == 1 else 's'}"


def protected(config: PrivacySection) -> str:
    """Return what the promise of a run is for, as it follows the words "the promise is for".

    Parameters
    ----------
    config : PrivacySection
        Its ``unit`` and its trust model.

    Examples
    --------
    >>> from fedlora_flwr import RunConfig
    >>> protected(RunConfig())
    'one training record of one client'
    >>> protected(RunConfig(unit="user"))
    'all training records of one user of one client together'
    """
    whose = "all clients together" if config.trust_model == "secure-sum" else "one client"
    if config.unit == RECORD:
        return f"one training record of {whose}"
    # A user of two clients joins a sum twice, so a sum does not make one unit of both parts.
    return "all training records of one user of one client together"


def check_unit(config: RunConfig) -> None:
    """Refuse settings that contradict the unit of the promise.

    Raises
    ------
    InvalidValue
        There is such a setting. The error names it and the allowed values.
    """
    if config.unit == RECORD and config.user_column:
        allowed = "no value where unit = 'record'. To protect each user as a whole, set unit = "
        raise InvalidValue("user-column", config.user_column, f"{allowed}'user'")
    if config.unit == USER and config.train_limit:
        allowed = (
            "0 where unit = 'user': a limit draws among the records of all users, so one user's "
            "records would decide which records of the others are used"
        )
        raise InvalidValue("train-limit", config.train_limit, allowed)
