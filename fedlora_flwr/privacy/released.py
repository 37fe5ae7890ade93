"""The type that holds everything that a client sends after a round."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedlora_flwr.privacy.ledger import LedgerSummary
from fedlora_flwr.wire import STATUS_OK
from fedlora_flwr.wire.limits import Residues
from fedlora_flwr.wire.report import Report


@dataclass(frozen=True)
class Released:
    """Everything a client sends after a round. Nothing else leaves it.

    Parameters
    ----------
    arrays : Mapping[str, ndarray]
        fp32 arrays that only private steps and their post-processing produced.
    ledger : LedgerSummary
        The client's own account.
    seconds : float
        Wall-clock time of the round on the client.
    peak_memory_mb : float
        Largest resident memory of the client's process so far, MiB.
    weight : float
        Aggregation weight: 1, or the public quantity that ``weighting`` names.
    status : str
        ``"ok"``, or ``"budget-exhausted"`` for a release without arrays.
    num_examples : int
        Number of records where that is the weight, otherwise 1; 0 where the client did not train.
    unprotected : Mapping[str, float]
        Metrics on private records *without* protection; empty unless the run asks for them.
    shares : Mapping[str, ndarray]
        uint32 arrays that replace ``arrays`` under a secure sum. Each client adds a share of the
        noise, and only the sum over all clients is private.

    Guarantees
    ----------
    *What holds.* `report` is all that travels, and each of its fields has a row in the table of who
    decides (docs/privacy.md).
    *Under which assumptions.* ``arrays`` come from `LocalTrainer.train`: private steps alone made
    their values.
    *What does not hold.* ``unprotected`` is outside the promise, and ``seconds`` and
    ``peak_memory_mb`` are side channels.
    """

    arrays: Mapping[str, NDArray[np.float32]]
    ledger: LedgerSummary
    seconds: float
    peak_memory_mb: float
    weight: float = 1.0
    status: str = STATUS_OK
    num_examples: int = 1
    unprotected: Mapping[str, float] = field(default_factory=dict)
    shares: Mapping[str, Residues] = field(default_factory=dict)

    def report(self) -> Report:
        """Return the report that is sent, checked against the limits of the contract.

        Raises
        ------
        InvalidValue
            A value is past its limits, e.g. an array that is not finite.
        """
        return Report(
            status=self.status,
            arrays=self.arrays,
            shares=self.shares,
            epsilon=float(self.ledger.epsilon),
            epsilon_budget=float(self.ledger.epsilon_budget),
            delta=float(self.ledger.delta),
            accountant=self.ledger.accountant,
            steps=int(self.ledger.steps),
            seconds=float(self.seconds),
            peak_memory_mb=float(self.peak_memory_mb),
            weight=float(self.weight),
            num_examples=self.num_examples,
            # A loss that is not finite tells nothing. It is left out, so that the round succeeds.
            unprotected={n: float(v) for n, v in self.unprotected.items() if math.isfinite(v)},
        ).checked()
