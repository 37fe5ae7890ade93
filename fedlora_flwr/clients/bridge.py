"""Lets a Flower NumPyClient serve Message-API strategies, with array names and partial uploads.

Flower's own translation expects legacy records and drops the names of arrays. This client mod
translates both ways: names travel in the config and in the metrics under ``array-names``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from logging import ERROR
from pathlib import Path
from typing import TypeVar, cast

from flwr.app import (
    ConfigRecord,
    Context,
    Message,
    MessageType,
    RecordDict,
)
from flwr.client import NumPyClient
from flwr.clientapp.typing import ClientAppCallable
from flwr.common import NDArrays, Scalar
from flwr.common.logger import log

from fedlora_flwr.arrays import to_numpy
from fedlora_flwr.clients.device import DEVICE, Device
from fedlora_flwr.errors import ClientFailed, FedLoRAError, InvalidValue
from fedlora_flwr.wire import CLIENT, NAMES, partition_name
from fedlora_flwr.wire.records import evaluate_content, fit_content, query_records
from fedlora_flwr.wire.report import Report

S = TypeVar("S")
T = TypeVar("T")
U = TypeVar("U")

_LEGACY_INS = {MessageType.TRAIN: "fitins", MessageType.EVALUATE: "evaluateins"}


def bridge(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Translate between Message-API records and those of a NumPyClient.

    Messages of a legacy server pass through unchanged. A query is answered here, with who the
    client is.

    Parameters
    ----------
    message : Message
        What the server sent.
    context : Context
        The client's context; its node config tells who it is.
    call_next : callable
        The client.

    Returns
    -------
    Message
        The reply: one ArrayRecord with the names that the client gave, one MetricRecord with the
        numbers among its metrics and ``num-examples``, one ConfigRecord with the texts among them
        and, under ``client``, who it is. Scores of blocks are a list of numbers in the former.
    """
    kind = message.metadata.message_type
    if kind == MessageType.QUERY:
        return Message(query_records(Report(client=client_identity(context))), reply_to=message)
    if not trains_or_evaluates(message):
        return guarded(call_next, message, context)
    prefix = _LEGACY_INS[kind]
    identity = client_identity(context)
    names = list(_only(message.content.array_records, "ArrayRecord"))
    message.content = _to_legacy(message.content, prefix)
    reply = guarded(call_next, message, context)
    if not reply.has_error():
        reply.content = (
            _fit_result(reply.content, names, identity)
            if kind == MessageType.TRAIN
            else _evaluate_result(reply.content, identity)
        )
    return reply


def trains_or_evaluates(message: Message) -> bool:
    """Tell whether a Message-API strategy sends such a message to train or evaluate."""
    prefix = _LEGACY_INS.get(message.metadata.message_type)
    return prefix is not None and f"{prefix}.parameters" not in message.content.array_records


def answer(client: NumPyClient, message: Message, identity: str) -> Message:
    """Serve a train or evaluate message with a NumPyClient, past Flower's legacy records.

    The reply is that of `bridge`, at a fraction of its time: `bridge` hands arrays on through
    Flower's own translation, which reads and writes every one of them twice more.

    Parameters
    ----------
    client : NumPyClient
        Serves the message.
    message : Message
        What a Message-API strategy sent.
    identity : str
        Who the client is (see `client_identity`).
    """
    arrays = _only(message.content.array_records, "ArrayRecord")
    config = dict(_only(message.content.config_records, "ConfigRecord"))
    config[NAMES] = ",".join(arrays)
    values: NDArrays = [to_numpy(array) for array in arrays.values()]
    scalars = cast(dict[str, Scalar], config)
    if message.metadata.message_type == MessageType.TRAIN:
        trained, examples, metrics = guarded(client.fit, values, scalars)
        content = fit_content(trained, arrays, {**metrics, CLIENT: identity}, examples)
    else:
        loss, examples, metrics = guarded(client.evaluate, values, scalars)
        content = evaluate_content(loss, {**metrics, CLIENT: identity}, examples)
    return Message(content, reply_to=message)


def guarded(call: Callable[[S, U], T], first: S, second: U) -> T:
    """Keep what a library says about private records off the wire; its kind is enough.

    Flower sends an exception's text to the server.
    """
    try:
        return call(first, second)
    except FedLoRAError:
        raise
    except Exception as error:
        log(ERROR, "The client failed.", exc_info=error)
        raise ClientFailed(f"{type(error).__name__} on the client; its own log says more") from None


def client_identity(context: Context) -> str:
    """Return the stable identity of a client: a device's, ``client-id``, or its partition's number.

    Raises
    ------
    InvalidValue
        The node config has none of them, or a device's file cannot be used.
    """
    config = context.node_config
    if DEVICE in config:
        return Device.read(Path(str(config[DEVICE]))).client
    if "client-id" in config:
        return str(config["client-id"])
    if "partition-id" in config:
        return partition_name(int(config["partition-id"]))
    raise InvalidValue("node config", dict(config), "'device', 'client-id' or 'partition-id'")


def _to_legacy(content: RecordDict, prefix: str) -> RecordDict:
    arrays = _only(content.array_records, "ArrayRecord")
    config = ConfigRecord(dict(_only(content.config_records, "ConfigRecord")))
    config[NAMES] = ",".join(arrays)
    return RecordDict({f"{prefix}.parameters": arrays, f"{prefix}.config": config})


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
        raise ClientFailed(f"the client answered with status {code}: {reason}")


def _only(records: Mapping[str, T], kind: str) -> T:
    if len(records) != 1:
        raise InvalidValue(f"number of {kind}s in a message", len(records), "1")
    return next(iter(records.values()))
