"""One client's round, without Flower: it takes an order and arrays, and returns `Released`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora_flwr.clients.local_store import LocalStore
from fedlora_flwr.clients.own_labels import on_own_labels
from fedlora_flwr.clients.sharing import (
    agreed,
    check_asked,
    check_order,
    round_grid,
    trust_of,
    with_records,
)
from fedlora_flwr.clients.sum_exchange import Masks, SumExchange
from fedlora_flwr.clients.trainer import LocalTrainer, LocalUpdate
from fedlora_flwr.data.records import Records, check_records
from fedlora_flwr.data.users import count_units
from fedlora_flwr.environment import in_simulation, peak_memory
from fedlora_flwr.errors import BudgetExhausted, InvalidValue, OrderRefused, untold
from fedlora_flwr.layout import leading_ranks
from fedlora_flwr.plan import BOTH, ComponentPlan
from fedlora_flwr.privacy.budget import Segment
from fedlora_flwr.privacy.calibration import calibrated_mechanism
from fedlora_flwr.privacy.ledger import Account, Ledger, LedgerSummary
from fedlora_flwr.privacy.mechanism import Mechanism
from fedlora_flwr.privacy.released import Released
from fedlora_flwr.privacy.repeats import digest_of, inputs_of
from fedlora_flwr.wire import STATUS_EXHAUSTED
from fedlora_flwr.wire.limits import Residues
from fedlora_flwr.wire.order import Order, check_shapes

Arrays = Mapping[str, NDArray[np.float32]]
_Row = tuple[Account, int, Segment, Segment, str, str]


class LocalRound:
    """Trains the planned LoRA factors on one client's records, privately, round after round.

    *Guarantees.* The order is read in full before a record is opened. The round is in the ledger
    before the first private batch, so a failure after that counts as spent. Only arrays that
    private steps produced are released, and of those only what the order asks for.

    Parameters
    ----------
    trainer : LocalTrainer
        The process's model and engine.
    records : Records or callable
        The client's private records, or a function that opens them. It is called after an order
        has been read and accepted.
    ledger : Ledger
        Each release is written here before it leaves.
    client : str
        Stable identity of these records.
    run : str
        Identity of the run, which a budget of scope ``"run"`` covers.
    store : LocalStore, optional
        Keeps the factor that stays with the client under a strategy such as FedSA-LoRA.
    open_test : callable, optional
        Opens the public records that this client evaluates on if it is asked to; by default the
        task's.
    exchange : SumExchange, optional
        Agrees with other clients on the masks of a secure sum.
    rank : int, optional
        This client's LoRA rank, if clients have their own. The server's arrays are cut to it.

    Raises
    ------
    InvalidValue
        ``rank`` is below 1.

    Examples
    --------
    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> from fedlora_flwr import RunConfig
    >>> trainer = LocalTrainer.build(RunConfig(task="digits", device="cpu", local_steps=1))
    >>> records = trainer.task.client_records(0, 10)
    >>> with TemporaryDirectory() as folder:
    ...     ledger = Ledger(Path(folder) / "ledger.sqlite")
    ...     local_round = LocalRound(trainer, records, ledger, "hospital-7", "run-1")
    ...     released = local_round.run(Order(server_round=1, plan="B"), local_round.start)
    >>> len(local_round.start), len(released.arrays), released.ledger.steps
    (18, 10, 1)
    """

    def __init__(
        self,
        trainer: LocalTrainer,
        records: Records | Callable[[], Records],
        ledger: Ledger,
        client: str,
        run: str,
        *,
        store: LocalStore | None = None,
        open_test: Callable[[], Records] | None = None,
        exchange: SumExchange | None = None,
        rank: int | None = None,
    ) -> None:
        self._trainer = trainer
        self._open_test = open_test or trainer.task.test_records
        if not callable(records):
            check_records(records)
        self._records = records
        self._ledger = ledger
        if rank is not None and rank < 1:
            raise InvalidValue("rank", rank, "a whole number of at least 1")
        self._store = store
        self._exchange = exchange
        self._rank = rank
        self._account = Account.of(trainer.config, client, run)

    @property
    def identity(self) -> str:
        """Stable identity of the client's records."""
        return self._account.client

    @property
    def exchange(self) -> SumExchange:
        """The client's part in the messages of a secure sum.

        Raises
        ------
        OrderRefused
            This client has no part in a secure sum.
        """
        if self._exchange is None:
            raise OrderRefused(
                "The message belongs to a secure sum, but this client keeps no keys for one. Give "
                "its LocalRound an exchange."
            )
        return self._exchange

    @property
    def start(self) -> Arrays:
        """The arrays before any training, which follow from the seed and from no record."""
        return self._trainer.start

    def run(self, order: Order, arrays: Arrays) -> Released:
        """Train one round and release the result.

        Parameters
        ----------
        order : Order
            What the server asks for.
        arrays : Mapping[str, ndarray]
            The server's arrays in fp32, finite and bounded (see `named_arrays`), folded pairs among
            them. Factors have the shapes (r, n) and (m, r).

        Returns
        -------
        Released
            Everything that leaves the client. If the budget does not allow the round, the status is
            ``"budget-exhausted"``, and the arrays are empty.

        Raises
        ------
        OrderRefused
            Arrays, plan, backbone or weighting do not fit this client.
        InvalidValue
            The client's records cannot be read, or cannot keep the promise.
        BudgetExhausted
            The budget is spent, and the server sent no plan: it would not understand the answer
            ``"budget-exhausted"`` that our strategies get.
        """
        started = time.perf_counter()
        plan = order.plan_for(self._trainer.layout)
        check_asked(order, self._trainer.config)
        shares = check_order(order, self._trainer.config)
        masks = self.exchange.masks(order) if order.stage else None
        names = tuple(arrays)
        arrays, own = self._complete(order, arrays, order.server_round)
        with untold(), self._ledger.flushing():
            return self._release(order, plan, names, arrays, own, started, shares, masks)

    def _release(
        self,
        order: Order,
        plan: ComponentPlan | None,
        names: tuple[str, ...],
        arrays: Arrays,
        own: Arrays,
        started: float,
        shares: int,
        masks: Masks | None,
    ) -> Released:
        """Open the records, write the round's row, train, and put the release together."""
        run, records = self._trainer.config, self._open()
        account, units = self._account_of(order), count_units(run.unit, records)
        terms = self._ledger.terms(account)
        mechanism = agreed(calibrated_mechanism(run, units, terms=terms), order)
        grid = round_grid(order, mechanism, shares, self._trainer, plan)
        inputs = inputs_of(run, account.run, order, arrays, mechanism, own)
        row = self._row(account, order, mechanism, shares, inputs)

        def train(summary: LedgerSummary) -> Mapping[str, NDArray[Any]]:
            if grid and plan:
                manner = self._manner(order, summary)
                return self._trainer.share(arrays, plan, records, mechanism, grid, *manner)
            return self._train(order, plan, arrays, own, records, mechanism, summary).arrays

        try:
            made, summary = self._counted(row, train)
        except BudgetExhausted:
            if plan is None:
                raise
            return self._exhausted(order, started)
        if grid and plan:
            return self._shared(made, summary, records, units, started, masks)
        if plan is None:
            # A server without plans replaces its arrays by what it gets, so it gets all of them.
            made = self._trainer.adapted.read(names)
        if order.keeps:
            self._ledger.flush()  # The row comes before the file.
            kept = {name: array for name, array in made.items() if order.stays(name)}
            self._local.keep(account.client, account.run, kept, order.server_round)
        return Released(
            arrays={name: a for name, a in made.items() if order.leaves(name)},
            ledger=summary,
            seconds=time.perf_counter() - started,
            peak_memory_mb=peak_memory() / 2**20,
            weight=mechanism.weight(order.weighting),
            # It leaves the client only if it is the weight.
            num_examples=units if order.weighting == "size" else 1,
            unprotected=self._unprotected(records),
        )

    def _row(
        self, account: Account, order: Order, mechanism: Mechanism, shares: int, inputs: str
    ) -> _Row:
        """Return what the ledger records of a round."""
        run = self._trainer.config
        planned = Segment(mechanism.noise_multiplier, mechanism.sample_rate, run.planned_steps)
        segment = replace(planned, steps=run.local_steps)
        return account, order.server_round, segment, planned, trust_of(shares), inputs

    def _counted(
        self,
        row: _Row,
        train: Callable[[LedgerSummary], Mapping[str, NDArray[Any]]],
    ) -> tuple[Mapping[str, NDArray[Any]], LedgerSummary]:
        """Write the round's row, train, and return the result and the summary of its row."""
        # The row comes before the first private batch, so a failure after it counts as spent.
        made = train(summary := self._ledger.record(*row))
        if row[-1]:
            summary = self._ledger.vouch(*row, digest_of(made))
        return made, summary

    def _shared(
        self,
        shares: Mapping[str, Residues],
        summary: LedgerSummary,
        records: Records,
        units: int,
        started: float,
        masks: Masks | None,
    ) -> Released:
        shares = with_records(shares, units)
        shares = masks.on(shares) if masks else shares
        seconds, memory = time.perf_counter() - started, peak_memory() / 2**20
        unprotected = self._unprotected(records)
        return Released({}, summary, seconds, memory, unprotected=unprotected, shares=shares)

    def measure(self, order: Order, arrays: Arrays) -> dict[str, float]:
        """Evaluate the model, with the factor that this client keeps if there is one.

        If the strategy shares one factor, the client measures on the public test set. Its own part
        went through private steps, so the figures are post-processing. A simulation also weights
        them by the client's labels (see `on_own_labels`). If the strategy shares all, the client
        measures on its private records, if its configuration allows such figures.

        Parameters
        ----------
        order, arrays
            As for `run`.

        Returns
        -------
        dict[str, float]
            The task's metrics, ``loss`` among them.

        Raises
        ------
        OrderRefused
            This client does not report unprotected metrics, or names no split to evaluate on; or
            arrays or backbone do not fit it.
        """
        run = self._trainer.config
        if not order.keeps and not run.report_unprotected_metrics:
            raise OrderRefused(
                "A loss on private records is not protected. Evaluate on the server's public test "
                "set (fraction_evaluate = 0), or set report-unprotected-metrics = true."
            )
        if order.keeps and not run.test_split:
            raise OrderRefused(
                "This client does not evaluate. To let it, name a public test-split in its file."
            )
        # What this client kept in this round belongs to the model.
        arrays, own = self._complete(order, arrays, order.server_round + 1)
        self._trainer.load({**arrays, **own})
        task, model = self._trainer.task, self._trainer.adapted.model
        with untold():
            if not order.keeps:
                return task.evaluate(model, self._open())
            public = self._open_test()
            # On a device this figure would tell what labels its owner has.
            told = on_own_labels(task, model, public, self._open()) if in_simulation() else {}
            return {**task.evaluate(model, public), **told}

    def _open(self) -> Records:
        records = self._records
        if callable(records):
            records = records()
            check_records(records)
        return records

    def _account_of(self, order: Order) -> Account:
        """Return the account of the run, or of the one that the server continues."""
        return replace(self._account, run=order.continues or self._account.run)

    def _exhausted(self, order: Order, started: float) -> Released:
        summary = self._ledger.summary(self._account_of(order))
        seconds, memory = time.perf_counter() - started, peak_memory() / 2**20
        return Released({}, summary, seconds, memory, status=STATUS_EXHAUSTED, num_examples=0)

    def _train(
        self,
        order: Order,
        plan: ComponentPlan | None,
        arrays: Arrays,
        own: Arrays,
        records: Records,
        mechanism: Mechanism,
        summary: LedgerSummary,
    ) -> LocalUpdate:
        return self._trainer.train(
            arrays,
            plan or ComponentPlan.uniform(BOTH),
            records,
            mechanism,
            *self._manner(order, summary),
            proximal_mu=order.proximal_mu,
            own=own,
        )

    def _manner(self, order: Order, summary: LedgerSummary) -> tuple[tuple[object, ...], bool, int]:
        """Return the round's random streams, whether its arrays are trusted, and its number."""
        # A server that names no round must not make a seeded client repeat its noise.
        before = summary.steps - self._trainer.config.local_steps
        stream = (self._account.client, order.server_round or f"after-{before}-steps")
        # In a simulation the arrays come from the same person as the records.
        untrusted = self._trainer.config.exact_passes or not in_simulation()
        return stream, untrusted, order.server_round or 1

    def _complete(self, order: Order, arrays: Arrays, before: int) -> tuple[Arrays, Arrays]:
        """Return the server's arrays, completed by those that stay, and this client's own model.

        The second are the arrays that replace the server's where a client starts from its own.
        """
        trainer = self._trainer
        if order.fingerprint and order.fingerprint != trainer.adapted.fingerprint:
            raise OrderRefused(
                f"The run's backbone is {order.fingerprint}, and this client has "
                f"{trainer.adapted.fingerprint}: their frozen weights differ. Put the same model "
                "on server and clients."
            )
        own: Arrays = {}
        if order.keeps:
            account = self._account_of(order)
            last = before if order.server_round else None
            local = self._local.recall(account.client, account.run, last)
            own = local if order.start_from else {}
            arrays = {**trainer.start, **local, **arrays} if order.share else arrays
        if self._rank is not None:
            arrays = {n: leading_ranks(n, array, self._rank) for n, array in arrays.items()}
        rank = self._rank or trainer.config.rank
        check_shapes(arrays, trainer.start, rank)
        if own:
            check_shapes({**arrays, **own}, trainer.start, rank)
        return arrays, own

    @property
    def _local(self) -> LocalStore:
        if self._store is None:
            raise InvalidValue("store", None, "a LocalStore where a factor stays with the client")
        return self._store

    def _unprotected(self, records: Records) -> dict[str, float]:
        if not self._trainer.config.report_unprotected_metrics:
            return {}
        return self._trainer.task.evaluate(self._trainer.adapted.model, records)
