"""The Flower ClientApp of this package."""

from __future__ import annotations

from functools import lru_cache, partial
from logging import INFO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Context, Message, MessageType
from flwr.client import Client
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable
from flwr.common.logger import log

from fedlora_flwr.clients.bridge import bridge, trains_or_evaluates
from fedlora_flwr.clients.device import DEVICE, Device, client_identity
from fedlora_flwr.clients.guarded import guarded
from fedlora_flwr.clients.sum_exchange import SumExchange
from fedlora_flwr.clients.sum_messages import BETWEEN, answer_between, stage_of
from fedlora_flwr.clients.sum_store import SUMS, SumStore
from fedlora_flwr.clients.warm import WarmProcess
from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.state import state_folder
from fedlora_flwr.environment import in_simulation
from fedlora_flwr.errors import OrderRefused, untold
from fedlora_flwr.processes import uncollected
from fedlora_flwr.wire.identity import Identity, acting_for, current

if TYPE_CHECKING:
    from fedlora_flwr.clients.numpy_client import LoRAClient
    from fedlora_flwr.data.records import Records
    from fedlora_flwr.tasks.registry import Task


def make_client(context: Context) -> LoRAClient:
    """Make the client of a device, or of one simulated partition.

    No record is opened here. The client opens its records after it has read the order.

    Raises
    ------
    OrderRefused
        The run config cannot be used on this device, or this SuperNode names no device's file.
    InvalidValue
        The device's file, or the run config of a simulation, cannot be used.
    """
    node = context.node_config
    identity, config = _who(context)
    device = DEVICE in node
    with uncollected():
        from fedlora_flwr.clients.local_store import LocalStore
        from fedlora_flwr.clients.numpy_client import LoRAClient
        from fedlora_flwr.clients.trainer import process_trainer
        from fedlora_flwr.privacy.ledger import opened_ledger
    with untold():
        trainer = process_trainer(config)
    folder = state_folder(config)
    # A simulated client has one of several partitions; a device has a single partition.
    partition = 0 if device else int(node["partition-id"])
    partitions = 1 if device else int(node["num-partitions"])
    return LoRAClient(
        trainer,
        partial(_private_records, trainer.task)
        if device
        else partial(trainer.task.client_records, partition, partitions),
        opened_ledger(folder),
        identity,
        str(context.run_id),
        store=LocalStore(folder / "local"),
        open_test=partial(_public_records, trainer.task) if device else None,
        exchange=_exchange(identity, config, context),
        rank=config.client_rank(partition) if config.client_ranks else None,
    )


def _who(context: Context) -> tuple[str, RunConfig]:
    """Return a client's name, and the run's configuration on this client.

    Raises
    ------
    OrderRefused, InvalidValue
        See `make_client`.
    """
    node = context.node_config
    if DEVICE in node:
        device = Device.read(Path(str(node[DEVICE])))
        return device.client, device.config(context.run_config)
    if in_simulation() and "partition-id" in node and "num-partitions" in node:
        given = ((key, type(value), value) for key, value in context.run_config.items())
        return client_identity(context), _received(tuple(given))
    raise OrderRefused(
        "This SuperNode names no device's file, without which a server would decide everything "
        "on it. Start it with --node-config 'device=\"/path/device.toml\"'."
    )


@lru_cache(maxsize=2)
def _received(given: tuple[tuple[str, type, Any], ...]) -> RunConfig:
    """Read a simulation's run config, which its clients share; ``True`` is not ``1``."""
    return RunConfig.received({key: value for key, _, value in given})


def _exchange(identity: str, config: RunConfig, context: Context) -> SumExchange:
    """Make the object that takes part in secure sums for a client; it needs no model."""
    store = SumStore(state_folder(config) / SUMS)
    return SumExchange(config, identity, str(context.run_id), store)


def _private_records(task: Task) -> Records:
    """Open a device's private records, and log on the device which are read or left out."""
    from fedlora_flwr.tasks.registry import private_reading

    records = task.client_records(0, 1)
    for line in private_reading(task):
        log(INFO, "%s", line)
    return records


def _public_records(task: Task) -> Records:
    """Open a device's public records; refuse them if any is also a private record."""
    from fedlora_flwr.tasks.registry import check_splits_apart

    check_splits_apart(task)
    return task.test_records()


def client_fn(context: Context) -> Client:
    """Make the client for Flower's legacy interface."""
    return make_client(context).to_client()


def _direct(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Answer a Message-API strategy directly, without Flower's legacy records."""
    if stage_of(message) in BETWEEN:
        return answer_between(
            lambda: _exchange(*_who(context), context), message, client_identity(context)
        )
    if trains_or_evaluates(message):
        # torch is imported only here, so that a query, or a process that passes messages on to a
        # warm process, need not wait for it.
        with uncollected():
            from fedlora_flwr.clients.handler import answer_message

        return answer_message(partial(make_client, context), message, client_identity(context))
    return call_next(message, context)


def _warm(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Pass the message to the device's warm process, if its file asks for one."""
    if DEVICE in context.node_config and message.metadata.message_type != MessageType.QUERY:
        file = Path(str(context.node_config[DEVICE]))
        if (device := Device.read(file)).keep_warm:
            return _ask(device, file, message, context)
    return call_next(message, context)


def _ask(device: Device, file: Path, message: Message, context: Context) -> Message:
    process = WarmProcess.of(device, file)
    return process.call(_respond_here, current(), message, context)


def _respond_here(identity: Identity, message: Message, context: Context) -> Message:
    # Our clients keep all state on the disk and none in the context, so a copy of it is enough.
    with acting_for(*identity):
        return _app_here(message, context)


def _guarded(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Send only errors that a server may read; the text of any other error stays here."""
    return guarded(call_next, message, context)


_app_here = ClientApp(client_fn, mods=[_guarded, _direct, bridge])
app = ClientApp(client_fn, mods=[_guarded, _warm, _direct, bridge])


def respond(message: Message, context: Context) -> Message:
    """Answer as `app` does, but as a module-level function that other processes can import."""
    return app(message, context)
