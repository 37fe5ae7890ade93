"""Ten million samples of each noise source against its exact law, and what secure noise costs.

Every row has a bound that a correct source passes but for one time in a million.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from scipy import stats  # type: ignore[import-untyped]

from benchmarks.figures import Figure, table, take_turns, write_content
from fedlora_flwr.clients.trainer import LocalTrainer
from fedlora_flwr.config.recipes import load_recipe
from fedlora_flwr.plan import ComponentPlan
from fedlora_flwr.privacy.mechanism import Mechanism
from fedlora_flwr.privacy.noise import NoiseSource, SecureNoise, SeededNoise
from fedlora_flwr.secure_sum.discrete_gaussian import discrete_gaussian, system_words
from fedlora_flwr.tasks.registry import with_clients
from fedlora_flwr.terminal import show

Values: TypeAlias = NDArray[Any]
Draw: TypeAlias = Callable[[int], Values]
COUNT, CHUNK = 10_000_000, 1_000_000
FALSE_ALARM = 1e-6
COARSE, FINE = 8, 1 << 20
LAGS = (1, 2, 3, 17, 1000)


def sources() -> Mapping[str, tuple[Draw, int]]:
    """Return each source with its deviation on a grid of whole numbers, or 0 if continuous."""

    def normal(source: NoiseSource) -> Draw:
        return lambda count: source.normal_like(torch.zeros(count, dtype=torch.float64)).numpy()

    return {
        "default": (normal(SeededNoise(None)), 0),
        "secure-noise": (normal(SecureNoise()), 0),
        f"discrete, s = {COARSE}": (lambda n: discrete_gaussian(COARSE, n, system_words), COARSE),
        f"discrete, s = {FINE:,}": (lambda n: discrete_gaussian(FINE, n, system_words), FINE),
    }


def examine(name: str, draw: Draw, deviation: int, count: int) -> Iterator[Figure]:
    """Draw from one source and compare it with its law."""
    parts = [draw(min(CHUNK, count - done)) for done in range(0, count, CHUNK)]
    whole = np.concatenate(parts)
    del parts
    z = whole / (deviation or 1)
    score = float(stats.norm.isf(FALSE_ALARM / 2))
    measured = [
        ("mean", z.mean(), 1.0),
        ("variance", z.var() - 1, 2.0),
        ("skewness", stats.skew(z), 6.0),
        ("excess kurtosis", stats.kurtosis(z), 24.0),
        *((f"correlation at lag {lag}", _correlation(z, lag), 1.0) for lag in LAGS),
        *((f"correlation of squares at lag {lag}", _correlation(z**2, lag), 1.0) for lag in LAGS),
    ]
    for what, found, variance in measured:
        error = math.sqrt(variance / count)
        label = f"{name}: {what}"
        note = f"{found:.2e}"
        yield Figure(label, abs(float(found)), score * error, "", "exact law", 1.0, note)
    for reach in (3, 4, 5):
        yield _tail(name, whole, deviation, reach)
    yield _shape(name, whole, deviation)


def _correlation(z: Values, lag: int) -> float:
    centered = z - z.mean()
    return float(centered[:-lag] @ centered[lag:] / (centered @ centered))


def _tail(name: str, whole: Values, deviation: int, reach: int) -> Figure:
    """Count the samples beyond some deviations, and compare with a binomial law."""
    if deviation:
        chance = 1 - float(_weights(deviation, reach * deviation).sum())
    else:
        chance = float(2 * stats.norm.sf(reach))
    found = int((np.abs(whole) > reach * (deviation or 1)).sum())
    expected = len(whole) * chance
    law = stats.binom(len(whole), chance)
    low, high = law.ppf(FALSE_ALARM / 2), law.isf(FALSE_ALARM / 2)
    allowed = max(expected - low, high - expected)
    what, note = f"{name}: beyond {reach} deviations", f"{found} of {expected:.1f} expected"
    return Figure(what, abs(found - expected), float(allowed), "samples", "binomial", 1.0, note)


def _shape(name: str, whole: Values, deviation: int) -> Figure:
    """Compare the whole distribution: by Kolmogorov-Smirnov, or by chi-square on whole numbers."""
    if deviation == COARSE:
        reach = 12 * deviation
        expected = len(whole) * _weights(deviation, reach)
        seen = np.bincount(whole + reach, minlength=2 * reach + 1)
        common = expected >= 10  # The rule for a chi-square statistic; what is rarer is one class.
        statistic = float(((seen - expected)[common] ** 2 / expected[common]).sum())
        rare, left = expected[~common].sum(), seen[~common].sum()
        statistic += float((left - rare) ** 2 / rare)
        bound = float(stats.chi2.isf(FALSE_ALARM, int(common.sum())))
        return Figure(f"{name}: chi-square", statistic, bound, "", "exact law", 1.0)
    # A jump of the discrete law, 4e-7 at s = 2^20, is far below the statistic's own error.
    found = float(stats.kstest(whole / (deviation or 1), "norm", method="asymp").statistic)
    bound = float(stats.kstwobign.isf(FALSE_ALARM) / math.sqrt(len(whole)))
    return Figure(f"{name}: Kolmogorov-Smirnov", found, bound, "", "normal law", 1.0)


def _weights(deviation: int, reach: int) -> NDArray[np.float64]:
    """Return the probabilities of -reach … reach under the discrete Gaussian."""
    far = np.arange(-12 * deviation, 12 * deviation + 1, dtype=np.float64)
    total = np.exp(-(far**2) / (2 * deviation**2)).sum()
    near = np.arange(-reach, reach + 1, dtype=np.float64)
    found: NDArray[np.float64] = np.exp(-(near**2) / (2 * deviation**2)) / total
    return found


def costs(count: int, repetitions: int) -> Iterator[Figure]:
    """Time the draw of some numbers by each source, and a step of the digits recipe with each."""
    draws = {name: (lambda d=draw: d(count)) for name, (draw, _) in sources().items()}
    seconds = take_turns(draws, repetitions)
    for name, found in seconds.items():
        what = f"{name}: drawing {count:,} numbers"
        yield Figure(what, 1e3 * found, 1e3 * seconds["default"], "ms", "default")
    calls = {str(secure): _step(secure) for secure in (False, True)}
    steps = take_turns(calls, 10 * repetitions)  # Milliseconds each.
    what = "secure-noise: a step of the digits recipe"
    yield Figure(what, 1e3 * steps["True"], 1e3 * steps["False"], "ms", "default")


def _step(secure: bool) -> Callable[[], object]:
    """Return a call of one local step of the digits recipe on a client of usual size."""
    config = load_recipe("digits")
    config = replace(config, reproducible=False, secure_noise=secure, local_steps=1, device="cpu")
    trainer = LocalTrainer.build(config)
    records = trainer.task.client_records(0, with_clients(config, trainer.task).num_clients)
    mechanism = Mechanism(1.0, 1.0, min(config.batch_size, len(records)), len(records))
    plan = ComponentPlan.parse("B")
    return lambda: trainer.train(trainer.start, plan, records, mechanism, ("client", 1))


def main(argv: Sequence[str] | None = None) -> None:
    """Draw ten million samples of each noise source, compare them with its law, and time them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.randomness", description=main.__doc__
    )
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--count", type=int, default=COUNT, help="samples of each source")
    parser.add_argument("--repetitions", type=int, default=9, help="of each timed call")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    began, found = time.perf_counter(), {}
    for name, (draw, deviation) in sources().items():
        found[name] = list(examine(name, draw, deviation, given.count))
        show(Console(), table(found[name]))
    found["costs"] = list(costs(1_000_000, given.repetitions))
    show(Console(), table(found["costs"]))
    if given.output:
        figures = {name: [one.as_dict() for one in rows] for name, rows in found.items()}
        seconds = round(time.perf_counter() - began, 1)
        command = "python -m benchmarks.randomness"
        write_content(given.output, command, {"seconds": seconds, "figures": figures})


if __name__ == "__main__":
    main()
