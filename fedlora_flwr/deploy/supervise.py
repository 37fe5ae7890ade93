"""Carry a fleet's run to its end: start again what died, and continue from the last checkpoint.

There is one loop. A pass of it looks for the server, submits the run unless Flower still knows it
as running, and follows it to its end. A process that dies leads to another pass, after a pause that
grows, and only so often within a time. A run that itself says why it ended would end in the
same way again, and spend budget on it, so the loop ends with it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.settled import check_counted, check_settled
from fedlora_flwr.deploy.operator import Operator, RunDied, RunEnded, Say
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.simulations.connection import SuperLinkError

_LONGEST_PAUSE = 300.0


@dataclass
class Restarts:
    """How often something may be started again.

    Parameters
    ----------
    most : int
        Restarts that are allowed within the time.
    within : float
        That time, in seconds.
    pause : float
        Seconds before a restart; each earlier one within the time doubles them, up to 300.
    """

    most: int = 10
    within: float = 3600.0
    pause: float = 5.0
    _times: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, value in (
            ("restarts", self.most),
            ("within", self.within),
            ("pause", self.pause),
        ):
            if value < 0:
                raise InvalidValue(f"--{name}", value, "0 or more")

    def next_pause(self) -> float | None:
        """Count a restart; return the seconds to wait before it, or None if it is not allowed."""
        now = time.monotonic()
        self._times = [earlier for earlier in self._times if now - earlier < self.within]
        if len(self._times) >= self.most:
            return None
        self._times.append(now)
        return min(self.pause * 2.0 ** (len(self._times) - 1), _LONGEST_PAUSE)

    @property
    def count(self) -> str:
        """Which restart this is, and of how many."""
        return f"restart {len(self._times)} of {self.most} within {self.within / 60:g} minutes"


def supervise(
    folder: Path, config: RunConfig, restarts: Restarts, say: Say, *, server: bool = False
) -> None:
    """Submit a run to a fleet, and see it through.

    Parameters
    ----------
    folder : Path
        The fleet's folder.
    config : RunConfig
        The run. Its ``run-dir``, or ``resume``, is a folder on the server.
    restarts : Restarts
        How often what dies is started again.
    say : callable
        Shows one sentence.
    server : bool (default: False)
        Whether this process also starts the fleet's server, unless it runs already.

    Raises
    ------
    InvalidValue
        It is not a fleet's folder, the run names no folder, or its precision or the number of
        clients of a secure sum is not settled.
    RunEnded
        The run itself said why it ended, was stopped, or more restarts were needed than allowed.
    """
    check_counted(config)
    check_settled(config)
    if not (where := config.resume or config.run_dir):
        allowed = "an absolute folder on the server, from which the run can continue"
        raise InvalidValue("run-dir", "", allowed)
    run: str | None = None
    with Operator(folder, server, say) as operator:
        try:
            while True:
                try:
                    operator.find_server()
                    if run is None:
                        # From then on: what has begun there or, if nothing has, from the start.
                        wanted, config = config, replace(config, run_dir=where, resume=where)
                        run = operator.submit(wanted)
                    operator.follow(run)
                    return
                except RunDied as death:
                    why, run = str(death), None
                except SuperLinkError as error:
                    # A server that lives tells, once it answers again, what the run became.
                    why, run = str(error), run if operator.may_go_on else None
                time.sleep(_pause(restarts, why, where, operator.logs, say))
        except KeyboardInterrupt:
            operator.stop(run)
            say(f"The run is stopped. --resume {where} continues it.")
            raise


def _pause(restarts: Restarts, why: str, where: str, logs: str, say: Say) -> float:
    pause = restarts.next_pause()
    if pause is None:
        raise RunEnded(
            f"{why} The limit of restarts, {restarts.most} within {restarts.within / 60:g} "
            f"minutes, is reached. Read {logs}, then continue with --resume {where}."
        )
    say(f"{why} The run continues after the last finished round in {pause:g} s ({restarts.count}).")
    return pause
