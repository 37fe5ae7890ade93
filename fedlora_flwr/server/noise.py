"""How much noise a round's mean carries, against the most that its signal can be."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from fedlora_flwr.algebra.means import normalize
from fedlora_flwr.config import RunConfig
from fedlora_flwr.layout import Layout, part_of
from fedlora_flwr.plan import PARTS, ComponentPlan
from fedlora_flwr.privacy.clip_weights import ClipWeights
from fedlora_flwr.privacy.mechanism import Mechanism
from fedlora_flwr.privacy.postprocessing.filters import make_filter
from fedlora_flwr.strategies.cohort import cohort_size

Shape = tuple[int, ...]


def noisy_coordinates(
    plans: Sequence[ComponentPlan],
    layout: Layout,
    shapes: Mapping[str, Shape],
    steps: int,
    filter_name: str,
) -> float:
    """Count the coordinates that carry noise in a step, less what a filter removes of it.

    Parameters
    ----------
    plans : Sequence[ComponentPlan]
        Plans of some rounds. The result is the mean over these rounds.
    layout : Layout
        The arrays and their blocks.
    shapes : Mapping[str, tuple[int, ...]]
        Shape of each array.
    steps : int
        K, local steps of a round.
    filter_name : str
        One of `fedlora_flwr.privacy.postprocessing.filters.FILTERS`.

    Returns
    -------
    float
        D: white noise of variance v in the gradients gives a round's sum of filtered gradients the
        squared norm D K v. Without a filter, what trains in a step on average.
    """
    totals = [sum(_by_array(plan, layout, shapes, steps, filter_name).values()) for plan in plans]
    return float(np.mean(totals)) / steps


def noise_of_mean(
    config: RunConfig,
    server_round: int,
    plan: ComponentPlan,
    layout: Layout,
    shapes: Mapping[str, Shape],
    clients: Sequence[tuple[float, float]],
) -> dict[str, float]:
    """Return the norm of the noise that privacy adds to the mean of a round's updates.

    Parameters
    ----------
    config : RunConfig
        Optimizer, rates, filter, weights of the clip, and steps.
    server_round : int
        The round, which rates may depend on.
    plan : ComponentPlan
        What trained.
    layout : Layout
        The arrays and their blocks.
    shapes : Mapping[str, tuple[int, ...]]
        Shape of each array.
    clients : Sequence[tuple[float, float]]
        Weight in the mean, and noise variance (σC/b)², of each client of the mean.

    Returns
    -------
    dict[str, float]
        The norm of each part (A, B, head) that trained. Empty if the optimizer is not plain SGD,
        whose step is the rate times the gradient.
    """
    plain = config.optimizer == "sgd" and not (config.momentum or config.precondition)
    if not plain or not clients:
        return {}
    clip_weights = ClipWeights.configured(config)
    weights, variances = (np.array(column) for column in zip(*clients, strict=True))
    scale = float((normalize(weights.tolist()) ** 2 * variances).sum())
    rates = dict(zip(PARTS, config.learning_rates(server_round), strict=True))
    # The noise of a part is divided by its weight.
    rates = {part: rate / clip_weights.of_part(part) for part, rate in rates.items()}
    squares: dict[str, float] = {}
    found = _by_array(plan, layout, shapes, config.local_steps, config.filter)
    for name, coordinates in found.items():
        part = part_of(name)
        squares[part] = squares.get(part, 0.0) + coordinates * scale * rates[part] ** 2
    return {part: math.sqrt(square) for part, square in squares.items()}


def _by_array(
    plan: ComponentPlan, layout: Layout, shapes: Mapping[str, Shape], steps: int, filter_name: str
) -> dict[str, float]:
    """Return the squared norm of a round's sum of filtered noise of variance 1, by array."""
    trained = Counter(name for step in range(1, steps + 1) for name in layout.active(plan, step))
    return {
        name: math.prod(shapes[name])
        * spatial_gain(filter_name, name, shapes[name])
        * _temporal_sum(filter_name, count)
        for name, count in trained.items()
    }


def noise_to_signal(
    config: RunConfig, mechanisms: Sequence[Mechanism], coordinates: float
) -> float | None:
    """Return the ratio of a round's noise to the largest signal that it can hold.

    A step adds noise of standard deviation σ_i C/b to each of D coordinates. Over K steps, averaged
    over a cohort with weights w_i, its norm is about ``(C/b) √(D K Σ w_i² σ_i²)``; clipped
    gradients that all agree have norm ``K C``. Real gradients agree less, so this is the best case.
    Noise and gradients are compared as they are clipped, before the weights are divided out, so the
    ratio is the same under any weights.

    Parameters
    ----------
    config : RunConfig
        Steps, weights, share of the clients in a round.
    mechanisms : Sequence[Mechanism]
        The mechanisms of all clients; at least one.
    coordinates : float
        D, as `noisy_coordinates` counts them.

    Returns
    -------
    float or None
        ``√(D Σ w_i² σ_i² / K) / b``; ``None`` without privacy.
    """
    if not config.private:
        return None
    # A cohort of a share f has fewer clients, each with 1/f times the weight.
    cohort = cohort_size(len(mechanisms), config.fraction_train)
    variance = float(_variances(config, mechanisms).sum()) * len(mechanisms) / cohort
    return math.sqrt(coordinates * variance / config.local_steps) / mechanisms[0].batch_size


def noise_shares(config: RunConfig, mechanisms: Sequence[Mechanism]) -> NDArray[np.float64]:
    """Return each client's share of the noise variance of a round's mean, shape (clients,).

    Parameters
    ----------
    config : RunConfig
        Weights.
    mechanisms : Sequence[Mechanism]
        The mechanisms of all clients, at least one, each with noise.
    """
    variances = _variances(config, mechanisms)
    shares: NDArray[np.float64] = variances / variances.sum()
    return shares


def _variances(config: RunConfig, mechanisms: Sequence[Mechanism]) -> NDArray[np.float64]:
    """Return ``w_i² σ_i²`` of each client, where the weights of all clients add up to 1."""
    sigma = np.array([m.noise_multiplier for m in mechanisms])
    sizes = np.array([m.num_records for m in mechanisms], dtype=float)
    weights = {"uniform": np.ones_like(sigma), "size": sizes, "inverse-noise": sigma**-2.0}
    chosen = weights[config.weighting] / weights[config.weighting].sum()
    found: NDArray[np.float64] = chosen**2 * sigma**2
    return found


@lru_cache(maxsize=4096)
def spatial_gain(filter_name: str, name: str, shape: Shape) -> float:
    """Return what a filter leaves of white noise's power within one step's gradient.

    Parameters
    ----------
    filter_name : str
        One of `fedlora_flwr.privacy.postprocessing.filters.FILTERS`.
    name : str
        The array, whose factor says along which axis a filter works.
    shape : tuple[int, ...]
        Its shape.
    """
    made = make_filter(filter_name)
    made(name, torch.zeros(shape, device="meta"))
    return made.noise_gain(name)


@cache
def _temporal_sum(filter_name: str, count: int) -> float:
    """Return the variance of the sum of ``count`` filtered steps of white noise of variance 1.

    Filtered steps share noise, so their variances do not add up. The filter is linear: what noise
    of one step comes to in the sum is the sum of the filter's answers to an impulse there.
    """
    made, total = make_filter(filter_name), torch.zeros(count)
    for impulse in torch.eye(count):
        total += made("head", impulse)
    return float((total**2).sum())
