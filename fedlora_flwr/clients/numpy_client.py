"""The Flower client: obeys any plan, keeps the ledger, and releases nothing but `Released`."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
from flwr.client import NumPyClient
from numpy.typing import NDArray

from fedlora_flwr.clients.local_store import LocalStore
from fedlora_flwr.clients.trainer import LocalUpdate, Trainer, plan_mechanism
from fedlora_flwr.environment import peak_memory
from fedlora_flwr.errors import BudgetExhausted, FedLoRAError, InvalidValue
from fedlora_flwr.plan import BOTH, A, B, ComponentPlan, factor_of
from fedlora_flwr.privacy.budget import Segment
from fedlora_flwr.privacy.ledger import Account, Ledger
from fedlora_flwr.privacy.mechanism import Mechanism
from fedlora_flwr.privacy.released import Released
from fedlora_flwr.tasks.registry import Records
from fedlora_flwr.wire import (
    CURVATURE,
    FINGERPRINT,
    NAMES,
    PLAN,
    ROUND,
    SHARE,
    STATUS_EXHAUSTED,
    WEIGHTING,
)

Scalars = dict[str, bool | bytes | float | int | str]
Reply = tuple[list[NDArray[np.float32]], int, Scalars]


@dataclass(frozen=True)
class Order:
    """What the server asks for in one round, as read from a fit configuration.

    Parameters
    ----------
    server_round : int
        Round, from 1; 0 where the server does not say.
    plan : ComponentPlan or None
        What trains; ``None`` from a server that sends no plan: then both factors train and all
        arrays are returned, which is what plain averaging expects.
    names : tuple[str, ...]
        Names of the arrays, in the order in which they came.
    weighting : str
        Which aggregation weight to report.
    fingerprint : str
        Hash of the server's backbone; empty where it does not say.
    share : str
        The factor that is exchanged; all else that trains stays here. Empty: nothing stays.
    curvature : str
        Which scores to send (see `BlockScores`); empty: none.
    """

    server_round: int
    plan: ComponentPlan | None
    names: tuple[str, ...]
    weighting: str
    fingerprint: str
    share: str
    curvature: str

    def __post_init__(self) -> None:
        if self.share not in ("", A, B):
            raise InvalidValue(SHARE, self.share, "'A', 'B' or empty")

    @classmethod
    def read(cls, config: Scalars, own_names: tuple[str, ...]) -> Order:
        """Read the configuration of a fit message."""
        plan = str(config.get(PLAN, ""))
        names = str(config.get(NAMES, ""))
        return cls(
            server_round=int(config.get(ROUND, 0)),
            plan=ComponentPlan.parse(plan) if plan else None,
            names=tuple(names.split(",")) if names else own_names,
            weighting=str(config.get(WEIGHTING, "uniform")),
            fingerprint=str(config.get(FINGERPRINT, "")),
            share=str(config.get(SHARE, "")),
            curvature=str(config.get(CURVATURE, "")),
        )

    def leaves(self, name: str) -> bool:
        """Tell whether an array is exchanged."""
        return not self.share or factor_of(name) == self.share


class LoRAClient(NumPyClient):
    """A client that trains the planned LoRA factors on its own records, privately.

    Parameters
    ----------
    trainer : Trainer
        The process's model and engine.
    records : Records
        The client's private records.
    ledger : Ledger
        Where releases are written before they leave.
    client : str
        Stable identity of these records.
    run : str
        Identity of the run, which a budget of scope ``"run"`` covers.
    store : LocalStore, optional
        Keeps what a strategy such as FedSA-LoRA leaves with the client.
    rank : int, optional
        This client's LoRA rank, where clients have their own; the server's arrays are cut to it.
    """

    def __init__(
        self,
        trainer: Trainer,
        records: Records,
        ledger: Ledger,
        client: str,
        run: str,
        *,
        store: LocalStore | None = None,
        rank: int | None = None,
    ) -> None:
        self._trainer = trainer
        self._records = records
        self._ledger = ledger
        if rank is not None and rank < 1:
            raise InvalidValue("rank", rank, "a whole number of at least 1")
        self._store = store
        self._rank = rank
        config = trainer.config
        self._account = Account(client, run, config.epsilon, config.delta, config.ledger_scope)

    @property
    def identity(self) -> str:
        """Stable identity of the client's records."""
        return self._account.client

    def get_parameters(self, config: Scalars) -> list[NDArray[np.float32]]:
        """Return the adapters' start, which follows from the seed and not from any record."""
        del config
        return list(self._trainer.start.values())

    def fit(self, parameters: list[NDArray[np.float32]], config: Scalars) -> Reply:
        """Train one round and release the result.

        Raises
        ------
        InvalidValue
            Arrays, plan or backbone do not fit this client's model.
        BudgetExhausted
            The budget is spent, and the server speaks no plan: it would not understand the answer
            "budget-exhausted" that our strategies get.
        """
        started = time.perf_counter()
        order = Order.read(config, self._trainer.layout.names)
        arrays = self._complete(order, parameters)
        settings = self._trainer.config
        # Refused before a row is written: what the server sent depends on no record.
        plan = order.plan or ComponentPlan.uniform(BOTH)
        plan.check(len(self._trainer.layout.blocks))
        self._trainer.load(arrays)
        mechanism = plan_mechanism(
            settings,
            len(self._records),
            run_epsilon=self._account.run_epsilon,
            terms=self._ledger.terms(self._account),
        )
        planned = Segment(mechanism.noise_multiplier, mechanism.sample_rate, settings.planned_steps)
        segment = replace(planned, steps=settings.local_steps)
        try:
            # Written before the first private batch, so that a failure after it counts.
            summary = self._ledger.record(self._account, order.server_round, segment, planned)
        except BudgetExhausted:
            if order.plan is None:
                raise
            summary = self._ledger.summary(self._account)
            return self._reply(
                Released(
                    {},
                    summary,
                    time.perf_counter() - started,
                    peak_memory() / 2**20,
                    status=STATUS_EXHAUSTED,
                ),
                num_examples=0,
            )
        update = self._train(order, arrays, mechanism, summary.steps - segment.steps)
        if order.share:
            kept = {name: a for name, a in update.arrays.items() if not order.leaves(name)}
            self._local.keep(self._account.client, self._account.run, kept)
        released = Released(
            arrays={name: a for name, a in update.arrays.items() if order.leaves(name)},
            ledger=summary,
            seconds=time.perf_counter() - started,
            peak_memory_mb=peak_memory() / 2**20,
            weight=_weight(order.weighting, mechanism),
            scores=update.scores,
            unprotected=self._unprotected(),
        )
        # The number of records goes out only where it is the weight.
        return self._reply(released, len(self._records) if order.weighting == "size" else 1)

    def evaluate(
        self, parameters: list[NDArray[np.float32]], config: Scalars
    ) -> tuple[float, int, Scalars]:
        """Evaluate the model with what this client keeps of its own.

        Under a strategy that shares one factor, on the public test set: what the client keeps went
        through private steps, so the figures are post-processing. Else on its private records,
        where the run allows such figures.

        Raises
        ------
        FedLoRAError
            The run does not report unprotected metrics.
        """
        order = Order.read(config, self._trainer.layout.names)
        if not order.share and not self._trainer.config.report_unprotected_metrics:
            raise FedLoRAError(
                "A loss on private records is not protected. Evaluate on the server's public test "
                "set (fraction_evaluate = 0), or set report-unprotected-metrics = true."
            )
        self._trainer.load(self._complete(order, parameters))
        task = self._trainer.task
        records = task.test_records() if order.share else self._records
        metrics = task.evaluate(self._trainer.adapted.model, records)
        return metrics["loss"], 1, dict(metrics)

    def _train(
        self,
        order: Order,
        arrays: dict[str, NDArray[np.float32]],
        mechanism: Mechanism,
        steps: int,
    ) -> LocalUpdate:
        # A server that names no round must not make a seeded client repeat its noise.
        round_name = order.server_round or f"after-{steps}-steps"
        update = self._trainer.train(
            arrays,
            order.plan or ComponentPlan.uniform(BOTH),
            self._records,
            mechanism,
            (self._account.client, round_name),
            order.curvature,
        )
        if order.plan is not None:
            return update
        return LocalUpdate(self._trainer.adapted.read(order.names))

    def _complete(
        self, order: Order, parameters: list[NDArray[np.float32]]
    ) -> dict[str, NDArray[np.float32]]:
        """Return all arrays to start from: the server's, and with them what stays here."""
        if len(order.names) != len(parameters):
            raise InvalidValue("arrays", len(parameters), f"{len(order.names)} arrays")
        own = self._trainer.adapted.fingerprint
        if order.fingerprint and order.fingerprint != own:
            raise InvalidValue(
                "backbone", own, f"the server's, {order.fingerprint}: frozen weights differ"
            )
        arrays = dict(zip(order.names, parameters, strict=True))
        if order.share:
            local = self._local.recall(self._account.client, self._account.run)
            arrays = {**self._trainer.start, **local, **arrays}
        arrays = {name: self._cut(name, array) for name, array in arrays.items()}
        rank = self._rank or self._trainer.config.rank
        for name, array in arrays.items():
            factor = factor_of(name)
            if factor and array.shape[0 if factor == A else -1] != rank:
                raise InvalidValue(f"shape of {name}", array.shape, f"an array of rank {rank}")
        return arrays

    def _cut(self, name: str, array: NDArray[np.float32]) -> NDArray[np.float32]:
        """Keep the leading ranks that this client trains; the server sorts them by weight."""
        rank, factor = self._rank, factor_of(name)
        if rank is None or factor is None:
            return array
        return array[:rank] if factor == A else array[:, :rank]

    @property
    def _local(self) -> LocalStore:
        if self._store is None:
            raise InvalidValue("store", None, "a LocalStore where a factor stays with the client")
        return self._store

    def _unprotected(self) -> dict[str, float]:
        if not self._trainer.config.report_unprotected_metrics:
            return {}
        return self._trainer.task.evaluate(self._trainer.adapted.model, self._records)

    @staticmethod
    def _reply(released: Released, num_examples: int) -> Reply:
        metrics: Scalars = {**released.metrics(), NAMES: ",".join(released.arrays)}
        return list(released.arrays.values()), num_examples, metrics


def _weight(weighting: str, mechanism: Mechanism) -> float:
    if weighting == "size":
        return float(mechanism.num_records)
    if weighting == "inverse-noise":
        return 1 / mechanism.noise_variance
    return 1.0
