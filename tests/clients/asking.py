"""One real client on a grid of its own, asked without a strategy."""

from __future__ import annotations

from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.run import Run

from fedlora_flwr.client_app import app
from fedlora_flwr.clients.trainer import LocalTrainer, process_trainer
from fedlora_flwr.config import RunConfig
from fedlora_flwr.simulations.local_grid import LocalGrid
from fedlora_flwr.strategies.replies import to_record


class Asker:
    """A grid that stays, so that all messages belong to one run."""

    def __init__(
        self, config: RunConfig, client_app: ClientApp = app, run_id: int | None = None
    ) -> None:
        self.config = config
        self.adapted = process_trainer(config).adapted
        self.start = LocalTrainer.build(config).adapted.read()
        self.grid = LocalGrid(client_app, config.num_clients, config.items())
        if run_id is not None:
            self.grid.set_run(Run.create_empty(run_id))
        self.node = self._first()

    def message(self, message_type: str = "train", **settings: Any) -> Message:
        """Ask partition 0; settings are keys of the message's config with underscores."""
        keys = {key.replace("_", "-"): value for key, value in settings.items()}
        content = RecordDict({"arrays": to_record(self.start), "config": ConfigRecord(keys)})
        with self.grid.running():
            (reply,) = self.grid.send_and_receive([Message(content, self.node, message_type)])
        return reply

    def _first(self) -> int:
        with self.grid.running():
            queries = [Message(RecordDict(), node, "query") for node in self.grid.get_node_ids()]
            clients = {
                str(reply.content.config_records["config"]["client"]): reply.metadata.src_node_id
                for reply in self.grid.send_and_receive(queries)
            }
        return clients["partition-000000"]

    def train(self, plan: str = "B", server_round: int = 1, **settings: Any) -> RecordDict:
        """Ask for one round as our strategies do, and fail if the client does."""
        reply = self.message(plan=plan, server_round=server_round, **settings)
        if reply.has_error():
            raise RuntimeError(reply.error.reason)
        return reply.content

    def error(self, message_type: str = "train", **settings: Any) -> str:
        """Ask for one round that the client must refuse, and return its reason."""
        reply = self.message(message_type, **settings)
        assert reply.has_error()
        return str(reply.error.reason)
