"""The base strategy: plan, cohort, completion, merge. On its own it is DP-LoRA."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from logging import INFO, WARNING
from typing import Any, ClassVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result
from numpy.typing import NDArray

from fedlora_flwr.aggregation import Arrays, merge, weighted_mean
from fedlora_flwr.arrays import to_numpy, travel_size
from fedlora_flwr.errors import FederationAborted, FedLoRAError, InvalidValue
from fedlora_flwr.plan import BOTH, ComponentPlan, Layout, factor_of
from fedlora_flwr.randomness import stream_seed
from fedlora_flwr.strategies.clipping import check_clipping
from fedlora_flwr.strategies.replies import (
    LedgerWatch,
    RoundReport,
    Upload,
    aggregate_metrics,
    combine_metrics,
    last_line,
    scalars,
    scores_of,
    size_of,
    to_record,
    uploaded_arrays,
)
from fedlora_flwr.wire import CLIENT, PLAN, ROUND, SHARE, STATUS, STATUS_EXHAUSTED, WEIGHTING

WEIGHTINGS = ("uniform", "size", "inverse-noise")


class FedLoRA(FedAvg):
    """Federated averaging of LoRA factors under a component plan (DP-LoRA, arXiv 2312.17493).

    Both factors train at every step and are averaged each on its own, so the mean of the products
    differs from the product of the means. A method of its own overrides `plan`, and what else it
    does differently: `aggregate`, `instructions`, `download`, `check_shapes`.

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
        weighted_by_key: str = "num-examples",
        arrayrecord_key: str = "arrays",
        configrecord_key: str = "config",
        *,
        seed: int = 0,
        weighting: str = "uniform",
        min_completion: float = 0.5,
        node_timeout: float = 600.0,
        blocks: str = "",
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
            train_metrics_aggr_fn=aggregate_metrics,
        )
        self.fraction_evaluate = fraction_evaluate
        self.seed = seed
        self.weighting = weighting
        self.min_completion = min_completion
        self.node_timeout = node_timeout
        self.blocks = blocks
        self.num_rounds = 0
        self.last_round: RoundReport | None = None
        self._identities: dict[int, str] = {}
        self._clients: dict[int, str] = {}
        self._ledgers = LedgerWatch()
        self._plain = 0
        self._asked: list[int] = []
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
        self._clients.clear()  # Node ids, and what clients have told, are of one run.
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
            chosen = self.download(arrays, self._clients.get(node, ""))
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
        silent = set(self._asked)
        for reply in replies:
            silent.discard(reply.metadata.src_node_id)
            self._read(reply, report)
        report.failures += [f"{self._name(node)}: no reply in time" for node in silent]
        # Neither sums nor reports may depend on the order in which replies arrive.
        report.uploads.sort(key=lambda upload: upload.client)
        report.failures.sort()
        report.declined.sort()
        for line in (*report.failures, *report.declined):
            log(WARNING, "\t> round %d: %s", server_round, line)
        self._check_completion(report)
        arrays = self.aggregate(server_round, self._global, report.uploads)
        metrics = combine_metrics([upload.metrics for upload in report.uploads])
        log(INFO, "aggregate_train: %d of %d clients", len(report.uploads), report.sent)
        return to_record(arrays), metrics

    def _cohort(self, server_round: int, grid: Grid) -> list[int]:
        nodes = self._wait_for_nodes(grid)
        size = max(int(len(nodes) * self.fraction_train), self.min_train_nodes)
        if size >= len(nodes):
            return nodes
        # Node ids are drawn anew for every run; who a node is, is not.
        identities = self._identify(grid, nodes)
        order = sorted(nodes, key=identities.__getitem__)
        generator = np.random.default_rng(stream_seed(self.seed, "cohort", server_round))
        return [order[i] for i in sorted(generator.choice(len(order), size, replace=False))]

    def _wait_for_nodes(self, grid: Grid) -> list[int]:
        needed = max(self.min_available_nodes, self.min_train_nodes)
        deadline = time.monotonic() + self.node_timeout
        while len(nodes := sorted(grid.get_node_ids())) < needed:
            if time.monotonic() > deadline:
                raise FederationAborted(
                    f"{len(nodes)} of at least {needed} nodes connected in {self.node_timeout:g} s."
                )
            log(INFO, "Waiting for nodes: %d of %d connected.", len(nodes), needed)
            time.sleep(1)
        return nodes

    def _identify(self, grid: Grid, nodes: list[int]) -> dict[int, str]:
        """Ask nodes once who they are; a client without our bridge does not answer."""
        unknown = [node for node in nodes if node not in self._identities]
        if unknown:
            queries = [Message(RecordDict(), node, MessageType.QUERY) for node in unknown]
            self._identities.update(dict.fromkeys(unknown, ""))
            for reply in grid.send_and_receive(queries, timeout=self.node_timeout):
                if not reply.has_error():
                    identity = str(reply.content.config_records["config"][CLIENT])
                    self._identities[reply.metadata.src_node_id] = identity
            if not all(self._identities[node] for node in unknown):
                log(
                    WARNING, "Some clients do not say who they are: cohorts follow random node ids."
                )
        return self._identities

    def _read(self, reply: Message, report: RoundReport) -> None:
        node = reply.metadata.src_node_id
        if reply.has_error():
            report.failures.append(f"{self._name(node)}: {last_line(reply.error.reason)}")
            return
        numbers, texts = scalars(reply.content)
        client = self._client(node, texts)
        report.bytes_up += size_of(reply.content)
        report.bytes_up_adapters += size_of(reply.content, factors_only=True)
        report.bytes_plain += self._plain
        if texts.get(STATUS) == STATUS_EXHAUSTED:
            report.declined.append(f"{client}: its privacy budget is spent")
            return
        try:
            arrays = uploaded_arrays(reply.content)
            self._check_arrays(arrays)
            scores = scores_of(reply.content)
            self._ledgers.check(client, numbers)
            upload = Upload(client, arrays, self._weight(numbers), numbers, texts, scores)
        except Exception as error:  # Whatever a client sends, the other clients' round goes on.
            report.failures.append(f"{client}: {error}")
            return
        report.uploads.append(upload)

    def _client(self, node: int, texts: Mapping[str, str]) -> str:
        """Say who answered, and remember."""
        self._clients[node] = texts.get(CLIENT) or self._name(node)
        return self._clients[node]

    def _name(self, node: int) -> str:
        known = self._identities.get(node) or self._clients.get(node)
        return known or f"node {node:020d}"

    def _check_arrays(self, arrays: Arrays) -> None:
        """Refuse an upload that is not exactly what the plan trains, in names and shapes."""
        if arrays.keys() not in self._expected:
            wrong = sorted(arrays.keys() ^ self._expected[-1])
            allowed = (
                f"those that {self._plan} trains; wrong: {wrong}. The client must obey the plan"
            )
            raise InvalidValue("uploaded arrays", sorted(arrays), f"{allowed}: by follow_plan")
        self.check_shapes(self._global, arrays)

    def _uploads_of(self, layout: Layout) -> list[set[str]]:
        """Return the names that an upload may have, after one step and after each further one."""
        share = self.instructions().get(SHARE)
        # A round with fewer steps than the plan has trains less of it.
        return [
            {n for n in layout.trained(self._plan, steps + 1) if share in (None, factor_of(n))}
            for steps in range(len(self._plan.steps))
        ]

    def _weight(self, metrics: dict[str, float]) -> float:
        if self.weighting == "uniform":
            return 1.0
        keys = ("weight", self.weighted_by_key) if self.weighting == "size" else ("weight",)
        found = [metrics[key] for key in keys if key in metrics]
        if not found:
            raise InvalidValue("reply metrics", sorted(metrics), f"one of {keys}")
        if not 0 < found[0] < float("inf"):
            raise InvalidValue("weight", found[0], "a finite number above 0")
        return found[0]

    def _check_completion(self, report: RoundReport) -> None:
        answered = len(report.uploads) + len(report.declined)
        lines = [*report.failures, *report.declined]
        reasons = "; ".join(lines[:5]) + (f"; and {len(lines) - 5} more" if lines[5:] else "")
        if report.sent and answered < self.min_completion * report.sent:
            raise FederationAborted(
                f"Round {report.server_round}: {answered} of {report.sent} clients answered, "
                f"fewer than min-completion = {self.min_completion:g}. Reasons: {reasons}"
            )
        if not report.uploads:
            raise FederationAborted(
                f"Round {report.server_round}: no client sent arrays. Reasons: {reasons}"
            )
        names = {frozenset(upload.arrays) for upload in report.uploads}
        if len(names) > 1:
            raise FederationAborted(
                f"Round {report.server_round}: clients uploaded different sets of arrays."
            )
