"""The base strategy: plan, cohort, completion, merge."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from logging import INFO
from typing import Any, ClassVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result
from numpy.typing import NDArray

from fedlora_flwr.algebra.means import Arrays, merge, weighted_mean
from fedlora_flwr.algebra.server_optimizer import ServerOptimizer
from fedlora_flwr.errors import FedLoRAError
from fedlora_flwr.layout import Layout
from fedlora_flwr.plan import BOTH, A, B, ComponentPlan
from fedlora_flwr.strategies import secure_sum
from fedlora_flwr.strategies.agreement import describe
from fedlora_flwr.strategies.clipping import check_clipping
from fedlora_flwr.strategies.cohort import DECLINED, Cohorts, check_rules
from fedlora_flwr.strategies.declared import Declared
from fedlora_flwr.strategies.promises import PromiseWatch, check_report
from fedlora_flwr.strategies.replies import (
    LedgerWatch,
    RoundReport,
    Upload,
    combine_metrics,
    to_record,
    within_limits,
)
from fedlora_flwr.strategies.robust import Robust
from fedlora_flwr.strategies.round import Round
from fedlora_flwr.strategies.running import Running
from fedlora_flwr.wire import ARRAYS, CONFIG, NUM_EXAMPLES, STATUS_EXHAUSTED
from fedlora_flwr.wire.limits import MOST_WEIGHT
from fedlora_flwr.wire.records import read_training


class FedLoRA(Declared, Running):
    """Federated averaging of LoRA factors under a component plan: the base of every method.

    Where a method overrides nothing, both factors train at every step and are averaged each on its
    own. A method overrides `plan`, and what else it does differently: `aggregate`, `order`,
    `download`, `check_upload`, `check_shapes`. What it can do, and its own settings, it declares
    as class attributes (see `fedlora_flwr.strategies.declared.Declared`); callers ask those.

    No client is trusted. A reply that cannot be used counts as its sender's failure, and the round
    continues with the others. A client can still move the mean within the limits of `wire`.

    Parameters
    ----------
    **kwargs
        Those of `flwr.serverapp.strategy.FedAvg`; ``fraction_evaluate`` is 0 by default.
    seed : int (default: 0)
        Seed of the cohorts.
    weighting : str (default: "uniform")
        ``"uniform"``; ``"size"``, by number of records, which becomes public; ``"inverse-noise"``,
        by ``(b / (σ C))²``, which makes σ public.
    min_completion : float (default: 0.5)
        Share of a round's clients that must answer. Fewer abort the run.
    node_timeout : float (default: 600)
        Seconds to wait for ``min_available_nodes``.
    max_rounds : int (default: 0)
        Rounds that one client may be asked for; 0 for all. With a cap each client gets its share
        exactly, and the run ends when nobody has rounds left.
    blocks : str (default: "")
        Pattern of the names of blocks (see `Layout`), where a plan tells them apart.
    local_steps : int (default: 0)
        Local steps of a round, which say what an upload holds; 0 where the server does not know.
    max_weight : float
        Largest weight that a client may state, computed from public values.
    share_head : bool (default: True)
        Whether the head is averaged. If not, each client keeps its head and measures its model.
    **own
        The method's own settings.

    Attributes
    ----------
    last_round : RoundReport or None
        Report of the last round; None before the first.
    by_sum : bool
        Whether the run uses a secure sum. The code that makes the strategy sets it.
    robust : Robust
        Defense against harmful uploads. The code that makes the strategy sets it.
    server_optimizer : ServerOptimizer
        Moves the model by the mean of the uploads. The code that makes the strategy sets it.
    only_private : bool
        Whether uploads without an ε are refused. The code that makes the strategy sets it.
    opener : Opener or None
        Opens the secure sums and takes steps with them. The code that starts the run sets it.

    Raises
    ------
    InvalidValue
        An argument is out of range.

    Examples
    --------
    >>> from fedlora_flwr.layout import Layout
    >>> layout = Layout(("blocks.0.fc.lora_A.weight", "blocks.0.fc.lora_B.weight"))
    >>> class OnlyInEvenRounds(FedLoRA):
    ...     def plan(self, server_round, layout):
    ...         return ComponentPlan.uniform("A" if server_round % 2 == 0 else "B")
    >>> str(OnlyInEvenRounds().plan(2, layout))
    'A'
    """

    by_sum: bool = False
    only_private: bool = False
    robust: Robust = Robust()
    averages: ClassVar[bool] = True
    needs_each_upload: ClassVar[bool] = False

    def __init__(
        self,
        fraction_train: float = 1.0,
        fraction_evaluate: float = 0.0,
        min_train_nodes: int = 2,
        min_evaluate_nodes: int = 2,
        min_available_nodes: int = 2,
        weighted_by_key: str = NUM_EXAMPLES,
        arrayrecord_key: str = ARRAYS,
        configrecord_key: str = CONFIG,
        *,
        seed: int = 0,
        weighting: str = "uniform",
        min_completion: float = 0.5,
        node_timeout: float = 600.0,
        max_rounds: int = 0,
        blocks: str = "",
        local_steps: int = 0,
        max_weight: float = MOST_WEIGHT,
        share_head: bool = True,
        **own: Any,
    ) -> None:
        check_rules(min_completion, max_rounds, weighting)
        nodes = min_train_nodes, min_evaluate_nodes, min_available_nodes
        keys = weighted_by_key, arrayrecord_key, configrecord_key
        # FedAvg warns about 0, but 0 is usual here because the server evaluates.
        super().__init__(fraction_train, fraction_evaluate or 1.0, *nodes, *keys)
        self.fraction_evaluate = fraction_evaluate
        self.seed = seed
        self.weighting = weighting
        self.min_completion = min_completion
        self.node_timeout = node_timeout
        self.max_rounds = max_rounds
        self.blocks = blocks
        self.local_steps = local_steps
        self.max_weight = max_weight
        self.shared = self.shared or ("" if share_head else A + B)
        self.num_rounds, self._timeout = 0, 3600.0
        self.last_round: RoundReport | None = None
        self.opener: secure_sum.Opener | None = None
        self._cohorts: Cohorts | None = None
        self._result = Result()
        self._round = Round()
        self.server_optimizer = ServerOptimizer()
        self.take_settings(own)
        self.begin()

    def plan(self, server_round: int, layout: Layout) -> ComponentPlan:
        """Say what trains in a round.

        Parameters
        ----------
        server_round : int
            Round, from 1.
        layout : Layout
            The arrays and their blocks.
        """
        return ComponentPlan.uniform(BOTH)

    def aggregate(
        self, server_round: int, current: Arrays, uploads: Sequence[Upload]
    ) -> dict[str, NDArray[np.floating]]:
        """Turn uploads into the next global arrays.

        Parameters
        ----------
        server_round : int
            Round, from 1.
        current : Arrays
            The global arrays that the clients started from.
        uploads : Sequence[Upload]
            At least one, ordered by client, all with the arrays that the plan trains.

        Returns
        -------
        dict[str, ndarray]
            All global arrays.
        """
        mean = weighted_mean([u.arrays for u in uploads], [u.weight for u in uploads])
        return merge(current, mean)

    @property
    def streams(self) -> bool:
        """Whether this round's uploads are added up as they come, and not kept.

        A mean allows it, where nothing else needs each upload. Weights do: their median cuts them.
        """
        if not self.robust.means or self.needs_each_upload or self.weighting != "uniform":
            return False
        return self.opener is None and (self.personal or not self._round.is_narrow)

    def remarks(self) -> dict[str, str]:
        """Return sentences about the whole run, by name, for its summary and closing table."""
        return {}

    def check_upload(self, current: Arrays, upload: Upload) -> None:
        """Refuse an upload that this method cannot use; its values are within `wire`'s limits.

        Parameters
        ----------
        current : Arrays
            The global arrays that the client started from.
        upload : Upload
            One client's answer, with the arrays that the plan trains.

        Raises
        ------
        InvalidValue
            The upload cannot be used. That counts as this client's failure.
        """
        self.check_shapes(current, upload.arrays)

    def check_shapes(self, current: Arrays, arrays: Arrays) -> None:
        """Refuse an upload whose arrays do not fit the global ones.

        Raises
        ------
        InvalidValue
            An array has another shape.
        """
        merge(current, arrays)

    def begin(self) -> None:
        """Reset what is carried between rounds to its state before the first round."""
        self._ledgers, self._trained = LedgerWatch(), False
        self._promises = PromiseWatch()
        self._turns: Mapping[str, Any] = {}
        self.server_optimizer.reset()

    def state_dict(self) -> dict[str, Any]:
        """Return what is carried from one round to the next, beside the global arrays.

        A strategy with the same arguments that loads it continues bit for bit as this one would. It
        holds what clients may be asked for, and what their ledgers have counted. A method that
        remembers more adds it here, takes it up in `load_state_dict` and sets it in `begin`.

        Returns
        -------
        dict[str, Any]
            NumPy arrays and plain values (texts, numbers, flags, None), and lists and dictionaries
            of them by name.
        """
        turns = self._turns if self._cohorts is None else self._cohorts.turns.state_dict()
        return {
            "num_rounds": self.num_rounds, "trained": self._trained, "turns": dict(turns),
            "ledgers": self._ledgers.state_dict(),
            "server_optimizer": self.server_optimizer.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned; `start` without ``done`` forgets it."""
        self.num_rounds, self._trained = state["num_rounds"], state["trained"]
        self._cohorts, self._turns = None, state["turns"]
        self._ledgers.load_state_dict(state["ledgers"])
        self.server_optimizer.load_state_dict(state["server_optimizer"])

    @property
    def finished(self) -> bool:
        """Whether no client that was connected in the last round may be asked for another."""
        return self._cohorts is not None and not self._cohorts.left()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draw the cohort and send it the global arrays with the round's plan.

        Raises
        ------
        InvalidValue
            The arrays hold no LoRA factors, or the method cannot use its server optimizer.
        FederationAborted
            Too few nodes connected within ``node_timeout``.
        BudgetsSpent
            Nobody may be asked for another round, and the run is over.
        """
        layout = Layout.of(arrays, self.blocks)
        plan = self.plan(server_round, layout)
        this = self._round = Round.of(arrays, layout, plan, self.shared, self.local_steps)
        everything = this.expected.whole == set(arrays)
        self.check_server_step(self.server_optimizer.name)
        whole_mean = (
            self.averages and everything and self.robust.means and not self.server_optimizer.steps
        )
        check_clipping(config, type(self).__name__, whole_mean)
        if server_round == 1:
            self.check_model({name: array.shape for name, array in this.current.items()})
        if server_round == 1 or self._cohorts is None:
            self._cohorts = Cohorts(grid, self.seed, self.max_rounds, self.node_timeout)
            if self._turns:
                self._cohorts.load_state_dict(self._turns)
        this.asked = self._cohorts.train(
            grid, server_round, self.fraction_train, self.min_available_nodes, self.min_train_nodes
        )
        self.robust.check_cohort(len(this.asked), self.needs_each_upload)
        this.streams = self.streams
        order = self.order(server_round, str(plan))
        order = replace(order, weighting=self.weighting, continues=self.continues)
        this.order = order
        sent = len(this.asked)
        report = self.last_round = RoundReport(
            server_round, str(plan), sent=sent, bytes_plain=this.plain * sent
        )
        if self.opener is None:
            config.update(order.to_config())
            return self._messages(MessageType.TRAIN, arrays, config, this.asked, report)
        this.ask = partial(self._ask, grid, report)
        orders = secure_sum.orders_of_sum(self.opener, this.ask, order, this.asked, report)
        this.asked = list(orders)
        return self._messages(MessageType.TRAIN, arrays, config, orders, report)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check the replies, average what trained and merge it into the global arrays.

        A round whose clients have all spent their budgets leaves the model as it is.

        Raises
        ------
        FederationAborted
            Fewer than ``min_completion`` of the cohort answered, no answer holds arrays, or the
            run ends with nothing trained. The message lists the reasons.
        """
        report = self.last_round
        if report is None or report.server_round != server_round:
            raise FedLoRAError(f"Call configure_train before aggregate_train({server_round}).")
        for client, content in self._inbox(MessageType.TRAIN, report).read(replies):
            self._read(client, content, report)
        if self._cohorts is not None:
            self._cohorts.took(self._round.asked)
        if not self._round.asked:  # Too few clients agreed on a secure sum.
            return report.settle_void(self.min_completion)
        more = server_round < self.num_rounds and not self.finished
        report.settle(self.min_completion, may_decline=self._trained or more)
        log(INFO, "aggregate_train: uploads of %d of %d clients", len(report.uploads), report.sent)
        current, uploads = self._round.current, report.uploads
        self._promises.look_at_training(uploads)
        if self.opener and uploads:
            ask = self._round.ask
            total = self._round.shares(uploads)
            uploads = secure_sum.opened_upload(
                self.opener, ask, current, report, total, self._nodes
            )
        if not uploads:
            return None, None
        self._trained = True
        uploads = self._round.gathered(uploads)
        merged = self.robust.merged(current, uploads, report)
        mean = self.aggregate(server_round, current, merged)
        arrays = within_limits(self.server_optimizer.step(current, mean, merged[0].arrays))
        report.compared = describe(current, uploads, personal=self.personal)
        metrics = combine_metrics([upload.metrics for upload in report.uploads])
        self._result.arrays = to_record(arrays)
        self._result.train_metrics_clientapp[server_round] = metrics
        return self._result.arrays, metrics

    def _read(self, client: str, content: RecordDict, report: RoundReport) -> None:
        try:
            report.count(content, self._round.plain)
            found = read_training(content)
            if found.status == STATUS_EXHAUSTED:
                report.declined.append(f"{client}: {DECLINED}")
                if self._cohorts is not None:
                    self._cohorts.spend(client)
                return
            keys = self.weighting, self.weighted_by_key
            upload = Upload.of(client, found, *keys, self.max_weight)
            check_report(upload.metrics, self.only_private)
            secure_sum.check_kind(upload, bool(self.opener))
            if self.opener:
                secure_sum.check_share(self._round.expected, self._round.current, upload.shares)
            else:
                self._round.expected.check(upload.arrays)
                self.check_upload(self._round.current, upload)
                self.robust.check(self._round.order, self._round.current, upload)
            self._ledgers.check(client, upload.metrics, self.local_steps)
        except Exception as error:  # One client's reply must not end the others' round.
            report.fail(client, error)
            return
        report.uploads.append(self._round.take(upload))
