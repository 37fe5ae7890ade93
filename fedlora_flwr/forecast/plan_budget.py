"""``fedlora_flwr.plan_budget``: ε, noise and rounds, each from the other two."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora_flwr.errors import InvalidValue, require
from fedlora_flwr.privacy.accountants import ACCOUNTANTS, MAX_STEPS, Segment
from fedlora_flwr.privacy.budget import calibrate, check_budget, epsilon_spent
from fedlora_flwr.privacy.rounds_within import rounds_within

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["BudgetPlan", "plan_budget"]

# A curve has more points where it bends, in its first rounds. Its last point is at (10/7)² T.
_POINTS, _UNTIL_PLAN = 10, 7


@dataclass(frozen=True)
class BudgetPlan:
    """A budget, a noise and a number of rounds that fit together.

    Parameters
    ----------
    solved_for : str
        What was worked out: ``"epsilon"``, ``"noise-multiplier"`` or ``"rounds"``.
    epsilon_budget : float
        The budget that was given; where ε was worked out, what the rounds spend.
    delta : float
        δ.
    noise_multiplier : float
        σ, in units of the clip norm.
    sample_rate : float
        q: probability that a record joins a step.
    rounds : int
        T.
    local_steps : int
        K: private steps per round.
    epsilon : Mapping[str, float]
        What T·K steps spend, by accountant.
    """

    solved_for: str
    epsilon_budget: float
    delta: float
    noise_multiplier: float
    sample_rate: float
    rounds: int
    local_steps: int
    epsilon: Mapping[str, float]

    @property
    def steps(self) -> int:
        """Private steps of all rounds, T·K."""
        return self.rounds * self.local_steps

    @property
    def epsilon_of_one_more(self) -> float | None:
        """What one round more would spend by PRV; None above the most steps that are counted."""
        steps = self.steps + self.local_steps
        return self._spent(steps) if steps <= MAX_STEPS else None

    @property
    def curves(self) -> pd.DataFrame:
        """ε by rounds at this σ, and σ by rounds at this ε, up to about 2 T rounds.

        Returns
        -------
        pandas.DataFrame
            The columns ``rounds``, ``epsilon`` and ``noise_multiplier``. The first ε is that of one
            round. Where no round fits, the curves go to 10 rounds.

        Raises
        ------
        InvalidValue
            Budget or noise is not a finite number above 0.
        """
        import pandas as pd

        for key, value in (
            ("epsilon", self.epsilon_budget),
            ("noise-multiplier", self.noise_multiplier),
        ):
            if not 0 < value < math.inf:
                raise InvalidValue(key, value, "a finite number above 0, for a plot")
        planned, most = self.rounds or 5, MAX_STEPS // self.local_steps
        shares = ((number / _UNTIL_PLAN) ** 2 for number in range(_POINTS + 1))
        counts = {min(max(round(planned * share), 1), most) for share in shares}
        rows = [(rounds, *self._at(rounds)) for rounds in sorted(counts)]
        return pd.DataFrame(rows, columns=["rounds", "epsilon", "noise_multiplier"])

    def _at(self, rounds: int) -> tuple[float, float]:
        """Return ε after some rounds at this σ, and the σ with which as many meet this ε."""
        steps = rounds * self.local_steps
        noise = calibrate(self.epsilon_budget, self.delta, self.sample_rate, steps)
        return self._spent(steps), noise

    def _spent(self, steps: int) -> float:
        history = [Segment(self.noise_multiplier, self.sample_rate, steps)]
        return epsilon_spent(history, self.delta).epsilon

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw both curves, with lines at the planned rounds, ε and σ.

        Parameters
        ----------
        path : path, optional
            A PNG file to write.

        Raises
        ------
        NotInstalled
            matplotlib or pandas is not installed.
        InvalidValue
            As for `curves`.
        """
        require("plots")
        from fedlora_flwr.plots.budget import budget_figure
        from fedlora_flwr.plots.figures import save

        figure = budget_figure(
            self.curves, self.rounds, self.epsilon_budget, self.noise_multiplier, self.delta
        )
        if path is not None:
            save(figure, Path(path))
        return figure

    def as_json(self) -> dict[str, Any]:
        """Return what ``fedlora budget --json`` prints, without its plot."""
        more = {"steps": self.steps, "epsilon_of_one_more": self.epsilon_of_one_more}
        return {**asdict(self), **more}


