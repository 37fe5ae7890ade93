"""What a server keeps of uploads that it adds up as they come."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedlora_flwr.algebra.means import Arrays, normalize
from fedlora_flwr.algebra.products import ProbedProducts
from fedlora_flwr.algebra.running_sum import AnySum, Array64, PlainSum, RunningSum
from fedlora_flwr.layout import by_part

_UNIT = 2.0**36  # A direction is counted in whole parts of this size, whose sums are exact.


class UpdateSums:
    """Sums over updates, the differences between uploads and the arrays that clients started from.

    Nothing of an upload is kept but its share of the sums, so the memory does not depend on the
    number of uploads. The sums do not depend on the order of the uploads (see `RunningSum`).

    Parameters
    ----------
    current : Arrays
        The arrays that clients started from, and for ``products`` also the factors that no client
        uploads.
    names : Iterable[str]
        The arrays that an upload holds.
    products : bool (default: False)
        Whether to probe the products of the factors, too (see `mean_error`).
    kind : type (default: `RunningSum`)
        What adds up; `PlainSum` is faster where uploads come in the same order every time.

    Attributes
    ----------
    count : int
        Uploads so far.

    Examples
    --------
    >>> sums = UpdateSums({"head": np.ones(2)}, ["head"])
    >>> sums.add({"head": np.array([2.0, 1.0])})
    >>> sums.add({"head": np.array([4.0, 1.0])})
    >>> sums.mean()["head"].tolist()
    [3.0, 1.0]
    """

    def __init__(
        self,
        current: Arrays,
        names: Iterable[str],
        *,
        products: bool = False,
        kind: type[AnySum] = RunningSum,
    ) -> None:
        # A set has another order in each process, and a sum over arrays other last bits then.
        ordered = sorted(names)
        parts, self._places, end = by_part(ordered), dict[str, slice](), 0
        self._current = {name: current[name] for own in parts.values() for name in own}
        for name, array in self._current.items():
            self._places[name] = slice(end, end := end + array.size)
        self._parts = {
            part: slice(self._places[own[0]].start, self._places[own[-1]].stop)
            for part, own in parts.items()
        }
        self._updates, self._directions = kind(end), np.zeros(end)
        self._energies, self._fourths = kind(len(self._places)), kind(len(self._places))
        self._weights = kind(2)
        self._still: set[str] = set()
        self._products = ProbedProducts(current, ordered, kind) if products else None
        # The first upload is kept for as long as all others are the same.
        self._first: Arrays | None = None
        self.count = 0

    @classmethod
    def of(
        cls,
        current: Arrays,
        uploads: Sequence[Arrays],
        weights: Sequence[float],
        *,
        products: bool = False,
    ) -> UpdateSums:
        """Add up uploads that were kept; at least one, all with the same names."""
        sums = cls(current, uploads[0], products=products, kind=PlainSum)
        # Weights are normalized, since squares of tiny ones would be zero.
        for upload, share in zip(uploads, normalize(weights).tolist(), strict=True):
            sums.add(upload, share)
        return sums

    def add(self, arrays: Arrays, weight: float = 1.0) -> None:
        """Take in an upload.

        Parameters
        ----------
        arrays : Arrays
            Finite numbers in the shapes of the current arrays.
        weight : float (default: 1)
            Its weight, above 0. Any scale will do as long as its square does not become 0 or
            infinite.
        """
        update = np.empty(len(self._directions))
        for name, place in self._places.items():
            new, old = arrays[name].ravel(), self._current[name].ravel()
            np.subtract(new, old, out=update[place], dtype=np.float64)
        squares = np.array([np.vdot(update[p], update[p]) for p in self._places.values()])
        energies = weight * weight * squares
        self._updates.add(update, weight)
        self._energies.add(energies)
        self._fourths.add(energies * energies)
        self._weights.add(np.array([weight, weight * weight]))
        if self._products is not None:
            self._products.add(self._split(update), weight)
        self._point(update)
        self._compare(arrays)
        self.count += 1

    def _point(self, update: Array64) -> None:
        """Add the direction of each part of an update; this uses up the update."""
        for part, place in self._parts.items():
            own = update[place]
            norm = math.sqrt(float(np.vdot(own, own)))
            if not norm:
                self._still.add(part)
                continue
            own *= _UNIT / norm
            self._directions[place] += np.rint(own, out=own)

    def _compare(self, arrays: Arrays) -> None:
        if not self.count:
            self._first = arrays
            self._types = {name: arrays[name].dtype for name in self._places}
        elif self._first is not None:
            first = self._first
            if not all(np.array_equal(arrays[name], first[name]) for name in self._places):
                self._first = None

    def _split(self, vector: Array64) -> dict[str, Array64]:
        return {n: vector[p].reshape(self._current[n].shape) for n, p in self._places.items()}

    @property
    def parts(self) -> list[str]:
        """The parts (A, B, head) of which there are arrays."""
        return list(self._parts)

    @property
    def same(self) -> bool:
        """Whether all uploads are the same to the last bit."""
        return self._first is not None

    @property
    def weights(self) -> tuple[float, float]:
        """The sum of the weights and the sum of their squares."""
        total, squares = self._weights.total.tolist()
        return total, squares

    def updates(self) -> dict[str, Array64]:
        """Return the weighted mean of the updates, by array."""
        return self._split(self._updates.total / self.weights[0])

    def mean(self) -> dict[str, NDArray[np.floating]]:
        """Return the weighted mean of the uploads, in their own types."""
        return {
            name: (self._current[name] + update).astype(self._types[name])
            for name, update in self.updates().items()
        }

    def energies(self) -> Mapping[str, tuple[float, float]]:
        """Return by array ``Σ e_k`` and ``Σ e_k²``, with ``e_k = w_k² |Δ_k|²`` for shares w_k."""
        scale = self.weights[0] ** 2
        first, second = self._energies.total / scale, self._fourths.total / scale**2
        return dict(
            zip(self._places, zip(first.tolist(), second.tolist(), strict=True), strict=True)
        )

    def square(self, part: str) -> tuple[float, float]:
        """Return ``|Σ w_k Δ_k|²`` and ``Σ w_k² |Δ_k|²`` of a part, for shares w_k."""
        mean = self._updates.total[self._parts[part]] / self.weights[0]
        energies, place = self.energies(), self._parts[part]
        own = [n for n, p in self._places.items() if place.start <= p.start < place.stop]
        return float(np.vdot(mean, mean)), math.fsum(energies[name][0] for name in own)

    def cosine(self, part: str) -> float | None:
        """Return the mean cosine of all pairs of updates; None if one of them did not move."""
        if part in self._still:
            return None
        # It follows from the norm of the sum of the unit vectors.
        total = self._directions[self._parts[part]] / _UNIT
        return (float(np.vdot(total, total)) - self.count) / (self.count * (self.count - 1))

    def mean_error(self) -> float | None:
        """Estimate what averaging factors loses (see `ProbedProducts.error`)."""
        assert self._products is not None
        return self._products.error(self.updates(), self.weights[0])
