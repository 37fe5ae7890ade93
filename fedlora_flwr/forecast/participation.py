"""Forecasts how often each client of a simulation joins, and when the run ends."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedlora_flwr.config import RunConfig
from fedlora_flwr.strategies.cohort import cohort_size


@dataclass(frozen=True)
class Participation:
    """How often clients join if all stay connected.

    Parameters
    ----------
    cohort : int
        Clients per round.
    num_rounds : int
        Number of configured rounds.
    first_spent : int or None
        The round after which the first client has no budget left; ``None`` if none runs out before
        the last configured round.
    last_round : int
        The round after which no client has budget left, or the last configured one.
    least, most : int or None
        Rounds that a client joins, at least and at most; ``None`` if chance decides.
    mean : float
        Rounds that a client joins on average.
    """

    cohort: int
    num_rounds: int
    first_spent: int | None
    last_round: int
    least: int | None
    most: int | None
    mean: float

    @property
    def ends_early(self) -> bool:
        """Whether budgets end the run before its last round."""
        return self.last_round < self.num_rounds

    def __str__(self) -> str:
        """Say it in one line."""
        if self.least is None:
            joins = f"{self.mean:g} on average"
        elif self.least == self.most:
            every = "it" if self.num_rounds == 1 else f"all {self.num_rounds}"
            joins = every if self.most == self.num_rounds else f"{self.most}"
        else:
            joins = f"{self.least} or {self.most}"
        rounds = "1 round" if self.num_rounds == 1 else f"{self.num_rounds} rounds"
        clients = "1 client" if self.cohort == 1 else f"{self.cohort} clients"
        each = "" if self.num_rounds == 1 else " each"
        text = f"{rounds} with {clients}{each}; every client joins {joins}"
        if self.ends_early:
            text += f"; no client has budget left after round {self.last_round}"
        if self.first_spent and self.first_spent < self.last_round:
            text += f"; the first clients have none left after round {self.first_spent}"
        return text


def participation(config: RunConfig) -> Participation:
    """Work out how often clients join (see `fedlora_flwr.strategies.cohort.Turns`).

    Parameters
    ----------
    config : RunConfig
        The run. Its clients, rounds, ``fraction-train`` and ``max-rounds`` are read.
    """
    clients, rounds = config.num_clients, config.num_rounds
    cohort = cohort_size(clients, config.fraction_train)
    cap = config.max_rounds or rounds
    places = min(rounds * cohort, clients * cap)
    last = min(rounds, math.ceil(clients * cap / cohort))
    # Who had the fewest turns comes first, so no client has its last turn before all have had the
    # turn before it.
    first = clients * (cap - 1) // cohort + 1
    by_chance = not config.max_rounds and cohort < clients
    least, most = places // clients, math.ceil(places / clients)
    return Participation(
        cohort=cohort,
        num_rounds=rounds,
        first_spent=first if first < rounds else None,
        last_round=last,
        least=None if by_chance else least,
        most=None if by_chance else most,
        mean=places / clients,
    )
