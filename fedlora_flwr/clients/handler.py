"""Answers Flower's messages with `LocalRound`: named records in, named records out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from flwr.app import Message, MessageType

from fedlora_flwr.clients.guarded import guarded
from fedlora_flwr.clients.local_round import LocalRound
from fedlora_flwr.clients.sum_messages import BETWEEN, answer_between, stage_of
from fedlora_flwr.wire.records import evaluate_records, read_order, train_records
from fedlora_flwr.wire.report import Report


def answer_message(
    local_round: LocalRound | Callable[[], LocalRound], message: Message, identity: str
) -> Message:
    """Answer a train or evaluate message of a Message-API strategy.

    Parameters
    ----------
    local_round : LocalRound or callable
        Does the work; or a function that makes it, which is called after the message has been read.
    message : Message
        The strategy's message.
    identity : str
        The client's identity (see `client_identity`).

    Returns
    -------
    Message
        One ArrayRecord with the trained arrays, one MetricRecord, and one ConfigRecord (see
        `Report`).

    Raises
    ------
    OrderRefused
        The message does not hold one ArrayRecord and one ConfigRecord, or something in them is not
        allowed (see `Order`).
    OrderRefused, BudgetExhausted, ClientFailed
        See `guarded`.

    Examples
    --------
    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> from flwr.app import Array, ArrayRecord
    >>> from fedlora_flwr import Ledger, LocalGrid, LocalTrainer, RoLoRA, RunConfig
    >>> trainer = LocalTrainer.build(RunConfig(task="digits", device="cpu", local_steps=1))
    >>> records = trainer.task.client_records(0, 10)
    >>> start = ArrayRecord({name: Array(array) for name, array in trainer.start.items()})
    >>> with TemporaryDirectory() as folder:
    ...     ledger = Ledger(Path(folder) / "ledger.sqlite")
    ...     local_round = LocalRound(trainer, records, ledger, "hospital-7", "run-1")
    ...     app = lambda message, context: answer_message(local_round, message, "hospital-7")
    ...     grid = LocalGrid(app, 1, {})
    ...     with grid.running():
    ...         strategy = RoLoRA(min_train_nodes=1, min_available_nodes=1)
    ...         result = strategy.start(grid, start, num_rounds=1)
    >>> round(result.train_metrics_clientapp[1]["epsilon"], 2)
    2.68
    """
    return guarded(_answered, local_round, message, identity)


def _answered(
    local_round: LocalRound | Callable[[], LocalRound], message: Message, identity: str
) -> Message:
    if stage_of(message) in BETWEEN:
        return answer_between(lambda: _made(local_round).exchange, message, identity)
    order, arrays = read_order(message.content)
    made = _made(local_round)
    if message.metadata.message_type == MessageType.TRAIN:
        report = made.run(order, arrays).report()
        content = train_records(replace(report, client=identity))
    else:
        metrics = made.measure(order, arrays)
        content = evaluate_records(Report(client=identity, num_examples=1, measured=metrics))
    return Message(content, reply_to=message)


def _made(local_round: LocalRound | Callable[[], LocalRound]) -> LocalRound:
    return local_round if isinstance(local_round, LocalRound) else local_round()
