"""FFA-LoRA with several seeds: A comes from K public seeds in turn, and B trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedlora_flwr.algebra.means import Arrays
from fedlora_flwr.config.keys import between
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.layout import Layout, folded_names
from fedlora_flwr.strategies.declared import setting
from fedlora_flwr.strategies.ffa_lora import FFALoRA
from fedlora_flwr.strategies.folding import fresh_a
from fedlora_flwr.strategies.replies import Upload


@dataclass(frozen=True)
class SeedsSettings:
    """The number of seeds."""

    seeds: int = setting(
        2, between(1, 64), "number K of seeds of A, which take turns by round; 1 = FFA-LoRA"
    )


class FFASeeds(FFALoRA):
    """Train B under one of K frozen A, in turn by round, and keep all K pairs in the model.

    The model is ``W0 + s Σ B_j A_j``. In each round one pair is the adapter, and its B trains. The
    other pairs are folded into W0 as they are, so they travel down with every model, and the
    exported adapter is their concatenation of rank K r. The mean is exact as in FFA-LoRA, because
    all clients hold the same A. A new seed begins with B = 0, so it does not change the model. The
    first A is the run's own start, and the others are drawn as PEFT draws it.

    FedKRSO (arXiv 2602.03019) trains all weights in K random subspaces in a similar way. There a
    client changes the subspace within a round; here all clients share one for a whole round.

    Parameters
    ----------
    seeds : int (default: 2)
        Number K of seeds.
    **kwargs
        Those of `FedLoRA`.

    Examples
    --------
    >>> import numpy as np
    >>> from fedlora_flwr.strategies.replies import Upload
    >>> a, b = "fc.lora_A.weight", "fc.lora_B.weight"
    >>> start = {a: np.array([[3.0, 4.0]]), b: np.zeros((2, 1))}
    >>> after = FFASeeds().aggregate(1, start, [Upload("x", {b: np.ones((2, 1))}, 1.0, {})])
    >>> after[b].tolist()  # The second seed, which has not trained yet.
    [[0.0], [0.0]]
    >>> (after["fc.folded_B.weight"] @ after["fc.folded_A.weight"]).tolist()  # The first one.
    [[3.0, 4.0], [3.0, 4.0]]
    """

    name: ClassVar[str] = "ffa-seeds"
    settings: ClassVar[type] = SeedsSettings
    seeds: int

    folds: ClassVar[bool] = True
    stable_basis: ClassVar[bool] = False
    needs_each_upload: ClassVar[bool] = False

    def begin(self) -> None:
        """Begin with the first seed."""
        super().begin()
        self._drawn = 1

    def state_dict(self) -> dict[str, Any]:
        """Add the number of seeds that have been drawn."""
        return {**super().state_dict(), "drawn": self._drawn}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Also restore the number of seeds that have been drawn."""
        super().load_state_dict(state)
        self._drawn = int(state["drawn"])

    def check_model(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse more seeds than a layer's weight can hold in ranks.

        Raises
        ------
        InvalidValue
            The ranks that are folded into a layer, ``(K - 1) r`` and those of the run's start,
            exceed the shorter side of its weight.
        """
        layout = Layout.of(shapes)
        for layer in layout.layers:
            b, a = layout.pair(layer)
            rank, sides = shapes[a][0], (shapes[b][0], shapes[a][1])
            room = min(sides) - shapes.get(folded_names(layer)[1], (0,))[0]
            if (self.seeds - 1) * rank > room:
                allowed = (
                    f"at most {room // rank + 1} at rank {rank}, as {layer} has a weight of shape "
                    f"{sides}. Set fewer seeds or a lower rank"
                )
                raise InvalidValue(f"{self.name}.seeds", self.seeds, allowed)

    def aggregate(
        self, server_round: int, current: Arrays, uploads: Sequence[Upload]
    ) -> dict[str, NDArray[np.floating]]:
        """Average B, put its pair behind the others, and take the next pair."""
        arrays = super().aggregate(server_round, current, uploads)
        if self.seeds == 1:
            return arrays
        layout = Layout.of(arrays)
        for layer in layout.layers:
            arrays.update(self._next(arrays, layer, layout.pair(layer)))
        self._drawn = min(self._drawn + 1, self.seeds)
        return arrays

    def _next(
        self, arrays: Arrays, layer: str, pair: tuple[str, str]
    ) -> dict[str, NDArray[np.floating]]:
        """Return a layer's next pair, and the folded pair that then holds all others."""
        (b, a), (rest_b, rest_a) = pair, folded_names(layer)
        rank, left, right = len(arrays[a]), arrays[b], arrays[a]
        if rest_b in arrays:
            left = np.concatenate([arrays[rest_b], left], axis=1)
            right = np.concatenate([arrays[rest_a], right], axis=0)
        if self._drawn < self.seeds:
            drawn = fresh_a(arrays[a], self.seed, self.name, self._drawn + 1, a)
            return {b: np.zeros_like(arrays[b]), a: drawn, rest_b: left, rest_a: right}
        # What the run's start has folded in is in front, and stays there.
        first = len(right) - self.seeds * rank
        turn = slice(first, first + rank)
        return {
            b: left[:, turn].copy(),
            a: right[turn].copy(),
            rest_b: np.delete(left, turn, axis=1),
            rest_a: np.delete(right, turn, axis=0),
        }
