"""How long an honest client's update can be, from public numbers alone.

A round's update is made of K clipped mean gradients and K times noise, and both have a known size.
docs/methods.md derives the bounds. The only statement of a client that this module reads is its
weight, where that depends on its noise: a client that states more noise weighs less.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from fedlora_flwr.algebra.means import Arrays
from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.methods import method_of
from fedlora_flwr.errors import InvalidValue, SuspectReply
from fedlora_flwr.layout import (
    Layout,
    by_part,
    factor_of,
    is_shared,
    layer_of,
    leading_ranks,
    rank_axis,
)
from fedlora_flwr.plan import HEAD, A, ComponentPlan
from fedlora_flwr.privacy.clip_weights import ClipWeights
from fedlora_flwr.privacy.postprocessing.adam import relative_error
from fedlora_flwr.privacy.postprocessing.filters import make_filter
from fedlora_flwr.privacy.postprocessing.optimizer import OptimizerSettings
from fedlora_flwr.server.noise import spatial_gain
from fedlora_flwr.strategies.replies import Upload
from fedlora_flwr.wire.order import Order

CHANCE = 1e-9
"""Largest probability that an honest upload exceeds its bound."""
_SLACK = 1e-3  # Relative slack for rounding, since clients compute in fp32.
_EPS = 2.0**-23
_MOST_STEPS = 5000  # The time to compute impulse responses grows with its square.


@dataclass(frozen=True)
class _Honest:
    """What is known of a part of every honest upload of a round.

    Parameters
    ----------
    rest : Arrays
        What is left of the arrays that the client started from.
    records, noise : float
        Bounds on what clipped gradients add to it, and on what noise adds for σ = 1.
    rounding : float
        Bound on what rounding adds.
    """

    rest: Arrays
    records: float
    noise: float
    rounding: float

    def moved(self, arrays: Arrays) -> float:
        """Return the norm of the difference between an upload and the rest."""
        # In fp32, as the client's own arithmetic: the slack is for both.
        gaps = ((arrays[name] - rest).ravel() for name, rest in self.rest.items())
        return math.sqrt(sum(float(np.dot(gap, gap)) for gap in gaps))

    def most(self, sigma: float) -> float:
        """Return the bound on that norm where the noise multiplier is σ."""
        noise = sigma * self.noise if self.noise else 0.0
        return (self.records + noise) * (1 + _SLACK) + self.rounding


_Shapes = tuple[tuple[str, tuple[int, ...]], ...]


class NormBound:
    """Bounds the updates of honest clients: a `Limit`.

    Parameters
    ----------
    config : RunConfig
        The run. `unknown` must return an empty text for it.
    chance : float (default: 1e-9)
        How likely an honest upload may be beyond the bound.
    """

    def __init__(self, config: RunConfig, chance: float = CHANCE) -> None:
        self._config = config
        self._chance = chance
        alpha, rank = config.lora_alpha, config.rank
        self._scaling = alpha / (math.sqrt(rank) if config.rslora else rank)
        self._weights = ClipWeights.configured(config)
        self._private = config.optimizer == "sgd"
        self._last: tuple[Order, Arrays, _Shapes, dict[str, _Honest]] | None = None

    def check(self, order: Order, current: Arrays, upload: Upload) -> None:
        """Refuse an upload that is beyond its bound.

        The upload is not cut to the bound. A cut upload could still be as long as only one honest
        update in 10⁹ is, and the cut would hide a device with wrong settings.

        Raises
        ------
        SuspectReply
            The upload is beyond its bound.
        """
        found = self.measured(order, current, upload.arrays, self.noise_of(upload.weight))
        for part, (norm, most) in found.items():
            if not norm <= most:
                hint = ". If this client rightly adds more noise than others, raise largest-noise"
                raise SuspectReply(
                    f"its update of {part} has norm {norm:.4g}, and an honest update has at most "
                    f"{most:.4g}{hint if self._private else ''}"
                )

    def noise_of(self, weight: float) -> float:
        """Return the largest noise multiplier σ that a client of this weight may have."""
        config = self._config
        if config.weighting != "inverse-noise":
            return config.largest_noise
        return min(config.largest_noise, config.batch_size / (config.clip_norm * math.sqrt(weight)))

    def measured(
        self, order: Order, current: Arrays, arrays: Arrays, sigma: float
    ) -> dict[str, tuple[float, float]]:
        """Return the norm of an update and its bound, by part (A, B, head).

        Parameters
        ----------
        order : Order
            What the client was asked for.
        current : Arrays
            The global arrays that it started from.
        arrays : Arrays
            What it uploaded.
        sigma : float
            Its noise multiplier. The bound for Adam does not depend on it.
        """
        honest = self._honest(order, current, tuple((n, a.shape) for n, a in arrays.items()))
        return {part: (one.moved(arrays), one.most(sigma)) for part, one in honest.items()}

    def _honest(self, order: Order, current: Arrays, shapes: _Shapes) -> dict[str, _Honest]:
        """Return what is known of each part; the clients of a round share it."""
        last = self._last
        if last is None or last[0] != order or last[1] is not current or last[2] != shapes:
            last = self._last = order, current, shapes, self._known(order, current, dict(shapes))
        return last[3]

    def _known(
        self, order: Order, current: Arrays, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, _Honest]:
        config = self._config
        layout, plan = Layout.of(current, config.block_pattern), ComponentPlan.parse(order.plan)
        settings = OptimizerSettings.in_round(config, order.server_round)
        settings = replace(settings, proximal_mu=order.proximal_mu)
        when = [set(layout.active(plan, step)) for step in range(1, config.local_steps + 1)]
        start = {name: _cut(name, current[name], shape) for name, shape in shapes.items()}
        parts = by_part(shapes)
        tail = math.log(2 * len(parts) / self._chance)
        found: dict[str, _Honest] = {}
        for part, names in parts.items():
            rate, records, noise = settings.rates[None if part == HEAD else part], 0.0, 0.0
            if config.optimizer == "sgd":
                gains = self._gains(names, layout, plan, order, current, start)
                kept, *bounds = self._of_sgd(names, start, when, gains, settings, rate, tail)
                records, noise = (bound / self._weights.of_part(part) for bound in bounds)
            else:
                kept, records = _of_adam(names, start, when, settings, rate)
            size = sum(float((np.asarray(start[name], np.float64) ** 2).sum()) for name in names)
            rounding = _EPS * (config.local_steps + 1) * math.sqrt(size)
            rest = {name: kept[name] * start[name] for name in names}
            found[part] = _Honest(rest, records, noise, rounding)
        return found

    def _of_sgd(
        self,
        names: Sequence[str],
        start: Arrays,
        when: Sequence[set[str]],
        gains: Mapping[str, NDArray[np.float64]],
        settings: OptimizerSettings,
        rate: float,
        tail: float,
    ) -> tuple[dict[str, float], float, float]:
        """Return what is left of each array's start, and both bounds (see `_Honest`) for weight 1.

        The weight is that of the part in the clip.
        """
        config = self._config
        counts = Counter(name for active in when for name in active)
        largest = np.zeros(len(when))  # of what a step's gradient comes to, over the names
        kept, power, peak = {}, 0.0, 0.0
        for name in names:
            answer, kept[name] = answers(settings, rate, config.filter, counts[name])
            steps = [step for step, active in enumerate(when) if name in active]
            gain = gains[name]
            largest[steps] = np.maximum(largest[steps], np.abs(answer) * gain.max())
            energy, shape = float((answer**2).sum()), start[name].shape
            white = spatial_gain(config.filter, name, shape) * start[name].size / len(gain)
            power += energy * white * float((gain**2).sum())
            peak = max(peak, energy * float(gain.max()) ** 2)
        unit, batch = config.clip_norm / config.batch_size, float(config.batch_size)
        records = (
            batch * largest.sum()
            + math.sqrt(2 * batch * float((largest**2).sum()) * tail)
            + float(largest.max(initial=0.0)) * tail / 3
        )
        noise = math.sqrt(power) + math.sqrt(2 * peak * tail)
        return kept, unit * records, unit * noise

    def _gains(
        self,
        names: Sequence[str],
        layout: Layout,
        plan: ComponentPlan,
        order: Order,
        current: Arrays,
        start: Arrays,
    ) -> dict[str, NDArray[np.float64]]:
        """Return what preconditioning multiplies an array's gradient by, one number per rank."""
        config = self._config
        if not config.precondition:
            return {name: np.ones(1) for name in names}
        moving = set(layout.trained(plan, config.local_steps))
        found: dict[str, NDArray[np.float64]] = {}
        for name in names:
            factor, scale = factor_of(name), self._scaling**-2
            if factor is None:
                found[name] = np.ones(1)
                continue
            b, a = layout.pair(layer_of(name))
            other = b if factor == A else a
            rank = start[name].shape[rank_axis(name)]
            if other in moving or other not in current or not is_shared(other, order.share):
                # It moves where the server cannot see it, and its Gram matrix is at least 0.
                found[name] = np.full(rank, scale / config.ridge)
                continue
            frozen = np.asarray(leading_ranks(other, current[other], rank), np.float64)
            gram = frozen.T @ frozen if factor == A else frozen @ frozen.T
            eigenvalues = np.linalg.eigvalsh(gram).clip(min=0.0)
            found[name] = scale / (eigenvalues + config.ridge)
        return found


