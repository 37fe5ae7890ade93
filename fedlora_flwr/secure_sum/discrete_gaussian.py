"""Exact samples of the discrete Gaussian, in whole numbers only.

A rounded sample of a continuous Gaussian follows another distribution, and the low bits of a
floating-point sum reveal something of its terms. No floating-point number is involved here: every
decision compares whole numbers of 64 bits with words from the operating system.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedlora_flwr.errors import InvalidValue

__all__ = ["LARGEST_DEVIATION", "Words", "discrete_gaussian", "seeded_words", "system_words"]

Words: TypeAlias = Callable[[int], NDArray[np.uint64]]
"""A function that returns the given number of independent, uniform 64-bit words."""

LARGEST_DEVIATION = 1 << 22
"""Largest standard deviation for which all products fit into 64 bits."""

_CHUNK = 1 << 16  # Candidates at a time: their arrays stay in a processor's cache.
# A Laplace candidate this many deviations away from 0 would be kept with a probability below
# exp(-130,000). It is always dropped, which keeps all products within 64 bits.
_MOST_DEVIATIONS = 512


def system_words(count: int) -> NDArray[np.uint64]:
    """Return words from the operating system's cryptographic generator, shape (count,)."""
    return np.frombuffer(os.urandom(8 * count), dtype=np.uint64)


def seeded_words(seed: int) -> Words:
    """Return a source that gives the same words for the same seed, for repeatable experiments.

    Parameters
    ----------
    seed : int
        Anyone who knows it knows the noise, so noise from this source protects nobody.
    """
    generator = np.random.default_rng(seed)
    return lambda count: np.frombuffer(generator.bytes(8 * count), dtype=np.uint64)


def discrete_gaussian(deviation: int, count: int, words: Words = system_words) -> NDArray[np.int64]:
    r"""Draw from the discrete Gaussian on the whole numbers, exactly.

    The probability of x is proportional to :math:`\exp(-x^2 / 2s^2)`. A candidate X comes from the
    discrete Laplace distribution of scale s, which is kept with probability
    :math:`\exp(-(|X| - s)^2 / 2s^2)`. With a whole s all fractions have denominators that fit into
    64 bits, so that the draws can be made for a whole array at once.

    Parameters
    ----------
    deviation : int
        s, from 1 to `LARGEST_DEVIATION`. The variance is s² up to a relative error that is below
        1e-6 at s = 1 and below 1e-30 from s = 2 on.
    count : int
        Number of independent samples, at least 0.
    words : callable (default: the operating system's generator)
        Where the randomness comes from.

    Returns
    -------
    ndarray
        int64, shape (count,).

    Raises
    ------
    InvalidValue
        An argument is out of range.

    Notes
    -----
    The time of a call depends on how many candidates were refused. It tells a little about all
    samples together and nothing about the values that they are added to.

    References
    ----------
    arXiv 2004.00010, algorithms 1 to 3, with t = s in place of ⌊s⌋ + 1.

    Examples
    --------
    >>> discrete_gaussian(10, 5, seeded_words(1)).dtype
    dtype('int64')
    """
    if not 1 <= deviation <= LARGEST_DEVIATION or deviation != int(deviation):
        allowed = f"a whole number from 1 to {LARGEST_DEVIATION:,}"
        raise InvalidValue("deviation", deviation, allowed)
    if count < 0:
        raise InvalidValue("count", count, "a whole number of at least 0")
    found = np.empty(count, np.int64)
    filled = 0
    while filled < count:
        # About half of the candidates are kept.
        size = min(_CHUNK, 2 * (count - filled) + 16)
        kept = _candidates(int(deviation), size, words)[: count - filled]
        found[filled : filled + len(kept)] = kept
        filled += len(kept)
    return found


def _candidates(scale: int, count: int, words: Words) -> NDArray[np.int64]:
    """Draw ``count`` candidates and return those that are kept."""
    laplace = _laplace(scale, count, words)
    away = np.abs(laplace) - scale
    kept = _decays((away * away).astype(np.uint64), 2 * scale * scale, words)
    found: NDArray[np.int64] = laplace[kept]
    return found


def _laplace(scale: int, count: int, words: Words) -> NDArray[np.int64]:
    """Return discrete Laplace samples: P(x) ∝ exp(-|x|/scale). Some of ``count`` are refused."""
    part = _below(scale, count, words)
    part = part[_decays(part, scale, words)]
    whole = _failures(len(part), words)
    negative = _below(2, len(part), words) == 1
    size = part.astype(np.int64) + scale * whole
    # Zero is kept with one sign only. With both it would be drawn twice as often.
    kept = ~(negative & (size == 0)) & (whole < _MOST_DEVIATIONS)
    found: NDArray[np.int64] = np.where(negative, -size, size)[kept]
    return found


def _failures(count: int, words: Words) -> NDArray[np.int64]:
    """Return geometric samples: how many draws of probability exp(-1) hit before the first miss."""
    found = np.zeros(count, np.int64)
    going = np.arange(count)
    while len(going):
        going = going[_decays_once(np.ones(len(going), np.uint64), 1, words)]
        found[going] += 1
    return found


def _decays(numerators: NDArray[np.uint64], denominator: int, words: Words) -> NDArray[np.bool_]:
    """Return true with probability exp(-n/d) for each n: exp(-1) for each whole, then the rest."""
    found = np.ones(len(numerators), np.bool_)
    wholes, rest = np.divmod(numerators, np.uint64(denominator))
    going, done = np.flatnonzero(wholes), np.uint64(0)
    while len(going):
        kept = _decays_once(np.ones(len(going), np.uint64), 1, words)
        found[going[~kept]] = False
        done += np.uint64(1)
        going = going[kept]
        going = going[wholes[going] > done]
    left = np.flatnonzero(found)
    found[left] = _decays_once(rest[left], denominator, words)
    return found


def _decays_once(
    numerators: NDArray[np.uint64], denominator: int, words: Words
) -> NDArray[np.bool_]:
    """Return true with probability exp(-n/d), for each n from 0 to d.

    Draws of probability n/(d·k), for k = 1, 2, …, continue until one fails. By the series of the
    exponential, the k of the failed draw is odd with probability exp(-n/d).
    """
    found = np.empty(len(numerators), np.bool_)
    going, k = np.arange(len(numerators)), 1
    while len(going):
        hit = _below(denominator * k, len(going), words) < numerators[going]
        found[going[~hit]] = k % 2 == 1
        going, k = going[hit], k + 1
    return found


def _below(limit: int, count: int, words: Words) -> NDArray[np.uint64]:
    """Return uniform whole numbers from 0 to ``limit - 1``.

    Words in the last, incomplete multiple of ``limit`` are drawn again.
    """
    if limit == 1:
        return np.zeros(count, np.uint64)
    drawn = words(count)
    if rest := (1 << 64) % limit:
        most = np.uint64((1 << 64) - rest - 1)
        while len(bad := np.flatnonzero(drawn > most)):
            drawn = drawn.copy()
            drawn[bad] = words(len(bad))
    return drawn % np.uint64(limit)
