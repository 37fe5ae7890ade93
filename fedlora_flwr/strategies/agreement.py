"""How far a round's uploads agree, and what averaging their factors loses.

The server works this out from uploads that it has anyway, so it costs no privacy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedlora_flwr.algebra.means import Arrays
from fedlora_flwr.algebra.products import NARROW, mean_error, stacked_width
from fedlora_flwr.algebra.update_sums import UpdateSums
from fedlora_flwr.strategies.replies import Upload


def describe(
    current: Arrays, uploads: Sequence[Upload], *, personal: bool = False
) -> dict[str, Any]:
    """Describe a round's uploads, for the round's row.

    Parameters
    ----------
    current : Arrays
        The global arrays that the clients started from.
    uploads : Sequence[Upload]
        At least one, all with arrays of the same names; or the one mean of a `UpdateSums`.
    personal : bool (default: False)
        Whether a factor stays with each client, so that the server knows no client's product.

    Returns
    -------
    dict[str, Any]
        ``agreement``, ``signal`` and ``spread`` (see `Agreement`), each by part (A, B, head), and
        ``mean_error`` (see `fedlora_flwr.algebra.products.mean_error`), which is estimated where
        the stacked factors are wide. Empty if the clients' factors differ in rank.
    """
    shapes = {name: array.shape for name, array in uploads[0].arrays.items()}
    alike = all({n: a.shape for n, a in u.arrays.items()} == shapes for u in uploads)
    if not alike or any(current[name].shape != shape for name, shape in shapes.items()):
        return {}
    sums = uploads[0].sums
    exact = sums is None and stacked_width(current, shapes, len(uploads)) <= NARROW
    arrays, weights = [u.arrays for u in uploads], [u.weight for u in uploads]
    if sums is None:
        sums = UpdateSums.of(current, arrays, weights, products=not (exact or personal))
    found: dict[str, Any] = {}
    if not personal:
        lost = mean_error(current, arrays, weights) if exact else sums.mean_error()
        found["mean_error"] = lost
    if sums.count > 1:
        measured = {part: Agreement.of(sums, part) for part in sums.parts}
        for figure in ("agreement", "signal", "spread"):
            found[figure] = {part: getattr(entry, figure) for part, entry in measured.items()}
    return found


@dataclass(frozen=True)
class Agreement:
    """How far the updates Δ_k of N >= 2 clients agree, over some arrays taken as one vector.

    Parameters
    ----------
    agreement : float or None
        Mean cosine of all pairs of updates, from -1/(N - 1) to 1; ``None`` if one did not move.
    signal : float
        Norm of what the updates share. It is estimated from inner products of different clients'
        updates, because their noise is independent. 0 where the estimate is not positive.
    spread : float
        Norm of the rest of the mean: privacy noise, the noise of drawing batches, and what the
        clients do not share.
    """

    agreement: float | None
    signal: float
    spread: float

    @classmethod
    def of(cls, sums: UpdateSums, part: str) -> Agreement:
        """Measure it. For shares p_k, all pairs follow from ``|Σ p_k Δ_k|²`` and ``|Δ_k|²``."""
        mean, energy = sums.square(part)
        weight, squares = sums.weights
        own = squares / weight**2
        # E|mean|² = signal² + spread², and E Σ p_k² |Δ_k|² = own · signal² + spread².
        signal = (mean - energy) / (1 - own) if own < 1 else mean
        signal = min(max(signal, 0.0), mean)
        return cls(sums.cosine(part), math.sqrt(signal), math.sqrt(mean - signal))
