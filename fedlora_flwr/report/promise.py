"""The trust model and the promise of a run, in sentences."""

from __future__ import annotations

import math

from fedlora_flwr.config.unit import protected
from fedlora_flwr.report.facts import RunFacts, number
from fedlora_flwr.report.outcome import outcome
from fedlora_flwr.report.scales import in_words, plain

NOT_PRIVATE = "This adapter is not private. Do not publish it."
SEVERAL = "whoever sees the results of several has seen the sum of their ε"
ADDS_UP = f"Other runs on the same records add up with this one: {SEVERAL}."


def simulated(clients: int, *, private: bool) -> str:
    """Say who held the records in a simulation, and to whom its promise is.

    Parameters
    ----------
    clients : int
        Number of simulated clients.
    private : bool
        Whether the run promised anything.
    """
    whose = "the only simulated client" if clients == 1 else f"all {clients} simulated clients"
    told = f"This was a simulation: one process held the records of {whose}."
    to = " The promise is to whoever sees the adapter, and not to that process."
    return told + to * private


def in_short(facts: RunFacts) -> str:
    """Say in three sentences what was run, what its ε means, and what it has reached."""
    config, metric = facts.config, in_words(facts.metric)
    rounds = max(len(facts.rounds) - 1, 0)
    clients = f"{'simulated ' * facts.simulated}client{'s' * (facts.num_clients != 1)}"
    run = (
        f"{config.strategy} trained LoRA adapters over {rounds} "
        f"round{'s' * (rounds != 1)} with {facts.num_clients} {clients}."
    )
    first, last = outcome(facts)
    reached = f"The {metric} was {first} at the start and {last} at the end."
    return f"{run} {_factor(facts)} {reached}"


def _factor(facts: RunFacts) -> str:
    if not facts.config.private:
        return "The run added no noise, so it promises nothing about any record."
    spent = number(facts.summary.get("epsilon_max"))
    epsilon = facts.config.epsilon if spent is None else spent
    factor = f"{math.exp(epsilon):,.3g}" if epsilon < 7 else f"{math.exp(min(epsilon, 500)):.1e}"
    return (
        f"ε = {plain(epsilon)} means that what one {facts.config.unit} adds makes no outcome more "
        f"than {factor} times as likely, except with probability δ."
    )


def promise(facts: RunFacts) -> str:
    """Return whom a participant had to trust, and what is promised about one record, or user."""
    if not facts.config.private:
        return (
            "None. The run added no noise (epsilon = inf), so it promises nothing about any record."
        )
    own = [simulated(facts.num_clients, private=True)] if facts.simulated else []
    return " ".join([_trust(facts), *own, _meaning(facts), *_spent(facts), *_limits(facts)])


def _trust(facts: RunFacts) -> str:
    if not facts.config.secure_sum:
        return (
            "Trust model: local. Each client added all of its noise before anything left it, so no "
            "client had to trust the server or another client."
        )
    told = (facts.summary.get("remarks") or {}).get("secure sum", "no round was summed")
    return (
        "Trust model: secure sum. All clients together added the noise, each a share, and only the "
        f"sum of their uploads was to be opened ({told}). Clients had to trust that at most "
        f"{facts.config.colluding} of them side with the server."
    )


def _meaning(facts: RunFacts) -> str:
    unit = facts.config.unit
    return (
        f"The promise is for {protected(facts.config)}. Compared with a run in which the "
        f"{unit}'s gradient is zero in every step, no outcome is more than e^ε times as likely, "
        "except with probability δ."
    )


def _spent(facts: RunFacts) -> list[str]:
    summary = facts.summary
    spent, budget = number(summary.get("epsilon_max")), number(summary.get("epsilon_budget"))
    if spent is None or budget is None:
        return [f"The budget is ε = {facts.config.epsilon:g} at δ = {facts.config.delta:g}."]
    by = f" by the accountant {summary['accountant']}" if summary.get("accountant") else ""
    return [
        f"The largest ε that a client has spent is {plain(spent)} of {plain(budget)}, at "
        f"δ = {plain(number(summary.get('delta')) or facts.config.delta)}{by}."
    ]


def _limits(facts: RunFacts) -> list[str]:
    units = f"{facts.config.unit}s"
    found = [f"The promise does not cover the public test set, and not how many {units} there are."]
    if facts.config.ledger_scope == "run":
        found.append(ADDS_UP)
    if facts.config.reproducible:
        found.append(
            "This is a simulation and not a release: its noise follows a seed, and anyone who "
            "knows the seed can remove the noise."
        )
    if facts.summary.get("unprotected_metrics"):
        found.append("Losses on private records were also reported, without noise.")
    return found
