"""The Flower ServerApp of this package."""

from __future__ import annotations

import os
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import require
from fedlora_flwr.files import SERVER_STATE, data_folder
from fedlora_flwr.processes import uncollected
from fedlora_flwr.server.endings import recorded
from fedlora_flwr.server.run_dir import CLAIM, NOISE, RunDirectory
from fedlora_flwr.server.watched_grid import WatchedGrid
from fedlora_flwr.tasks.registry import extras_of

with uncollected():
    pass

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Serve one run; write results to ``run-dir``, or to a new folder in the data folder."""
    config = RunConfig.of(context.run_config)
    # The server builds the model to evaluate it, so torch must be there; it is imported only now.
    require(*extras_of(config.task))
    from fedlora_flwr.server.serve import run_federation

    claim = os.environ.get(CLAIM, "")
    if config.resume:
        run_dir = RunDirectory(Path(config.resume), claim, resume=True)
    elif config.run_dir:
        run_dir = RunDirectory(Path(config.run_dir), claim)
    else:
        run_dir = RunDirectory.new(data_folder() / "runs", config)
    print(f"Results: {run_dir.path}", flush=True)
    # A simulation has no such folder: its nodes have no keys, and it chooses their names itself.
    state = os.environ.get(SERVER_STATE)
    identities = Path(state) / "identities.json" if state else None
    with recorded(run_dir, config):
        noise = float(os.environ[NOISE]) if NOISE in os.environ else None
        run_federation(WatchedGrid(grid, identities), config, run_dir, largest_noise=noise)
