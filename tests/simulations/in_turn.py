"""An app that serves several runs in turn on one set of Ray workers.

What takes long in a run is to start Flower, Ray and workers. Server and clients are the package's
own. Each message names its run's recipe, as the run config of a run of its own would be.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable
from flwr.serverapp import Grid, ServerApp

from fedlora_flwr.client_app import client_fn, respond
from fedlora_flwr.config import RunConfig, read_toml
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.server.serve import run_federation
from fedlora_flwr.server.watched_grid import WatchedGrid

RECIPES = "recipes"
"""Key of the run config: the recipes' files, in order, as JSON."""
_OF = "of"


class OneOfSeveral(WatchedGrid):
    """A grid whose messages say which recipe they belong to."""

    def __init__(self, grid: Grid, recipe: str) -> None:
        super().__init__(grid)
        self._recipe = ConfigRecord({"recipe": recipe})

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages with the recipe's name."""
        named = list(messages)
        for message in named:
            message.content = RecordDict({**message.content, _OF: self._recipe})
        return super().send_and_receive(named, timeout=timeout)


def as_its_own_run(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Let the package's client answer as in the run that the message belongs to."""
    recipe = str(message.content.config_records[_OF]["recipe"])
    message.content = RecordDict({k: v for k, v in message.content.items() if k != _OF})
    config = RunConfig.of(read_toml(Path(recipe)))
    own = Context(
        context.run_id, context.node_id, context.node_config, context.state, config.items()
    )
    return respond(message, own)


client = ClientApp(client_fn, mods=[as_its_own_run])
server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Serve one run after the other."""
    for recipe in json.loads(str(context.run_config[RECIPES])):
        config = RunConfig.of(read_toml(Path(recipe)))
        run_federation(OneOfSeveral(grid, recipe), config, RunDirectory(Path(config.run_dir)))


def write_app(folder: Path) -> Path:
    """Write the app that names this module."""
    folder.mkdir()
    (folder / "pyproject.toml").write_text(
        '[project]\nname = "in-turn"\nversion = "0.1.0"\nlicense = "Apache-2.0"\n'
        'dependencies = []\n[tool.flwr.app]\npublisher = "tests"\n[tool.flwr.app.components]\n'
        f'serverapp = "{__name__}:server"\nclientapp = "{__name__}:client"\n'
        f'[tool.flwr.app.config]\n{RECIPES} = ""\n'
    )
    return folder
