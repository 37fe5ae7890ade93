"""FedEx-LoRA: the residual of averaging goes into the frozen weights (arXiv 2410.09432)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedlora_flwr.algebra.factors import residual
from fedlora_flwr.algebra.means import Arrays
from fedlora_flwr.layout import Layout
from fedlora_flwr.strategies.base import FedLoRA
from fedlora_flwr.strategies.folding import fold
from fedlora_flwr.strategies.replies import Upload


class FedExLoRA(FedLoRA):
    """Train A and B, average each, and fold ``mean(B A) - mean(B) mean(A)`` into W0.

    So the model is the exact mean of the clients' models. The residual travels as factors, summed
    over the rounds since a client may be new: the download grows by rank (N - 1) r a round, up to
    min(m, n). Source: arXiv 2410.09432.

    Examples
    --------
    >>> import numpy as np
    >>> from fedlora_flwr.strategies.replies import Upload
    >>> a, b = "fc.lora_A.weight", "fc.lora_B.weight"
    >>> start = {a: np.array([[3.0, 4.0]]), b: np.zeros((1, 1))}
    >>> uploads = [
    ...     Upload(str(x), {a: np.array([[x, 0.0]]), b: np.array([[x]])}, 1.0, {})
    ...     for x in (1.0, 3.0)
    ... ]
    >>> after = FedExLoRA().aggregate(1, start, uploads)
    >>> (after[b] @ after[a]).tolist()  # The product of the means.
    [[4.0, 0.0]]
    >>> folded = after["fc.folded_B.weight"] @ after["fc.folded_A.weight"]
    >>> np.round(folded, 6).tolist()  # What it misses of the mean of the products.
    [[1.0, 0.0]]
    """

    paper: ClassVar[tuple[str, ...]] = (
        "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation "
        "Models",
        "2410.09432",
    )

    folds: ClassVar[bool] = True
    needs_each_upload: ClassVar[bool] = True

    def aggregate(
        self, server_round: int, current: Arrays, uploads: Sequence[Upload]
    ) -> dict[str, NDArray[np.floating]]:
        """Average both factors and fold in what their product misses."""
        layout, weights = Layout.of(current), [upload.weight for upload in uploads]
        updates = {}
        for layer in layout.layers:
            b, a = layout.pair(layer)
            updates[layer] = residual([(u.arrays[b], u.arrays[a]) for u in uploads], weights)
        mean = super().aggregate(server_round, current, uploads)
        return {**mean, **fold(current, updates)}