def unknown(config: RunConfig) -> str:
    """Say why no bound follows from public numbers; empty where one does."""
    if config.secure_sum:
        return "the server sees only the sum of uploads under trust-model = 'secure-sum'"
    if method_of(config.strategy).own_models:
        return f"clients start from models of their own with strategy = {config.strategy!r}"
    if config.local_steps > _MOST_STEPS:
        return f"local-steps is above {_MOST_STEPS}"
    if config.optimizer != "sgd":
        return ""
    if math.isinf(config.clip_norm):
        return "clip-norm = inf leaves gradients unbounded"
    if config.precondition and not config.ridge:
        return "ridge = 0 leaves preconditioning unbounded"
    pulled = any(key.endswith(".proximal-mu") and value for key, value in config.own)
    if config.precondition and pulled:
        return "precondition = true is combined with a proximal term"
    if math.isinf(config.largest_noise) and config.weighting != "inverse-noise":
        return (
            "the server does not know how much noise an honest client adds. Set largest-noise, or "
            "weighting = 'inverse-noise'"
        )
    return ""


def check_known(config: RunConfig) -> None:
    """Refuse a run that asks for a norm bound which does not follow from public numbers.

    Raises
    ------
    InvalidValue
        No bound follows. The message says why.
    """
    if config.robust == "norm-bound" and (reason := unknown(config)):
        allowed = "another rule, or 'none'. The server cannot compute a norm bound, because"
        raise InvalidValue("robust", config.robust, f"{allowed} {reason}")


