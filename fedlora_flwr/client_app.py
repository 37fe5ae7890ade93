"""The repository's Flower ClientApp."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.client import Client
from flwr.clientapp import ClientApp

from fedlora_flwr.clients.bridge import bridge, client_identity
from fedlora_flwr.clients.numpy_client import LoRAClient
from fedlora_flwr.clients.trainer import process_trainer
from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.files import data_folder
from fedlora_flwr.privacy.ledger import Ledger


def client_fn(context: Context) -> Client:
    """Make the client of one simulated partition.

    Raises
    ------
    InvalidValue
        The run config cannot be used, or the node config names no partition.
    """
    config = RunConfig.of(context.run_config)
    node = context.node_config
    if "partition-id" not in node or "num-partitions" not in node:
        raise InvalidValue("node config", dict(node), "'partition-id' and 'num-partitions'")
    trainer = process_trainer(config)
    records = trainer.task.client_records(int(node["partition-id"]), int(node["num-partitions"]))
    client = LoRAClient(
        trainer, records, Ledger(ledger_path(config)), client_identity(context), str(context.run_id)
    )
    return client.to_client()


def ledger_path(config: RunConfig) -> Path:
    """Return the ledger's file: in ``state-dir``, or in the user's data folder."""
    return (Path(config.state_dir) if config.state_dir else data_folder()) / "ledger.sqlite"


app = ClientApp(client_fn, mods=[bridge])
