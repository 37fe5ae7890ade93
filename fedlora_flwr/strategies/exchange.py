"""The messages that a strategy sends to its clients, to train and to measure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.strategies.cohort import Cohorts
from fedlora_flwr.strategies.identities import Identities
from fedlora_flwr.strategies.inbox import Inbox, read_measurements
from fedlora_flwr.strategies.personal import mean_of_own_models, shared_part
from fedlora_flwr.strategies.promises import PromiseWatch
from fedlora_flwr.strategies.replies import RoundReport, weighted_figures
from fedlora_flwr.strategies.round import Round
from fedlora_flwr.wire import PACKET
from fedlora_flwr.wire.arrays import record_size
from fedlora_flwr.wire.order import Order
from fedlora_flwr.wire.records import read_training


class Exchange(FedAvg):
    """Messages to the clients of a round, and the rounds in which they measure.

    Attributes
    ----------
    last_round : RoundReport or None
        Report of the last round; None before the first.
    """

    shared: str
    own_models: ClassVar[bool]
    continues: str
    last_round: RoundReport | None
    _cohorts: Cohorts | None
    _promises: PromiseWatch
    _result: Result
    _round: Round
    _timeout: float

    @property
    def measured_there(self) -> bool:
        """Whether a part of the models stays with the clients, so that each measures its own."""
        return bool(self.shared) or self.own_models

    def order(self, server_round: int, plan: str = "") -> Order:
        """Say what clients are asked for, beside the arrays; without a plan, to measure."""
        return Order(server_round, plan, share=self.shared)

    def download(self, arrays: ArrayRecord, client: str) -> ArrayRecord:
        """Choose what a client gets.

        Parameters
        ----------
        arrays : ArrayRecord
            The global arrays.
        client : str
            The client's identity; empty while it is unknown.
        """
        return arrays

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask clients for figures where ``fraction_evaluate`` says so; that costs no budget.

        Where a part of the models stays with the clients, those of the round measure their own.
        """
        report = self.last_round
        order = replace(self.order(server_round), continues=self.continues)
        config.update(order.to_config())
        if report is not None and self.measured_there:
            # From now on the server's model does not stand in for the clients' models.
            report.evaluation, self._round.measuring = {}, list(self._round.asked)
            return self._messages(MessageType.EVALUATE, arrays, config, self._round.asked, report)
        if not self.fraction_evaluate or self._cohorts is None or report is None:
            return []
        least = max(self.min_available_nodes, self.min_evaluate_nodes)
        self._round.measuring = self._cohorts.evaluate(
            grid, server_round, self.fraction_evaluate, least
        )
        return self._messages(MessageType.EVALUATE, arrays, config, self._round.measuring, report)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Average the clients' figures by the number of examples; None without any."""
        report = self.last_round or RoundReport(server_round, "", sent=0)
        reports = read_measurements(self._inbox(MessageType.EVALUATE, report), replies, report)
        if self.measured_there:
            mean = mean_of_own_models(reports, report)
        else:
            self._promises.look_at_figures(reports, self.weighted_by_key)
            mean = weighted_figures([found.numbers() for _, found in reports], self.weighted_by_key)
        if mean is not None:
            self._result.evaluate_metrics_clientapp[server_round] = mean
        return mean

    def _inbox(self, kind: str, report: RoundReport) -> Inbox:
        if kind == MessageType.TRAIN:
            return Inbox(self._who, self._round.asked, kind, report)
        return Inbox(self._who, self._round.measuring, kind, report, "no measurement in time")

    def _messages(
        self,
        kind: str,
        arrays: ArrayRecord,
        config: ConfigRecord,
        nodes: Sequence[int] | Mapping[int, Order],
        report: RoundReport,
    ) -> list[Message]:
        """Make one message for each node, and count what goes down; nodes may have own orders."""
        messages = []
        for node in nodes:
            own = config
            if isinstance(nodes, Mapping):
                own = ConfigRecord({**config})
                own.update(nodes[node].to_config())
                report.bytes_down += len(nodes[node].packet)
            chosen = shared_part(self.download(arrays, self._who.of(node)), self.shared)
            content = RecordDict({self.arrayrecord_key: chosen, self.configrecord_key: own})
            report.bytes_down += record_size(chosen)
            messages.append(Message(content, node, kind))
        return messages

    def _ask(
        self, grid: Grid, report: RoundReport, orders: Mapping[int, Order], length: int
    ) -> dict[int, bytes]:
        """Send an order without arrays to each node, and return the packets of a length; 0: any."""
        messages = []
        for node, order in orders.items():
            config = ConfigRecord()
            config.update(order.to_config())
            content = RecordDict(
                {self.arrayrecord_key: ArrayRecord(), self.configrecord_key: config}
            )
            report.bytes_down += len(order.packet)
            messages.append(Message(content, node, MessageType.TRAIN))
        replies = grid.send_and_receive(messages, timeout=self._timeout)
        found: dict[str, bytes] = {}
        inbox = Inbox(self._who, list(orders), MessageType.TRAIN, report)
        for client, reply in inbox.read(replies):
            try:
                packet = read_training(reply).packet
                if length and len(packet) != length:
                    raise InvalidValue(f"length of {PACKET}", len(packet), f"{length} bytes")
            except Exception as error:  # One client's reply must not end the others' round.
                report.fail(client, error)
                continue
            report.bytes_up += len(packet)
            found[client] = packet
        names = {self._who.name(node): node for node in orders}
        return {names[client]: packet for client, packet in found.items()}

    @property
    def _nodes(self) -> dict[str, int]:
        """The nodes of the round that were asked to train, by what their clients are called."""
        return {self._who.name(node): node for node in self._round.asked}

    def shown(self, node: int) -> str:
        """Return what to call a node in a message."""
        return self._who.shown(node)

    @property
    def _who(self) -> Identities:
        return Identities(None) if self._cohorts is None else self._cohorts.identities
