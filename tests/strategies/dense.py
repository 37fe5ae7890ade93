"""Federations whose global model is checked against dense matrices, over rounds and in fp64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import RecordDict
from flwr.serverapp.strategy import Result
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedlora_flwr.layout import Layout, factor_of, folded_names, is_folded
from fedlora_flwr.strategies import FedLoRA, Upload
from tests.strategies.tiny import Asked, Tiny, arrays_of, declined, record_of, reply_of

Array = NDArray[Any]
Named = Mapping[str, NDArray[Any]]
RANK = 3
SIZES = {"blocks.0.fc": (7, 6), "blocks.1.fc": (5, 9)}
LAYOUT = Layout.of([f"{layer}.lora_{factor}.weight" for layer in SIZES for factor in "AB"])


def start(rank: int = RANK, seed: int = 0, scale: float = 1.0) -> dict[str, Array]:
    """Return random global arrays; B is not zero, as if rounds had gone before."""
    rng, arrays = np.random.default_rng(seed), {}
    for layer, (m, n) in SIZES.items():
        b, a = LAYOUT.pair(layer)
        arrays[a], arrays[b] = rng.normal(size=(rank, n)), scale * rng.normal(size=(m, rank))
    return {**arrays, "head.bias": rng.normal(size=5)}


def product(arrays: Named, layer: str) -> Array:
    """Return what the arrays add to a layer's weight, folded pair included, as a matrix."""
    names = [LAYOUT.pair(layer), folded_names(layer)]
    terms = [
        arrays[b].astype(np.float64) @ arrays[a].astype(np.float64) for b, a in names if b in arrays
    ]
    return np.asarray(sum(terms), dtype=np.float64)


def folded_product(arrays: Named, layer: str) -> Array:
    b, a = folded_names(layer)
    if b not in arrays:
        return np.zeros(SIZES[layer])
    return np.asarray(arrays[b].astype(np.float64) @ arrays[a].astype(np.float64))


def best(matrix: Array, rank: int) -> Array:
    """Return the best approximation of a rank, by the full matrix's SVD."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return np.asarray((u[:, :rank] * s[:rank]) @ vt[:rank])


def cut(arrays: Named, rank: int) -> dict[str, Array]:
    return {
        name: {"A": array[:rank], "B": array[:, :rank]}.get(factor_of(name) or "", array)
        if factor_of(name)
        else array
        for name, array in arrays.items()
    }


class Federation:
    """A tiny federation that keeps what every client got and sent, round by round."""

    def __init__(
        self,
        strategy: FedLoRA,
        rounds: int,
        clients: int = 3,
        ranks: Sequence[int] = (RANK,),
        answer: Callable[[Asked], RecordDict | None] = lambda _: None,
        arrays: Named | None = None,
    ) -> None:
        self.got: dict[int, dict[int, Named]] = {}
        self.sent: dict[int, dict[int, Named]] = {}
        self._ranks, self._answer = ranks, answer
        self.tiny = Tiny(clients, self.reply)
        with self.tiny.grid() as grid:
            initial = record_of(start() if arrays is None else arrays)
            self.result: Result = strategy.start(grid, initial, num_rounds=rounds)

    def reply(self, asked: Asked) -> RecordDict:
        self.got.setdefault(asked.server_round, {})[asked.partition] = asked.arrays
        own = self._answer(asked)
        if own is not None:
            return own
        asked.arrays = cut(asked.arrays, self._ranks[asked.partition % len(self._ranks)])
        trained = asked.trained()
        self.sent.setdefault(asked.server_round, {})[asked.partition] = {**asked.arrays, **trained}
        weight = float(1 + 3 * asked.partition)
        return reply_of(trained, asked.partition, weight=weight)

    def after(self, server_round: int) -> Named:
        """Return the global arrays after a round, as somebody new would get them."""
        if server_round + 1 in self.got:
            return next(iter(self.got[server_round + 1].values()))
        return arrays_of(self.result.arrays)

    def mean(self, server_round: int, get: Callable[[Named], Array]) -> Array:
        """Return the weighted mean over a round's clients."""
        sent = self.sent[server_round]
        weights = np.array([1 + 3 * partition for partition in sent], dtype=np.float64)
        values = np.stack([get(arrays) for arrays in sent.values()]).astype(np.float64)
        return np.asarray(np.tensordot(weights / weights.sum(), values, axes=1))


def close(found: Array, expected: Array, tolerance: float = 2e-5) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def drops_out(asked: Asked) -> RecordDict | None:
    """Answer as usual but for client 1 in round 1, 0 in round 2, and 2, which declines, in 3."""
    if (asked.server_round, asked.partition) in ((1, 1), (2, 0)):
        raise RuntimeError("gone")
    return declined(2) if (asked.server_round, asked.partition) == (3, 2) else None


@st.composite
def federations(draw: st.DrawFn) -> tuple[dict[str, Array], list[Upload]]:
    """Draw global arrays with something folded in, and uploads of one rank with weights."""
    seed, clients = draw(st.integers(0, 2**32 - 1)), draw(st.integers(1, 4))
    rank, folds = draw(st.integers(1, 4)), draw(st.integers(0, 3))
    rng = np.random.default_rng(seed)
    current = start(rank, seed)
    for layer, (m, n) in SIZES.items():
        b, a = folded_names(layer)
        current[b], current[a] = rng.normal(size=(m, folds)), rng.normal(size=(folds, n))
    uploads = [
        Upload(
            f"client-{k}",
            {
                name: array + rng.normal(size=array.shape)
                for name, array in current.items()
                if not is_folded(name)
            },
            draw(st.floats(0.1, 10)),
            {},
        )
        for k in range(clients)
    ]
    return current, uploads


def mean_product(uploads: Sequence[Upload], layer: str) -> Array:
    shares = np.array([u.weight for u in uploads]) / sum(u.weight for u in uploads)
    return np.asarray(
        sum(share * product(u.arrays, layer) for share, u in zip(shares, uploads, strict=True))
    )
