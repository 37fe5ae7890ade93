"""The state of one round: made when its messages are, and gone when the next round begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from flwr.app import ArrayRecord
from numpy.typing import NDArray

from fedlora_flwr.algebra.products import NARROW, stacked_width
from fedlora_flwr.algebra.update_sums import UpdateSums
from fedlora_flwr.layout import Layout
from fedlora_flwr.plan import BOTH, ComponentPlan
from fedlora_flwr.strategies.expected import Expected
from fedlora_flwr.strategies.replies import Upload
from fedlora_flwr.strategies.secure_sum import Ask
from fedlora_flwr.wire.arrays import to_numpy, travel_size
from fedlora_flwr.wire.limits import Residues
from fedlora_flwr.wire.order import Order


@dataclass
class Round:
    """What a strategy has to remember in a round, from sending messages to averaging replies.

    Parameters
    ----------
    current : Mapping[str, ndarray]
        The global arrays that the clients start from.
    plan : ComponentPlan
        What trains.
    expected : Expected
        The arrays that an upload holds.
    plain : int
        Bytes of one message with both factors and the head, which the report compares with.
    order : Order
        What clients are asked for.
    asked : list[int]
        Nodes that were asked to train.
    measuring : list[int]
        Nodes that were asked to measure.
    ask : callable
        Under a secure sum, sends its messages to nodes of the round.
    streams : bool
        Whether uploads are added up as they come, and not kept.
    """

    current: Mapping[str, NDArray[np.floating]] = field(default_factory=dict)
    plan: ComponentPlan = field(default_factory=lambda: ComponentPlan.uniform(BOTH))
    expected: Expected = field(default_factory=lambda: Expected(ComponentPlan.uniform(BOTH), ()))
    plain: int = 0
    order: Order = field(default_factory=Order)
    asked: list[int] = field(default_factory=list)
    measuring: list[int] = field(default_factory=list)
    ask: Ask = field(default=lambda *_: {})
    streams: bool = False
    _sums: dict[frozenset[str], UpdateSums] = field(default_factory=dict)
    _shares: dict[frozenset[str], dict[str, Residues]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        arrays: ArrayRecord,
        layout: Layout,
        plan: ComponentPlan,
        shared: str,
        local_steps: int,
    ) -> Round:
        """Begin a round.

        Parameters
        ----------
        arrays : ArrayRecord
            The global arrays.
        layout : Layout
            Their names and blocks.
        plan : ComponentPlan
            What trains.
        shared : str
            The factors that are exchanged; empty for everything.
        local_steps : int
            K, or 0 where the strategy does not know it.

        Raises
        ------
        InvalidValue
            The plan does not fit the layout.
        """
        layout.check_plan(plan)
        return cls(
            current={name: to_numpy(array) for name, array in arrays.items()},
            plan=plan,
            expected=Expected.of(layout, plan, shared, local_steps),
            plain=sum(travel_size(arrays[name]) for name in layout.names),
        )

    @property
    def is_narrow(self) -> bool:
        """Whether uploads hold both factors, of which few are stacked: `mean_error` is exact."""
        return 0 < stacked_width(self.current, self.expected.whole, len(self.asked)) <= NARROW

    def take(self, upload: Upload) -> Upload:
        """Return what is kept of an accepted upload: all, or where the round streams, its numbers.

        Shares of a secure sum are added modulo 2³² in every round. Where the server does not know
        how many steps a round has, uploads may differ in their names. Each set of names has sums of
        its own.
        """
        names = upload.names
        if upload.shares:
            if names not in self._shares:
                self._shares[names] = {n: np.zeros_like(x) for n, x in upload.shares.items()}
            for name, share in upload.shares.items():
                self._shares[names][name] += share
            return replace(upload, shares={}, added=names)
        if not self.streams:
            return upload
        if names not in self._sums:
            self._sums[names] = UpdateSums(self.current, names, products=True)
        self._sums[names].add(upload.arrays)
        return replace(upload, arrays={}, added=names)

    def shares(self, uploads: list[Upload]) -> dict[str, Residues]:
        """Return the sum of the shares of these uploads modulo 2³², and forget all shares."""
        total = self._shares.pop(uploads[0].names)
        self._shares.clear()
        return total

    def gathered(self, uploads: list[Upload]) -> list[Upload]:
        """Return the uploads to aggregate, or where the round streams, their mean as one upload.

        Parameters
        ----------
        uploads : list[Upload]
            What `take` returned, of the uploads that count; all with the same names.
        """
        if not (self.streams and uploads):
            return uploads
        sums = self._sums.pop(uploads[0].names)
        self._sums.clear()
        return [Upload("mean", sums.mean(), 1.0, {}, sums=sums)]
