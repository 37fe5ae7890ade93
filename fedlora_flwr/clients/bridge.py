"""Lets a Flower NumPyClient serve Message-API strategies, with array names and partial uploads.

Flower's own translation expects legacy records and drops the names of arrays. This client mod
translates both ways: names travel in the config and in the metrics under ``array-names``. It also
decides which errors a server may read.
"""

from __future__ import annotations

from typing import TypeVar, cast

from flwr.app import (
    ConfigRecord,
    Context,
    Message,
    MessageType,
    RecordDict,
)
from flwr.clientapp.typing import ClientAppCallable

from fedlora_flwr.clients.device import client_identity
from fedlora_flwr.clients.guarded import guarded
from fedlora_flwr.errors import (
    FedLoRAError,
    OrderRefused,
)
from fedlora_flwr.flower_internals import RECORD_KEY_CONFIGS
from fedlora_flwr.wire import CLIENT, NAMES
from fedlora_flwr.wire.arrays import to_numpy
from fedlora_flwr.wire.records import evaluate_content, fit_content, message_records, query_records
from fedlora_flwr.wire.report import Report

S = TypeVar("S")
T = TypeVar("T")
U = TypeVar("U")

_LEGACY_INS = {MessageType.TRAIN: "fitins", MessageType.EVALUATE: "evaluateins"}


def bridge(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Translate between Message-API records and those of a NumPyClient.

    Messages of a legacy server pass through unchanged. A query is answered here with the client's
    identity.

    Parameters
    ----------
    message : Message
        The server's message.
    context : Context
        The client's context. Its node config gives the client's identity.
    call_next : callable
        The client.

    Returns
    -------
    Message
        The reply: one ArrayRecord with the names that the client gave, one MetricRecord with
        ``num-examples`` and all metrics that are numbers, and one ConfigRecord with all metrics
        that are texts and, under ``client``, the client's identity.

    Raises
    ------
    OrderRefused, BudgetExhausted, ClientFailed
        See `guarded`.

    Examples
    --------
    >>> import numpy as np
    >>> from flwr.app import Array, ArrayRecord
    >>> from flwr.client import NumPyClient
    >>> from flwr.clientapp import ClientApp
    >>> from fedlora_flwr import DPLoRA, LocalGrid
    >>> class AddsOne(NumPyClient):
    ...     def fit(self, parameters, config):
    ...         return [array + 1 for array in parameters], 1, {}
    >>> app = ClientApp(lambda context: AddsOne().to_client(), mods=[bridge])
    >>> zeros = {f"fc.lora_{factor}.weight": Array(np.zeros((2, 2))) for factor in "AB"}
    >>> with LocalGrid(app, 2, {}).running() as grid:
    ...     result = DPLoRA().start(grid, ArrayRecord(zeros), num_rounds=3)
    >>> float(result.arrays["fc.lora_A.weight"].numpy()[0, 0])
    3.0
    """
    return guarded(_bridged, message, context, call_next)


def _bridged(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    kind = message.metadata.message_type
    if kind == MessageType.QUERY:
        return Message(query_records(Report(client=client_identity(context))), reply_to=message)
    if not trains_or_evaluates(message):
        _check_legacy(message)
        return call_next(message, context)
    prefix = _LEGACY_INS[kind]
    identity = client_identity(context)
    names = list(message_records(message.content)[0])
    message.content = _to_legacy(message.content, prefix)
    reply = call_next(message, context)
    if not reply.has_error():
        reply.content = (
            _fit_result(reply.content, names, identity)
            if kind == MessageType.TRAIN
            else _evaluate_result(reply.content, identity)
        )
    return reply


def trains_or_evaluates(message: Message) -> bool:
    """Tell whether a message is a Message-API strategy's request to train or evaluate."""
    prefix = _LEGACY_INS.get(message.metadata.message_type)
    return prefix is not None and f"{prefix}.parameters" not in message.content.array_records


def _check_legacy(message: Message) -> None:
    """Refuse records that Flower's legacy interface would silently ignore."""
    prefix = _LEGACY_INS.get(message.metadata.message_type)
    if prefix is None:
        return
    known = {f"{prefix}.parameters", f"{prefix}.config"}
    # The record of Flower's secure aggregation may stay: its mod has already read it.
    if others := sorted(set(message.content) - known - {RECORD_KEY_CONFIGS}):
        raise OrderRefused(
            f"The message has records that are not read: {others[:3]}. Send only {sorted(known)}."
        )


def _to_legacy(content: RecordDict, prefix: str) -> RecordDict:
    arrays, config = message_records(content)
    config[NAMES] = ",".join(arrays)
    return RecordDict({f"{prefix}.parameters": arrays, f"{prefix}.config": ConfigRecord(config)})


def _fit_result(content: RecordDict, names: list[str], identity: str) -> RecordDict:
    _check_status(content, "fitres")
    metrics: dict[str, object] = dict(content.config_records["fitres.metrics"])
    record = content.array_records["fitres.parameters"]
    arrays = [to_numpy(array) for name, array in record.items() if name != "_empty"]
    examples = content.metric_records["fitres.num_examples"]["num_examples"]
    return fit_content(arrays, names, {**metrics, CLIENT: identity}, cast(int, examples))


def _evaluate_result(content: RecordDict, identity: str) -> RecordDict:
    _check_status(content, "evaluateres")
    metrics = {**content.config_records["evaluateres.metrics"], CLIENT: identity}
    loss = cast(float, content.metric_records["evaluateres.loss"]["loss"])
    examples = content.metric_records["evaluateres.num_examples"]["num_examples"]
    return evaluate_content(loss, metrics, cast(int, examples))


def _check_status(content: RecordDict, prefix: str) -> None:
    status = content.config_records[f"{prefix}.status"]
    if status["code"] != 0:
        code, reason = cast(int, status["code"]), cast(str, status["message"])
        raise FedLoRAError(f"The client answered with status {code}: {reason}")