@lru_cache(maxsize=256)
def answers(
    settings: OptimizerSettings, rate: float, filter_name: str, count: int
) -> tuple[NDArray[np.float64], float]:
    """Return what a step's gradient comes to in a round's update, by the real SGD and filter.

    Both are linear, so an impulse in each step tells everything. Spatial filters act within a step,
    and are left out.

    Parameters
    ----------
    settings : OptimizerSettings
        Momentum, weight decay and proximal term.
    rate : float
        Learning rate.
    filter_name : str
        One of `fedlora_flwr.privacy.postprocessing.filters.FILTERS`.
    count : int
        Steps in which the array trains.

    Returns
    -------
    tuple of ndarray, (count,), and float
        The factors, and what is left of the array's start.
    """
    made = make_filter(filter_name)
    place = torch.zeros(count + 1, dtype=torch.float64)
    place[-1] = 1.0  # The start; no gradient comes here.
    anchor, parameter = place.clone(), torch.nn.Parameter(place)
    optimizer = settings.build([{"params": [parameter], "lr": rate}])
    for step in range(count):
        impulse = torch.zeros_like(anchor)
        impulse[step] = 1.0
        pull = settings.proximal_mu * (parameter.detach() - anchor)
        parameter.grad = made("head", impulse) + pull
        optimizer.step()
    found = parameter.detach().numpy()
    return -found[:-1], float(found[-1])


def _of_adam(
    names: Sequence[str],
    start: Arrays,
    when: Sequence[set[str]],
    settings: OptimizerSettings,
    rate: float,
) -> tuple[dict[str, float], float]:
    """Return what is left of each array's start, and the bound on the rest."""
    counts = Counter(name for active in when for name in active)
    kept, square = {}, 0.0
    for name in names:
        steps, least = adam_steps(settings, counts[name]), 1 - rate * settings.weight_decay
        kept[name] = least ** counts[name]
        later = np.abs(least) ** np.arange(counts[name] - 1, -1, -1.0)
        square += start[name].size * (rate * float(steps @ later)) ** 2
    return kept, math.sqrt(square)


@lru_cache(maxsize=256)
def adam_steps(settings: OptimizerSettings, count: int) -> NDArray[np.float64]:
    """Bound a coordinate's move in each of Adam's steps, in units of its rate, for any gradients.

    Parameters
    ----------
    settings : OptimizerSettings
        Which Adam.
    count : int
        Steps in which the array trains.
    """
    optimizer = settings.build([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 1.0}])
    first, second = optimizer.defaults["betas"]
    found = np.empty(count)
    for step in range(1, count + 1):
        ages = np.arange(step - 1, -1, -1.0)
        mean = (1 - first) * first**ages / (1 - first**step)
        square = (1 - second) * second**ages / (1 - second**step)
        # Cauchy and Schwarz: the mean against the root of the mean square.
        most = math.sqrt(float((mean**2 / square).sum()))
        if settings.name == "adamw":
            # The square less its noise Φ is at least this share of Φ.
            floor = relative_error(second, step)
            most *= math.sqrt((1 + floor) / floor)
        found[step - 1] = most
    return found


def _cut(name: str, array: NDArray[np.floating], shape: tuple[int, ...]) -> NDArray[np.floating]:
    """Return the part of a global array that a client of its own rank starts from."""
    return leading_ranks(name, array, shape[rank_axis(name)]) if factor_of(name) else array
