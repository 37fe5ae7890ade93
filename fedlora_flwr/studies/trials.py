"""The trials of a comparison, in the order in which they can run.

Each row has the same number of trials at each ε, under any sampler, and all of them have a seed
that is not reported. ``rows.csv`` is the only memory: a comparison that continues builds Optuna's
studies from it again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedlora_flwr.randomness import stream_seed
from fedlora_flwr.studies.compare_results import TUNE, Pair, Rates, Row, RowKey, budget_name
from fedlora_flwr.studies.comparison import RANGES, TUNING_SEED, Comparison, Job, rounded
from fedlora_flwr.studies.sampler_names import OPTUNA

_MOST_DRAWS = 20  # A trial that has been done tells nothing new, so other rates are drawn.


def trial_jobs(comparison: Comparison, rows: Mapping[RowKey, Row]) -> Iterator[list[Job]]:
    """Yield the runs by which rates are chosen, those together that may run at the same time.

    Parameters
    ----------
    comparison : Comparison
        What is compared.
    rows : Mapping
        The finished runs by key. They are read again after each list, whose runs they hold then.
    """
    if comparison.sampler != OPTUNA:
        yield comparison.tune_jobs()
        return
    # One trial per row and ε at a time: the same trials follow with any number of workers.
    for number in range(comparison.trials):
        yield [
            comparison.trial(pair, _rates(comparison, pair, number, rows))
            for pair in comparison.pairs
            if number < comparison.trials_of(pair[0])
        ]


def _rates(comparison: Comparison, pair: Pair, number: int, rows: Mapping[RowKey, Row]) -> Rates:
    """Return the rates of a pair's trial, which is counted from 0."""
    own = comparison.candidates(pair[0])[0]
    if number == 0:
        return own
    tried = [(_of(key), row) for key, row in rows.items() if key[:3] == (TUNE, *pair)]
    # The own rates may be the last row instead of the first, if their run failed before.
    others = [rates for rates, _ in tried if rates != own]
    if number <= len(others):
        return others[number - 1]
    free = [name for name in RANGES if name not in comparison.kept(pair[0])]
    named, found = dict(zip(RANGES, own, strict=True)), own
    for draw in range(_MOST_DRAWS):
        found = _asked(named, free, tried, seed=_seed(pair, number, draw))
        if found not in [rates for rates, _ in tried]:
            break
    return found


def _asked(
    own: Mapping[str, float],
    free: Sequence[str],
    tried: Sequence[tuple[Rates, Row]],
    seed: int,
) -> Rates:
    """Return the rates that Optuna's TPE asks for after the trials so far.

    The study is built from the finished runs. A failed run counts as a failed trial.
    """
    import optuna
    from optuna.distributions import FloatDistribution
    from optuna.trial import TrialState, create_trial

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    ranges = {
        name: FloatDistribution(own[name] * RANGES[name][0], own[name] * RANGES[name][1], log=True)
        for name in free
    }
    # Optuna draws its first ten trials at random, which are all where a budget is small.
    sampler = optuna.samplers.TPESampler(n_startup_trials=4, seed=seed)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for rates, row in tried:
        named = dict(zip(RANGES, rates, strict=True))
        params = {
            name: min(max(named[name], limits.low), limits.high) for name, limits in ranges.items()
        }
        good = not row["error"] and math.isfinite(row["final"])
        made: dict[str, Any] = {"value": row["final"]} if good else {"state": TrialState.FAIL}
        study.add_trial(create_trial(params=params, distributions=dict(ranges), **made))
    asked = study.ask(dict(ranges)).params
    a, b, head = (rounded(asked[name]) if name in asked else own[name] for name in RANGES)
    return a, b, head


def _of(key: RowKey) -> Rates:
    a, b, head = key[-len(RANGES) :]
    return a, b, head


def _seed(pair: Pair, *numbers: int) -> int:
    row, epsilon = pair
    return stream_seed(TUNING_SEED, "sampler", row, budget_name(epsilon), *numbers) % 2**32
