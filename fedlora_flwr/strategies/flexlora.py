"""FlexLoRA: clients of different ranks; the mean product is cut to each (arXiv 2402.11505)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray

from fedlora_flwr.algebra.factors import truncated_mean
from fedlora_flwr.algebra.means import Arrays, merge
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.layout import Layout, factor_of, leading_ranks, rank_axis
from fedlora_flwr.strategies.base import FedLoRA
from fedlora_flwr.strategies.heads import average_heads
from fedlora_flwr.strategies.replies import Upload
from fedlora_flwr.wire.arrays import from_numpy, record_of, to_numpy


class FlexLoRA(FedLoRA):
    """Train A and B at each client's own rank; average the products; cut by SVD.

    The global factors have the largest rank and are an SVD, ``B = U Σ`` and ``A = Vᵀ``, so the best
    approximation of a lower rank is their leading columns and rows. A client gets all of them until
    its first upload has told its rank, and only its own from then on. One LoRA scaling, that of the
    global rank, holds for all clients. Source: arXiv 2402.11505.

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
    >>> after = FlexLoRA().aggregate(1, start, uploads)
    >>> np.round(after[b] @ after[a], 6).tolist()  # The mean of the products 1 and 9.
    [[5.0, 0.0]]
    """

    paper: ClassVar[tuple[str, ...]] = (
        "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client "
        "Resources",
        "2402.11505",
    )

    stable_basis: ClassVar[bool] = False
    needs_each_upload: ClassVar[bool] = True
    own_ranks: ClassVar[bool] = True

    def begin(self) -> None:
        """Forget the clients' ranks."""
        super().begin()
        self._ranks: dict[str, int] = {}

    def state_dict(self) -> dict[str, Any]:
        """Add the clients' ranks."""
        return {**super().state_dict(), "ranks": dict(self._ranks)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Also restore the clients' ranks."""
        super().load_state_dict(state)
        self._ranks = dict(state["ranks"])

    def download(self, arrays: ArrayRecord, client: str) -> ArrayRecord:
        """Cut the factors to the client's rank, once it is known."""
        rank = self._ranks.get(client)
        if rank is None:
            return arrays
        return record_of({name: _cut(name, array, rank) for name, array in arrays.items()})

    def check_shapes(self, current: Arrays, arrays: Arrays) -> None:
        """Let an upload have any rank up to the global one, the same in all layers."""
        ranks = {array.shape[rank_axis(n)] for n, array in arrays.items() if factor_of(n)}
        most = min(array.shape[rank_axis(n)] for n, array in current.items() if factor_of(n))
        if len(ranks) != 1 or not 1 <= min(ranks) <= most:
            raise InvalidValue("ranks of an upload", sorted(ranks), f"one rank of 1 to {most}")
        (rank,) = ranks
        merge({name: leading_ranks(name, array, rank) for name, array in current.items()}, arrays)

    def aggregate(
        self, server_round: int, current: Arrays, uploads: Sequence[Upload]
    ) -> dict[str, NDArray[np.floating]]:
        """Average the products, as stacks of factors, and take their SVD."""
        layout, weights = Layout.of(current), [upload.weight for upload in uploads]
        arrays = average_heads(current, uploads)
        for layer in layout.layers:
            b, a = layout.pair(layer)
            pairs = [(u.arrays[b], u.arrays[a]) for u in uploads]
            arrays[b], arrays[a] = truncated_mean(pairs, weights, rank=current[a].shape[0])
        for upload in uploads:
            name = layout.pair(layout.layers[0])[1]
            self._ranks[upload.client] = upload.arrays[name].shape[0]
        return arrays


def _cut(name: str, array: Array, rank: int) -> Array:
    return from_numpy(np.ascontiguousarray(leading_ranks(name, to_numpy(array), rank)))
