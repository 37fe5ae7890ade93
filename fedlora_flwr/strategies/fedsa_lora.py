"""FedSA-LoRA: A is shared, B stays with the client (arXiv 2410.01463)."""

from __future__ import annotations

from collections.abc import Iterable
from logging import WARNING

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid

from fedlora_flwr.arrays import record_of
from fedlora_flwr.plan import A, factor_of
from fedlora_flwr.strategies.base import FedLoRA
from fedlora_flwr.strategies.inbox import read_measurements
from fedlora_flwr.strategies.replies import combine_metrics
from fedlora_flwr.wire import ROUND, SHARE


class FedSALoRA(FedLoRA):
    """Train A and B, exchange and average A only; B and the head stay on each client's disk.

    The clients' models differ, and the server has none: after each round every client measures its
    own on the public test set, and the round's metrics are the means. B trains under the same noise
    as A although it stays, since the gradient of A reads it. Source: arXiv 2410.01463.
    """

    def instructions(self) -> dict[str, str]:
        """Tell clients to keep all but A."""
        return {SHARE: A}

    def download(self, arrays: ArrayRecord, client: str) -> ArrayRecord:
        """Send A; a client without a B of its own starts from the backbone's head and B = 0."""
        del client
        return record_of({name: array for name, array in arrays.items() if factor_of(name) == A})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send all clients of the round the new A."""
        del grid
        report = self.last_round
        if report is None:
            return []
        # From now on the clients measure; no model of the server's stands in for theirs.
        report.evaluation = {}
        self._measuring = list(self._asked)
        config[ROUND] = server_round
        config.update(self.instructions())
        return self._messages(MessageType.EVALUATE, arrays, config, self._asked, report)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Average the clients' metrics; None where no client measured its model.

        A device may refuse to measure, so that is no reason to end the run.
        """
        report = self.last_round
        if report is None:
            return None
        reports = read_measurements(self._inbox(MessageType.EVALUATE, report), replies, report)
        if not reports:
            log(WARNING, "\t> round %d: no client measured its model.", server_round)
            return None
        # In a fixed order, since sums depend on it.
        mean = combine_metrics([found.figures() for _, found in reports])
        report.evaluation = {k: v for k, v in mean.items() if isinstance(v, float)}
        self._result.evaluate_metrics_clientapp[server_round] = mean
        return mean
