"""The base strategy: plan, cohort, completion, merge. On its own it is DP-LoRA."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from logging import INFO, WARNING
from typing import Any, ClassVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result
from numpy.typing import NDArray

from fedlora_flwr.aggregation import Arrays, bounded, merge, weighted_mean
from fedlora_flwr.arrays import to_numpy, travel_size
from fedlora_flwr.errors import FedLoRAError, InvalidValue
from fedlora_flwr.plan import BOTH, ComponentPlan, Layout, factor_of
from fedlora_flwr.strategies.clipping import check_clipping
from fedlora_flwr.strategies.cohort import draw, identify, wait_for_nodes
from fedlora_flwr.strategies.identities import Identities
from fedlora_flwr.strategies.inbox import Inbox, read_measurements
from fedlora_flwr.strategies.replies import (
    LedgerWatch,
    RoundReport,
    Upload,
    combine_metrics,
    size_of,
    to_record,
    weight_of,
    weighted_figures,
)
from fedlora_flwr.wire import (
    ARRAYS,
    CONFIG,
    MOST_ENTRY,
    NUM_EXAMPLES,
    PLAN,
    ROUND,
    SHARE,
    STATUS_EXHAUSTED,
    WEIGHTING,
    WEIGHTINGS,
)
from fedlora_flwr.wire.limits import MOST_WEIGHT
from fedlora_flwr.wire.records import read_training


class FedLoRA(FedAvg):
    """Federated averaging of LoRA factors under a component plan (DP-LoRA, arXiv 2312.17493).

    Both factors train at every step and are averaged each on its own, so the mean of the products
    differs from the product of the means. A method of its own overrides `plan`, and what else it
    does differently: `aggregate`, `instructions`, `download`, `check_upload`, `check_shapes`.

    No client is trusted. A reply that cannot be used is its sender's failure, and the round goes on
    with the others; what one client can still do is move the mean within the limits of `wire`.

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
    blocks : str (default: "")
        Pattern of the names of blocks (see `Layout`), where a plan tells them apart.
    local_steps : int (default: 0)
        Local steps of a round, which say what an upload holds; 0 where the server does not know.
    max_weight : float
        Largest weight that a client may state, from what is public.

    Attributes
    ----------
    settings : tuple[str, ...]
        Names of further arguments that are keys of the run configuration.
    last_round : RoundReport or None
        What came of the last round.

    Raises
    ------
    InvalidValue
        An argument is out of range.
    """

    settings: ClassVar[tuple[str, ...]] = ()

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
        blocks: str = "",
        local_steps: int = 0,
        max_weight: float = MOST_WEIGHT,
    ) -> None:
        if not 0 <= min_completion <= 1:
            raise InvalidValue("min_completion", min_completion, "a number from 0 to 1")
        if weighting not in WEIGHTINGS:
            raise InvalidValue("weighting", weighting, f"one of {WEIGHTINGS}")
        super().__init__(
            fraction_train=fraction_train,
            # FedAvg warns of 0, which is the rule here: the server evaluates.
            fraction_evaluate=fraction_evaluate or 1.0,
            min_train_nodes=min_train_nodes,
            min_evaluate_nodes=min_evaluate_nodes,
            min_available_nodes=min_available_nodes,
            weighted_by_key=weighted_by_key,
            arrayrecord_key=arrayrecord_key,
            configrecord_key=configrecord_key,
        )
        self.fraction_evaluate = fraction_evaluate
        self.seed = seed
        self.weighting = weighting
        self.min_completion = min_completion
        self.node_timeout = node_timeout
        self.blocks = blocks
        self.local_steps = local_steps
        self.max_weight = max_weight
        self.num_rounds = 0
        self.last_round: RoundReport | None = None
        self._identities: Identities | None = None
        self._ledgers = LedgerWatch()
        self._plain = 0
        self._asked: list[int] = []
        self._measuring: list[int] = []
        self._global: dict[str, NDArray[np.floating]] = {}
        self._plan = ComponentPlan.uniform(BOTH)
        self._expected: list[set[str]] = []

    def plan(self, server_round: int, layout: Layout) -> ComponentPlan:
        """Say what trains in a round.

        Parameters
        ----------
        server_round : int
            Round, from 1.
        layout : Layout
            The arrays and their blocks.
        """
        del server_round, layout
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
        del server_round
        mean = weighted_mean([u.arrays for u in uploads], [u.weight for u in uploads])
        return merge(current, mean)

    def instructions(self) -> dict[str, str]:
        """Say what clients are asked beside the plan, in the words of `wire`."""
        return {}

    def download(self, arrays: ArrayRecord, client: str) -> ArrayRecord:
        """Choose what a client gets.

        Parameters
        ----------
        arrays : ArrayRecord
            The global arrays.
        client : str
            Who it is; empty as long as that is not known.
        """
        del client
        return arrays

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
            It cannot be used. That counts as this client's failure.
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

    def start(  # noqa: D102
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        *args: Any,
        **kwargs: Any,
    ) -> Result:
        self.num_rounds = num_rounds
        self._ledgers = LedgerWatch()
        return super().start(grid, initial_arrays, num_rounds, *args, **kwargs)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draw the cohort and send it the global arrays with the round's plan.

        Raises
        ------
        InvalidValue
            The arrays hold no LoRA factors.
        FederationAborted
            Too few nodes connected within ``node_timeout``.
        """
        layout = Layout.of(arrays, self.blocks)
        self._global = {name: to_numpy(array) for name, array in arrays.items()}
        self._plan = self.plan(server_round, layout)
        self._plan.check(len(layout.blocks))
        self._expected = self._uploads_of(layout)
        averages = type(self).aggregate is FedLoRA.aggregate
        check_clipping(config, type(self).__name__, averages and self._expected[-1] == set(arrays))
        self._asked = nodes = self._cohort(server_round, grid)
        config.update({ROUND: server_round, PLAN: str(self._plan), WEIGHTING: self.weighting})
        config.update(self.instructions())
        self._plain = sum(travel_size(arrays[name]) for name in layout.names)
        report = self.last_round = RoundReport(
            server_round, str(self._plan), sent=len(nodes), bytes_plain=self._plain * len(nodes)
        )
        return self._messages(MessageType.TRAIN, arrays, config, nodes, report)

    def _messages(
        self,
        kind: str,
        arrays: ArrayRecord,
        config: ConfigRecord,
        nodes: Sequence[int],
        report: RoundReport,
    ) -> list[Message]:
        """Make one message a node, and count what goes down."""
        messages = []
        for node in nodes:
            chosen = self.download(arrays, self._who.of(node))
            content = RecordDict({self.arrayrecord_key: chosen, self.configrecord_key: config})
            report.bytes_down += size_of(content)
            messages.append(Message(content, node, kind))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check the replies, average what trained and merge it into the global arrays.

        Raises
        ------
        FederationAborted
            Fewer than ``min_completion`` of the cohort answered, or no answer holds arrays. The
            message lists the reasons.
        """
        report = self.last_round
        if report is None or report.server_round != server_round:
            raise FedLoRAError(f"aggregate_train({server_round}) without configure_train before it")
        for client, content in self._inbox(MessageType.TRAIN, report).read(replies):
            self._read(client, content, report)
        report.settle(self.min_completion)
        arrays = self._bounded(self.aggregate(server_round, self._global, report.uploads))
        metrics = combine_metrics([upload.metrics for upload in report.uploads])
        log(INFO, "aggregate_train: %d of %d clients", len(report.uploads), report.sent)
        return to_record(arrays), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask clients for figures where ``fraction_evaluate`` says so, as FedAvg does."""
        messages = list(super().configure_evaluate(server_round, arrays, config, grid))
        self._measuring = [message.metadata.dst_node_id for message in messages]
        return messages

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Average the clients' figures by the number of examples; None without any."""
        report = self.last_round or RoundReport(server_round, "", sent=0)
        reports = read_measurements(self._inbox(MessageType.EVALUATE, report), replies, report)
        return weighted_figures([found.numbers() for _, found in reports], self.weighted_by_key)

    def _cohort(self, server_round: int, grid: Grid) -> list[int]:
        needed = max(self.min_available_nodes, self.min_train_nodes)
        nodes = wait_for_nodes(grid, needed, self.node_timeout)
        if server_round == 1 or not self._identities:  # Node ids belong to one run.
            self._identities = Identities(grid)
        self._identities.look()
        size = max(int(len(nodes) * self.fraction_train), self.min_train_nodes)
        if size >= len(nodes):
            return nodes
        identify(grid, nodes, self._identities, self.node_timeout)
        return draw(nodes, self._identities, size, self.seed, server_round)

    def _inbox(self, kind: str, report: RoundReport) -> Inbox:
        if kind == MessageType.TRAIN:
            return Inbox(self._who, self._asked, kind, report)
        return Inbox(self._who, self._measuring, kind, report, "no measurement in time")

    @property
    def _who(self) -> Identities:
        return self._identities or Identities(None)

    def _read(self, client: str, content: RecordDict, report: RoundReport) -> None:
        try:
            report.bytes_up += size_of(content)
            report.bytes_up_adapters += size_of(content, factors_only=True)
            report.bytes_plain += self._plain
            found = read_training(content)
            if found.status == STATUS_EXHAUSTED:
                report.declined.append(f"{client}: its privacy budget is spent")
                return
            numbers = {word: float(value) for word, value in found.numbers().items()}
            texts = {word: v for word, v in found.texts().items() if isinstance(v, str)}
            upload = Upload(
                client,
                dict(found.arrays),
                weight_of(numbers, self.weighting, self.weighted_by_key, self.max_weight),
                numbers,
                texts,
            )
            self._check_arrays(upload.arrays)
            self.check_upload(self._global, upload)
            self._ledgers.check(client, numbers, self.local_steps)
        except Exception as error:  # One client's reply must not end the others' round.
            report.fail(client, error)
            return
        report.uploads.append(upload)

    def _check_arrays(self, arrays: Arrays) -> None:
        """Refuse an upload that is not exactly what the plan trains, in names and shapes."""
        if arrays.keys() not in self._expected:
            wrong = sorted(arrays.keys() ^ self._expected[-1])
            allowed = (
                f"those that {self._plan} trains; wrong: {wrong}. The client must obey the plan"
            )
            raise InvalidValue("uploaded arrays", sorted(arrays), f"{allowed}: by follow_plan")

    def _uploads_of(self, layout: Layout) -> list[set[str]]:
        """Return the names that an upload may have, after one step and after each further one."""
        share = self.instructions().get(SHARE)
        # A round with fewer steps than the plan has trains less of it.
        possible = [self.local_steps] if self.local_steps else range(1, len(self._plan.steps) + 1)
        return [
            {n for n in layout.trained(self._plan, steps) if share in (None, factor_of(n))}
            for steps in possible
        ]

    def _bounded(self, arrays: dict[str, NDArray[np.floating]]) -> Arrays:
        """Keep the next global arrays within what clients accept."""
        found = bounded(arrays, MOST_ENTRY)
        cut = [name for name, array in found.items() if array is not arrays[name]]
        if cut:
            log(WARNING, "Entries above %g were cut, e.g. of %s.", MOST_ENTRY, cut[0])
        return found
