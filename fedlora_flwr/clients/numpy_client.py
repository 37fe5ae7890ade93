"""The Flower client: obeys any plan, keeps the ledger, and releases nothing but `Released`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from flwr.client import NumPyClient
from numpy.typing import NDArray

from fedlora_flwr.clients.local_store import LocalStore
from fedlora_flwr.clients.trainer import LocalUpdate, Trainer, plan_mechanism
from fedlora_flwr.environment import in_simulation, peak_memory
from fedlora_flwr.errors import BudgetExhausted, InvalidValue, OrderRefused, untold
from fedlora_flwr.plan import BOTH, A, ComponentPlan, factor_of
from fedlora_flwr.privacy.budget import Segment
from fedlora_flwr.privacy.ledger import Account, Ledger, LedgerSummary
from fedlora_flwr.privacy.mechanism import Mechanism
from fedlora_flwr.privacy.released import Released
from fedlora_flwr.tasks.registry import Records
from fedlora_flwr.wire import NAMES, STATUS_EXHAUSTED
from fedlora_flwr.wire.order import Order, check_shapes, named_arrays

Scalars = dict[str, bool | bytes | float | int | str]
Reply = tuple[list[NDArray[np.float32]], int, Scalars]


class LoRAClient(NumPyClient):
    """A client that trains the planned LoRA factors on its own records, privately.

    Parameters
    ----------
    trainer : Trainer
        The process's model and engine.
    records : Records or callable
        The client's private records, or what opens them: it is called once an order has been read
        and found good.
    ledger : Ledger
        Where releases are written before they leave.
    client : str
        Stable identity of these records.
    run : str
        Identity of the run, which a budget of scope ``"run"`` covers.
    store : LocalStore, optional
        Keeps what a strategy such as FedSA-LoRA leaves with the client.
    open_test : callable, optional
        Opens the public records that this client evaluates on, where it is asked to; by default the
        task's.
    rank : int, optional
        This client's LoRA rank, where clients have their own; the server's arrays are cut to it.
    """

    def __init__(
        self,
        trainer: Trainer,
        records: Records | Callable[[], Records],
        ledger: Ledger,
        client: str,
        run: str,
        *,
        store: LocalStore | None = None,
        open_test: Callable[[], Records] | None = None,
        rank: int | None = None,
    ) -> None:
        self._trainer = trainer
        self._open_test = open_test or trainer.task.test_records
        self._records = records
        self._ledger = ledger
        if rank is not None and rank < 1:
            raise InvalidValue("rank", rank, "a whole number of at least 1")
        self._store = store
        self._rank = rank
        config = trainer.config
        self._account = Account(
            client, run, config.epsilon, config.delta, config.ledger_scope, config.run_epsilon
        )

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

        The order is read in full before a record is opened, and the round is in the ledger before
        the first private batch: what fails after that counts as spent.

        Raises
        ------
        OrderRefused
            Arrays, plan, backbone or weighting do not fit this client.
        InvalidValue
            The client's records cannot be read, or cannot keep the promise.
        BudgetExhausted
            The budget is spent, and the server speaks no plan: it would not understand the answer
            "budget-exhausted" that our strategies get.
        """
        started = time.perf_counter()
        order = Order.from_config(config)
        plan = order.plan_for(len(self._trainer.layout.blocks))
        self._permit(order)
        if self._trainer.config.rates_change and not order.server_round:
            raise OrderRefused(
                "The learning rates change over the rounds, and the message does not say which "
                "round it is. Send 'server-round', or set lr-schedule = 'constant'."
            )
        arrays = self._start(order, parameters)
        with untold():
            return self._release(order, plan, arrays, started)

    def _release(
        self,
        order: Order,
        plan: ComponentPlan | None,
        arrays: dict[str, NDArray[np.float32]],
        started: float,
    ) -> Reply:
        """Open the records, write the round's row, train, and put the reply together."""
        run, records = self._trainer.config, self._open()
        mechanism = plan_mechanism(run, len(records), terms=self._ledger.terms(self._account))
        planned = Segment(mechanism.noise_multiplier, mechanism.sample_rate, run.planned_steps)
        segment = replace(planned, steps=run.local_steps)
        try:
            # Written before the first private batch, so that a failure after it counts.
            summary = self._ledger.record(self._account, order.server_round, segment, planned)
        except BudgetExhausted:
            if plan is None:
                raise
            return self._exhausted(started)
        update = self._train(order, plan, arrays, records, mechanism, summary)
        if order.share:
            kept = {name: a for name, a in update.arrays.items() if not order.leaves(name)}
            self._local.keep(self._account.client, self._account.run, kept)
        released = Released(
            arrays={name: a for name, a in update.arrays.items() if order.leaves(name)},
            ledger=summary,
            seconds=time.perf_counter() - started,
            peak_memory_mb=peak_memory() / 2**20,
            weight=_weight(order.weighting, mechanism),
            unprotected=self._unprotected(records),
        )
        # The number of records goes out only where it is the weight.
        return self._reply(released, len(records) if order.weighting == "size" else 1)

    def evaluate(
        self, parameters: list[NDArray[np.float32]], config: Scalars
    ) -> tuple[float, int, Scalars]:
        """Evaluate the model with what this client keeps of its own.

        Under a strategy that shares one factor, on the public test set: what the client keeps went
        through private steps, so the figures are post-processing. Else on its private records,
        where the client's configuration allows such figures.

        Raises
        ------
        OrderRefused
            This client does not report unprotected metrics, or names no split to evaluate on; or
            arrays or backbone do not fit it.
        """
        order, run = Order.from_config(config), self._trainer.config
        if not order.share and not run.report_unprotected_metrics:
            raise OrderRefused(
                "A loss on private records is not protected. Evaluate on the server's public test "
                "set (fraction_evaluate = 0), or set report-unprotected-metrics = true."
            )
        if order.share and not run.test_split:
            raise OrderRefused(
                "This client does not evaluate. To let it, name a public test-split in its file."
            )
        self._trainer.load(self._start(order, parameters))
        with untold():
            records = self._open_test() if order.share else self._open()
            metrics = self._trainer.task.evaluate(self._trainer.adapted.model, records)
        return metrics["loss"], 1, dict(metrics)

    def _permit(self, order: Order) -> None:
        """Refuse a weighting that would tell what this client does not tell."""
        own = self._trainer.config.weighting
        if order.weighting not in ("uniform", own):
            raise OrderRefused(
                f"weighting = {order.weighting!r} is refused: this client tells neither its number "
                "of records nor its noise to this run. Use weighting = 'uniform', or set weighting "
                "on the client."
            )

    def _open(self) -> Records:
        records = self._records
        return records() if callable(records) else records

    def _exhausted(self, started: float) -> Reply:
        summary = self._ledger.summary(self._account)
        seconds, memory = time.perf_counter() - started, peak_memory() / 2**20
        released = Released({}, summary, seconds, memory, status=STATUS_EXHAUSTED)
        return self._reply(released, num_examples=0)

    def _train(
        self,
        order: Order,
        plan: ComponentPlan | None,
        arrays: dict[str, NDArray[np.float32]],
        records: Records,
        mechanism: Mechanism,
        summary: LedgerSummary,
    ) -> LocalUpdate:
        # A server that names no round must not make a seeded client repeat its noise.
        before = summary.steps - self._trainer.config.local_steps
        update = self._trainer.train(
            arrays,
            plan or ComponentPlan.uniform(BOTH),
            records,
            mechanism,
            (self._account.client, order.server_round or f"after-{before}-steps"),
            # In a simulation the arrays come from the same person as the records.
            untrusted=self._trainer.config.exact_passes or not in_simulation(),
            server_round=order.server_round or 1,
        )
        if plan is not None:
            return update
        return LocalUpdate(self._trainer.adapted.read(self._names(order)))

    def _names(self, order: Order) -> Sequence[str]:
        return order.names.split(",") if order.names else self._trainer.layout.names

    def _start(
        self, order: Order, parameters: list[NDArray[np.float32]]
    ) -> dict[str, NDArray[np.float32]]:
        """Return all arrays to start from: the server's, and with them what stays here."""
        trainer = self._trainer
        arrays = named_arrays(self._names(order), parameters)
        if order.fingerprint and order.fingerprint != trainer.adapted.fingerprint:
            raise OrderRefused(
                f"The run's backbone is {order.fingerprint}, and this client has "
                f"{trainer.adapted.fingerprint}: their frozen weights differ. Put the same model "
                "on server and clients."
            )
        if order.share:
            local = self._local.recall(self._account.client, self._account.run)
            arrays = {**trainer.start, **local, **arrays}
        arrays = {name: self._cut(name, array) for name, array in arrays.items()}
        check_shapes(arrays, trainer.start, self._rank or trainer.config.rank)
        return arrays

    def _cut(self, name: str, array: NDArray[np.float32]) -> NDArray[np.float32]:
        """Keep the leading ranks that this client trains; the server sorts them by weight."""
        rank, factor = self._rank, factor_of(name)
        if rank is None or factor is None or array.ndim != 2:
            return array
        return array[:rank] if factor == A else array[:, :rank]

    @property
    def _local(self) -> LocalStore:
        if self._store is None:
            raise InvalidValue("store", None, "a LocalStore where a factor stays with the client")
        return self._store

    def _unprotected(self, records: Records) -> dict[str, float]:
        if not self._trainer.config.report_unprotected_metrics:
            return {}
        return self._trainer.task.evaluate(self._trainer.adapted.model, records)

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
