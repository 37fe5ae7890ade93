"""``precision = "auto"`` stands for a choice that a command makes before the run begins."""

from __future__ import annotations

from fedlora_flwr.config.sections import RunSection
from fedlora_flwr.errors import InvalidValue

AUTO = "auto"


def check_settled(config: RunSection) -> None:
    """Refuse a precision that has not been chosen: each process could choose another one.

    Raises
    ------
    InvalidValue
        The precision is ``"auto"``.
    """
    if config.precision == AUTO:
        allowed = (
            "'fp32' or 'bf16' here, since all machines of a run need the same. "
            "Only a simulation, a plan, a comparison or an audit on this machine chooses by itself"
        )
        raise InvalidValue("precision", AUTO, allowed)
