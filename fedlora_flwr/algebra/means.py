"""Means of named arrays, in pure NumPy: how a server combines what its clients send."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora_flwr.errors import InvalidValue

Arrays = Mapping[str, NDArray[np.floating]]


def normalize(weights: Sequence[float]) -> NDArray[np.float64]:
    """Scale non-negative weights to sum to one.

    Raises
    ------
    InvalidValue
        No weight, a negative or non-finite one, or a sum of zero.
    """
    values = np.asarray(weights, dtype=np.float64)
    if values.size == 0 or not np.isfinite(values).all() or (values < 0).any() or not values.any():
        raise InvalidValue("weights", list(weights), "finite numbers >= 0, one of them above 0")
    values = values / values.max()  # Without this, the sum of very large weights is infinite.
    return np.asarray(values / values.sum(), dtype=np.float64)


def weighted_mean(
    uploads: Sequence[Arrays], weights: Sequence[float]
) -> dict[str, NDArray[np.floating]]:
    """Average each array over the clients.

    Sums run in fp64 in the order given, so a fixed order gives a bit-identical result; the mean is
    returned in the arrays' own type.

    Parameters
    ----------
    uploads : Sequence[Arrays]
        One mapping per client, all with the same names and shapes.
    weights : Sequence[float]
        One weight per client; they are scaled to sum to one.

    Returns
    -------
    dict[str, ndarray]
        The names of the first upload with the mean of each array.

    Raises
    ------
    InvalidValue
        Names or shapes differ between clients, or the weights cannot be normalized.
    """
    shares = normalize(weights)
    if len(shares) != len(uploads):
        raise InvalidValue("weights", list(weights), f"one for each of {len(uploads)} uploads")
    first = uploads[0]
    expected = {name: array.shape for name, array in first.items()}
    for upload in uploads[1:]:
        found = {name: array.shape for name, array in upload.items()}
        if found != expected:
            raise InvalidValue("shapes of an upload", found, f"those of the first, {expected}")
    means: dict[str, NDArray[np.floating]] = {}
    equal = bool((shares == shares[0]).all())
    for name, array in first.items():
        total, term = np.zeros(array.shape), np.empty(array.shape)
        for share, upload in zip(shares, uploads, strict=True):
            term[...] = upload[name]  # To convert while it multiplies takes NumPy longer.
            if not equal:
                term *= share
            total += term
        means[name] = (total / len(uploads) if equal else total).astype(array.dtype)
    return means


def merge(current: Arrays, update: Arrays) -> dict[str, NDArray[np.floating]]:
    """Replace the arrays of ``current`` that ``update`` holds and keep the others untouched.

    Raises
    ------
    InvalidValue
        ``update`` has a name that ``current`` lacks, or an array of another shape.
    """
    for name, array in update.items():
        if name not in current:
            raise InvalidValue("array", name, f"one of the global arrays {sorted(current)}")
        if array.shape != current[name].shape:
            raise InvalidValue(f"shape of {name}", array.shape, f"{current[name].shape}")
    return {name: update.get(name, array) for name, array in current.items()}


def bounded(arrays: Arrays, most: float) -> dict[str, NDArray[np.floating]]:
    """Cut entries to a range. An array within it is returned unchanged, as the same object.

    Parameters
    ----------
    arrays : Arrays
        Finite numbers.
    most : float
        Largest magnitude.
    """
    return {
        name: np.clip(array, -most, most)
        if array.size and max(array.max(), -array.min()) > most
        else array
        for name, array in arrays.items()
    }


class MovingAverage:
    """An exponential moving average of a model's arrays over the rounds.

    Round t has the weight ``1 - min(decay, t / (t + 9))``, so the average soon forgets the first
    rounds, in which a model moves fastest. An average of released arrays is post-processing: it
    costs no privacy, and it dampens the noise of single rounds. De et al. (arXiv 2204.13650)
    recommend it for private training.

    Parameters
    ----------
    decay : float
        Weight of the past, from 0 (the average is the last model) to below 1.
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._rounds = 0
        self._mean: dict[str, NDArray[np.float64]] = {}

    def add(self, arrays: Arrays) -> dict[str, NDArray[np.floating]]:
        """Add a round to the average. The first call adds the start (round 0).

        Parameters
        ----------
        arrays : Arrays
            All global arrays. With a decay above 0, every call has the same names and shapes.

        Returns
        -------
        dict[str, ndarray]
            The average so far, in the arrays' own types.
        """
        if not self._decay:
            return dict(arrays)
        past = min(self._decay, self._rounds / (self._rounds + 9))
        self._rounds += 1
        for name, array in arrays.items():
            before = self._mean.get(name, array)
            self._mean[name] = past * before + (1 - past) * array.astype(np.float64)
        return self.model(arrays)

    def model(self, arrays: Arrays) -> dict[str, NDArray[np.floating]]:
        """Return the average so far in the types of ``arrays``, without adding a round."""
        if not self._decay:
            return dict(arrays)
        return {name: self._mean[name].astype(array.dtype) for name, array in arrays.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the state between rounds: arrays and plain values."""
        return {"rounds": self._rounds, "mean": dict(self._mean)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._rounds, self._mean = state["rounds"], dict(state["mean"])
