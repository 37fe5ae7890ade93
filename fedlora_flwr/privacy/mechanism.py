"""The Poisson-subsampled Gaussian mechanism of one client, and the records that join each step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedlora_flwr.config.unit import RECORD, counted
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.privacy.clip_weights import EVEN, ClipWeights
from fedlora_flwr.randomness import RandomStream

# Clipped sums are fp32 numbers near 1. Much smaller noise would be lost to rounding, and under much
# larger noise the records would be lost to rounding.
SMALLEST, LARGEST = 1e-3, 1e6


@dataclass(frozen=True)
class Mechanism:
    """The Poisson-subsampled Gaussian mechanism of one client.

    Parameters
    ----------
    noise_multiplier : float
        σ: the noise's standard deviation divided by the clip norm, 0.001 to 1e6; 0 adds no noise.
    clip_norm : float
        C: largest L2 norm of a record's gradient over all tensors that train together. Infinity
        leaves gradients as they are.
    batch_size : float
        Expected batch size b, by which the noisy sum is divided; above 0. It may be below 1 under a
        secure sum, where q is given and b = q·n follows from it.
    num_records : int
        n, the number of units of the promise: of records, or of users where ``unit`` says so. Each
        joins a step with probability ``sample_rate``.
    rate : float, optional
        q, where b = q·n follows from it; by default q is b/n. A given q is the same number for all
        clients, to the last bit.
    weights : ClipWeights
        What gradients are multiplied by before they are clipped, by part; by default nothing. The
        norm C then bounds the weighted gradient.
    unit : str (default: "record")
        One of `fedlora_flwr.config.unit.UNITS`. Under ``"user"``, what is said of a record here
        holds for a user: the gradient is the mean of those of its records.

    Raises
    ------
    InvalidValue
        A value out of range, or noise without a finite clip norm.

    Guarantees
    ----------
    *What holds.* T steps with these numbers are the Poisson-subsampled Gaussian mechanism with σ
    and q = b/n, for one record whose gradient is replaced by zero (zero-out adjacency).
    *Under which assumptions.* Each record joins each step by a draw of its own (`poisson_batches`),
    each record's weighted gradient is cut to norm C, and the noise is drawn fresh for each step.
    *What does not hold.* There is no promise for n itself, which q, b and σ reveal. With ``unit =
    "record"`` there is none for several records of one person together.

    Examples
    --------
    >>> Mechanism(noise_multiplier=1.0, clip_norm=1.0, batch_size=32, num_records=320).sample_rate
    0.1
    """

    noise_multiplier: float
    clip_norm: float
    batch_size: float
    num_records: int
    rate: float | None = None
    weights: ClipWeights = EVEN
    unit: str = RECORD

    def __post_init__(self) -> None:
        if self.noise_multiplier != 0 and not SMALLEST <= self.noise_multiplier <= LARGEST:
            allowed = f"0 for no noise, or {SMALLEST:g} to {LARGEST:g}, the range of fp32 sums"
            raise InvalidValue("noise multiplier", self.noise_multiplier, allowed)
        if not self.clip_norm > 0:
            raise InvalidValue("clip-norm", self.clip_norm, "a number above 0")
        if self.noise_multiplier > 0 and math.isinf(self.clip_norm):
            raise InvalidValue("clip-norm", self.clip_norm, "a finite number where noise is added")
        if not 0 < self.batch_size <= self.num_records:
            allowed = f"a number above 0, at most n = {counted(self.num_records, self.unit)}"
            raise InvalidValue("batch-size", self.batch_size, allowed)
        if self.rate is not None and not 0 < self.rate <= 1:
            raise InvalidValue("sample-rate", self.rate, "a number above 0 and at most 1")

    @property
    def sample_rate(self) -> float:
        """Probability q with which a record joins a step."""
        return self.batch_size / self.num_records if self.rate is None else self.rate

    @property
    def noise_variance(self) -> float:
        """Variance (σC/b)² of the noise in each coordinate of the mean of weighted gradients."""
        if self.noise_multiplier == 0:
            return 0.0
        deviation = self.noise_multiplier * self.clip_norm / self.batch_size
        # Not ``deviation ** 2``: on overflow it raises an error, while a product is infinite.
        return deviation * deviation

    def weight(self, weighting: str) -> float:
        """Return the aggregation weight of this client: n, b²/(σC)² or 1.

        Parameters
        ----------
        weighting : str
            ``"size"``, ``"inverse-noise"`` or ``"uniform"``.
        """
        if weighting == "size":
            return float(self.num_records)
        return 1 / self.noise_variance if weighting == "inverse-noise" else 1.0

    def noise_variance_of(self, name: str) -> float:
        """Return the variance of the noise in each coordinate of an array's released gradient.

        It is (σC/(b w))² where w is the weight of the array's part.

        Parameters
        ----------
        name : str
            The array.
        """
        return self.noise_variance / self.weights.of(name) ** 2


def poisson_batches(mechanism: Mechanism, num_steps: int, seed: int | None) -> Iterator[Tensor]:
    """Draw the units of each step: every record, or user, joins with probability q, independently.

    Parameters
    ----------
    mechanism : Mechanism
        Gives n and q.
    num_steps : int
        Number of steps.
    seed : int or None
        Seed of the draws. ``None`` has them seeded by the operating system, and again in a forked
        process.

    Yields
    ------
    Tensor
        Numbers of the units that joined, int64, shape (k,); k may be 0. For records these are
        their positions; `fedlora_flwr.privacy.units.Units.sample` turns users into records.
    """
    # NumPy's generator for the reason given in `SeededNoise`.
    stream = RandomStream(seed)
    for _ in range(num_steps):
        joins = stream.generator.random(mechanism.num_records) < mechanism.sample_rate
        yield torch.from_numpy(np.flatnonzero(joins))
