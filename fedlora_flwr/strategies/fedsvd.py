"""FedSVD: clients train B, the server refactorizes the product (arXiv 2505.12805)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedlora_flwr.algebra.factors import refactorize
from fedlora_flwr.algebra.means import Arrays
from fedlora_flwr.layout import Layout
from fedlora_flwr.plan import B, ComponentPlan
from fedlora_flwr.strategies.base import FedLoRA
from fedlora_flwr.strategies.replies import Upload


class FedSVD(FedLoRA):
    """Train B; after each round write the mean product as ``B = U Σ`` and ``A = Vᵀ``.

    The mean is exact, the product is not changed by its new factors, and A, which clients hold
    fixed, has orthonormal rows. They span what A spanned at the start. Source: arXiv 2505.12805.

    Examples
    --------
    >>> import numpy as np
    >>> from fedlora_flwr.strategies.replies import Upload
    >>> a, b = "fc.lora_A.weight", "fc.lora_B.weight"
    >>> start = {a: np.array([[3.0, 4.0]]), b: np.zeros((1, 1))}
    >>> uploads = [Upload(str(x), {b: np.array([[x]])}, 1.0, {}) for x in (1.0, 3.0)]
    >>> after = FedSVD().aggregate(1, start, uploads)
    >>> np.round(after[b] @ after[a], 6).tolist()  # The mean of B, 2, times A.
    [[6.0, 8.0]]
    """

    paper: ClassVar[tuple[str, ...]] = (
        "FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA",
        "2505.12805",
    )

    stable_basis: ClassVar[bool] = False
    needs_each_upload: ClassVar[bool] = False

    def plan(self, server_round: int, layout: Layout) -> ComponentPlan:
        """Train B in every round."""
        return ComponentPlan.uniform(B)

    def aggregate(
        self, server_round: int, current: Arrays, uploads: Sequence[Upload]
    ) -> dict[str, NDArray[np.floating]]:
        """Average B, then refactorize each layer's product at O((m + n) r²)."""
        arrays = super().aggregate(server_round, current, uploads)
        layout = Layout.of(arrays)
        for layer in layout.layers:
            b, a = layout.pair(layer)
            arrays[b], arrays[a] = refactorize(arrays[b], arrays[a])
        return arrays