def plan_budget(
    *,
    delta: float,
    epsilon: float | None = None,
    noise_multiplier: float | None = None,
    rounds: int | None = None,
    local_steps: int = 1,
    records: int | None = None,
    batch_size: int | None = None,
    sample_rate: float | None = None,
) -> BudgetPlan:
    """Work out budget, noise or rounds: whichever of the three is not given.

    The sampling rate is given too, or it follows from batch size and records. Under a secure sum,
    give the run's sampling rate and the records of all clients. A round is then one step.

    Parameters
    ----------
    delta : float
        δ, between 0 and 1; below 1/n where the records are given.
    epsilon : float, optional
        The budget, above 0.
    noise_multiplier : float, optional
        σ, in units of the clip norm, from 0.
    rounds : int, optional
        T, at least 1.
    local_steps : int (default: 1)
        K: private steps per round.
    records : int, optional
        n: records of the client; under a secure sum, of all clients together.
    batch_size : int, optional
        Expected batch size b; q = b/n.
    sample_rate : float, optional
        q, in place of the batch size.

    Returns
    -------
    BudgetPlan
        All three. The noise is the smallest that meets the budget, to about 0.1 %. The rounds are
        exact: one round more is above the budget.

    Raises
    ------
    InvalidValue
        Not exactly two of the three are given, or a value is out of range.
    AccountantsDisagree
        See `fedlora_flwr.calibrate`.

    References
    ----------
    `fedlora_flwr.calibrate`, `fedlora_flwr.epsilon_spent` and `fedlora_flwr.rounds_within`.

    Examples
    --------
    >>> found = plan_budget(
    ...     delta=1e-3, epsilon=8.0, noise_multiplier=0.8, sample_rate=0.1, local_steps=10
    ... )
    >>> found.rounds, found.steps, round(found.epsilon["prv"], 2)
    (11, 110, 7.96)
    """
    _check_known({"epsilon": epsilon, "noise-multiplier": noise_multiplier, "rounds": rounds})
    if not 1 <= local_steps <= MAX_STEPS:
        raise InvalidValue("local-steps", local_steps, f"a whole number from 1 to {MAX_STEPS:,}")
    most = MAX_STEPS // local_steps
    if rounds is not None and not 1 <= rounds <= most:
        raise InvalidValue("rounds", rounds, f"a whole number from 1 to {most:,}")
    budget = math.inf if epsilon is None else epsilon
    if records is not None:
        # A secure sum fixes the rate, and each client's batch follows from its own records.
        check_budget(budget, delta, 1 if batch_size is None else batch_size, records)
    rate = _sample_rate(sample_rate, batch_size, records)
    solved_for = "epsilon"
    if rounds is None:
        solved_for, sigma = "rounds", noise_multiplier or 0.0
        rounds = rounds_within(budget, delta, sigma, rate, local_steps)
    elif noise_multiplier is None:
        solved_for, sigma = "noise-multiplier", calibrate(budget, delta, rate, rounds * local_steps)
    else:
        sigma = noise_multiplier
    history = [Segment(sigma, rate, rounds * local_steps)]
    spent = {name: epsilon_spent(history, delta, name).epsilon for name in ACCOUNTANTS}
    budget = spent["prv"] if epsilon is None else epsilon
    return BudgetPlan(solved_for, budget, delta, sigma, rate, rounds, local_steps, spent)


def _check_known(given: Mapping[str, float | None]) -> None:
    known = [key for key, value in given.items() if value is not None]
    if len(known) != 2:
        allowed = "two of epsilon, noise-multiplier and rounds, since the third is worked out"
        raise InvalidValue("given", ", ".join(known) or "nothing", allowed)


def _sample_rate(rate: float | None, batch_size: int | None, records: int | None) -> float:
    """Return q, which is given in one of two ways."""
    if rate is not None:
        if batch_size is not None:
            raise InvalidValue("batch-size", batch_size, "none beside a sample-rate")
        return rate
    if batch_size is None or records is None:
        missing = "batch-size" if batch_size is None else "records"
        raise InvalidValue(missing, None, "a number, unless sample-rate is given")
    return batch_size / records
