"""Keys that only this package's own ServerApp acts on, which a project of one's own must not set.

A project with a ServerApp of its own reads the same configuration. A key that nothing there reads
would be ignored, and a run would cost its ε for something else than what was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping

from fedlora_flwr.config.keys import fields_by_key
from fedlora_flwr.config.run_config import RunConfig
from fedlora_flwr.config.settled import check_settled
from fedlora_flwr.errors import InvalidValue

PACKAGE_SERVER: Mapping[str, str] = {
    "resume": "The run would begin again from its first round, and spend the budget once more",
    "start": "Give the adapter's arrays to `strategy.start` as initial_arrays",
    "lora-init": "Give the arrays to begin from to `strategy.start` as initial_arrays",
    "average-decay": "Average the arrays in your evaluate_fn",
    "eval-every": "Your evaluate_fn decides in which rounds it measures",
    "early-stopping-patience": "Give `strategy.start` a stop_fn",
    "early-stopping-threshold": "Give `strategy.start` a stop_fn",
    "trackers": "Record the figures in your evaluate_fn",
    "metric-for-best-model": "Keep the arrays of the best round in your evaluate_fn",
}
"""What to do instead of each such key."""


def check_own_project(config: RunConfig) -> None:
    """Refuse what a project with a ServerApp of its own would ignore in silence.

    Parameters
    ----------
    config : RunConfig
        The project's configuration.

    Raises
    ------
    InvalidValue
        A key of `PACKAGE_SERVER` is set, or ``precision`` is ``"auto"``. The message says what to
        do instead.
    """
    check_settled(config)
    for key, instead in PACKAGE_SERVER.items():
        entry = fields_by_key(RunConfig)[key]
        if (value := getattr(config, entry.name)) != entry.default:
            allowed = (
                f"{entry.default!r} in a project of your own, where nothing reads this key: only "
                f"this package's own ServerApp does. {instead}"
            )
            raise InvalidValue(key, value, allowed)
