"""Sources of Gaussian noise."""

from __future__ import annotations

import os
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fedlora_flwr.randomness import RandomStream


class NoiseSource(Protocol):
    """Draws independent standard normal noise."""

    def normal_like(self, reference: Tensor) -> Tensor:
        """Return N(0, 1) noise with the shape, type and device of ``reference``."""
        ...


class SeededNoise:
    """Noise from NumPy's generator, drawn on the CPU so that it is the same for every device.

    PyTorch's generator uses only 32 bits of its seed, and an attacker could try all of these on a
    release.

    Parameters
    ----------
    seed : int or None
        For a private release it must be ``None``. The operating system then seeds the generator,
        and seeds it again in a process that is forked from this one, and in a copy. A number gives
        the same noise everywhere.

    Examples
    --------
    >>> first, again = (SeededNoise(7).normal_like(torch.zeros(2, 3)) for _ in range(2))
    >>> bool((first == again).all())
    True
    """

    def __init__(self, seed: int | None) -> None:
        self._stream = RandomStream(seed)

    def normal_like(self, reference: Tensor) -> Tensor:
        """Return noise shaped like ``reference``."""
        draws = self._stream.generator.standard_normal(reference.numel())
        return _like(draws, reference)


class SecureNoise:
    """Noise from the operating system's cryptographic generator.

    Each draw is a Box-Muller transform in fp64 of 53-bit uniform numbers. Each value is the sum of
    four draws, divided by two. This hides the grid of floating-point numbers that a single draw
    would expose (arXiv 2107.10138, section 5.1).

    Examples
    --------
    >>> first, next_one = (SecureNoise().normal_like(torch.zeros(2, 3)) for _ in range(2))
    >>> bool((first == next_one).any())
    False
    """

    def normal_like(self, reference: Tensor) -> Tensor:
        """Return noise shaped like ``reference``."""
        draws = self._normals(4 * reference.numel()).reshape(4, -1).sum(axis=0) / 2
        return _like(draws, reference)

    @staticmethod
    def _normals(count: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        pairs = (count + 1) // 2
        bits = np.frombuffer(os.urandom(16 * pairs), dtype=np.uint64) >> np.uint64(11)
        uniform = (bits.astype(np.float64) + 0.5) * 2.0**-53
        radius = np.sqrt(-2.0 * np.log(uniform[:pairs]))
        angle = 2.0 * np.pi * uniform[pairs:]
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


def _like(draws: np.ndarray[tuple[int], np.dtype[np.float64]], reference: Tensor) -> Tensor:
    # The type changes on the CPU, because some devices have no fp64.
    rounded = torch.from_numpy(draws).reshape(reference.shape).to(reference.dtype)
    return rounded.to(reference.device)
