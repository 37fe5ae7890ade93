"""FLoRA: stacked updates are merged into the frozen weights (arXiv 2409.05976)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedlora_flwr.algebra.factors import combine
from fedlora_flwr.algebra.means import Arrays
from fedlora_flwr.layout import Layout
from fedlora_flwr.strategies.base import FedLoRA
from fedlora_flwr.strategies.folding import fold, fresh_a
from fedlora_flwr.strategies.heads import average_heads
from fedlora_flwr.strategies.replies import Upload


class FLoRA(FedLoRA):
    """Train A and B, fold the stack of all updates into W0, and start again from B = 0.

    Stacking ``[B_1 … B_N][p_1 A_1; …; p_N A_N]`` is the exact mean of the products. The stacks
    travel as factors, summed over the rounds since a client may be new: the download grows by rank
    N r a round, up to min(m, n). Source: arXiv 2409.05976.

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
    >>> after = FLoRA().aggregate(1, start, uploads)
    >>> after[b].tolist()
    [[0.0]]
    >>> folded = after["fc.folded_B.weight"] @ after["fc.folded_A.weight"]
    >>> np.round(folded, 6).tolist()  # The mean of the products 1 and 9.
    [[5.0, 0.0]]
    """

    paper: ClassVar[tuple[str, ...]] = (
        "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank "
        "Adaptations",
        "2409.05976",
    )

    folds: ClassVar[bool] = True
    needs_each_upload: ClassVar[bool] = True

    def aggregate(
        self, server_round: int, current: Arrays, uploads: Sequence[Upload]
    ) -> dict[str, NDArray[np.floating]]:
        """Fold the stacks in; average the head; draw a fresh A as PEFT does, and B = 0."""
        layout, weights = Layout.of(current), [upload.weight for upload in uploads]
        arrays = average_heads(current, uploads)
        updates = {}
        for layer in layout.layers:
            b, a = layout.pair(layer)
            updates[layer] = combine([(u.arrays[b], u.arrays[a]) for u in uploads], weights)
            arrays[a] = fresh_a(current[a], self.seed, "flora", server_round, a)
            arrays[b] = np.zeros_like(current[b])
        return {**arrays, **fold(current, updates)}
