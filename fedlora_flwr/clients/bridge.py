"""Lets a Flower NumPyClient serve Message-API strategies, with array names and partial uploads.

Flower's own translation expects legacy records and drops the names of arrays. This client mod
translates both ways: names travel in the config and in the metrics under ``array-names``. It also
decides which errors a server may read.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from logging import ERROR
from pathlib import Path
from typing import Any, TypeVar, cast

from flwr.app import (
    ArrayRecord,
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
from fedlora_flwr.environment import in_simulation
from fedlora_flwr.errors import (
    BudgetExhausted,
    ClientFailed,
    FedLoRAError,
    InvalidValue,
    OrderRefused,
)
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
        and, under ``client``, who it is.

    Raises
    ------
    OrderRefused, BudgetExhausted, ClientFailed
        See `guarded`.
    """
    return guarded(_bridged, message, context, call_next)


def _bridged(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    kind = message.metadata.message_type
    if kind == MessageType.QUERY:
        return Message(query_records(Report(client=client_identity(context))), reply_to=message)
    if not trains_or_evaluates(message):
        return call_next(message, context)
    prefix = _LEGACY_INS[kind]
    identity = client_identity(context)
    names = list(_only(message.content.array_records, "ArrayRecord"))
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
    """Tell whether a Message-API strategy sends such a message to train or evaluate."""
    prefix = _LEGACY_INS.get(message.metadata.message_type)
    return prefix is not None and f"{prefix}.parameters" not in message.content.array_records


def answer(
    client: NumPyClient | Callable[[], NumPyClient], message: Message, identity: str
) -> Message:
    """Serve a train or evaluate message with a NumPyClient, past Flower's legacy records.

    The reply is that of `bridge`, at a fraction of its time: `bridge` hands arrays on through
    Flower's own translation, which reads and writes every one of them twice more.

    Parameters
    ----------
    client : NumPyClient or callable
        Serves the message; or what makes it, once the message can be read.
    message : Message
        What a Message-API strategy sent.
    identity : str
        Who the client is (see `client_identity`).

    Raises
    ------
    OrderRefused
        The message does not hold one ArrayRecord and one ConfigRecord, or an array is broken.
    OrderRefused, BudgetExhausted, ClientFailed
        See `guarded`.
    """
    return guarded(_answered, client, message, identity)


def _answered(
    client: NumPyClient | Callable[[], NumPyClient], message: Message, identity: str
) -> Message:
    arrays, config = _read(message.content)
    if NAMES in config:
        raise OrderRefused(f"The message's configuration has {NAMES!r}; its arrays have names.")
    config[NAMES] = ",".join(arrays)
    try:
        values: NDArrays = [to_numpy(array) for array in arrays.values()]
    except Exception as error:  # NumPy's reader raises errors of many types.
        raise OrderRefused("An array of the message cannot be read: it is damaged.") from error
    scalars = cast(dict[str, Scalar], config)
    if not isinstance(client, NumPyClient):
        client = client()
    if message.metadata.message_type == MessageType.TRAIN:
        trained, examples, metrics = client.fit(values, scalars)
        content = fit_content(trained, arrays, {**metrics, CLIENT: identity}, examples)
    else:
        loss, examples, metrics = client.evaluate(values, scalars)
        content = evaluate_content(loss, {**metrics, CLIENT: identity}, examples)
    return Message(content, reply_to=message)


def guarded(call: Callable[..., T], *args: object) -> T:
    """Call a function, and let out only errors that a server may read.

    Flower sends an exception's text to the server, and the text of a library or of ours may hold a
    record. So this is a list of what may travel. Everything else becomes one fixed sentence with a
    random number, which stands beside the whole error in the client's own log. In a simulation
    server and client are one machine, and errors of this package are told in full.

    Raises
    ------
    OrderRefused
        As raised: it says what is wrong with the message, and no record was opened.
    BudgetExhausted
        With a fixed text.
    ClientFailed
        In place of every other error.
    """
    try:
        return call(*args)
    except (OrderRefused, ClientFailed):
        raise
    except BudgetExhausted as error:
        if in_simulation():
            raise
        log(ERROR, "%s", error)
        raise BudgetExhausted("budget exhausted: this client takes no further part") from None
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # A panic of a library in Rust is no Exception, and quotes text.
        number = secrets.token_hex(4)
        log(ERROR, "The client failed (error %s).", number, exc_info=error)
        if in_simulation():
            if isinstance(error, FedLoRAError):
                raise
            kind = type(error).__name__
            raise ClientFailed(f"{kind} on the client; its own log says more") from None
        raise ClientFailed(
            f"The client could not do what was asked (error {number}). Its own log says why."
        ) from None


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
    arrays, config = _read(content)
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
        raise FedLoRAError(f"the client answered with status {code}: {reason}")


def _read(content: RecordDict) -> tuple[ArrayRecord, dict[str, Any]]:
    """Return the two records that a message has; a third would be ignored without a word."""
    arrays = _only(content.array_records, "ArrayRecord")
    config = dict(_only(content.config_records, "ConfigRecord"))
    if count := len(content.metric_records):
        raise OrderRefused(f"The message has {count} MetricRecords, which nobody reads. Send none.")
    return arrays, config


def _only(records: Mapping[str, T], kind: str) -> T:
    if len(records) != 1:
        raise OrderRefused(f"The message has {len(records)} {kind}s. Send exactly one.")
    return next(iter(records.values()))
