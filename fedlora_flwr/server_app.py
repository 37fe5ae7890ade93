"""The Flower ServerApp of this package."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.settled import check_counted, check_settled
from fedlora_flwr.errors import require
from fedlora_flwr.files import SERVER_STATE, data_folder
from fedlora_flwr.flower_internals import InMemoryGrid
from fedlora_flwr.processes import uncollected
from fedlora_flwr.server.certificates import Certificates
from fedlora_flwr.server.endings import recorded
from fedlora_flwr.server.ray_workers import LastingWorkers
from fedlora_flwr.server.run_dir import CLAIM, NOISE, REPORT, RunDirectory, has_begun
from fedlora_flwr.server.shared_folder import SharedFolder
from fedlora_flwr.server.watched_grid import WatchedGrid
from fedlora_flwr.tasks.registry import extras_of

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Serve one run; write results to ``run-dir``, or to a new folder in the data folder."""
    config = RunConfig.of(context.run_config)
    check_counted(config)
    check_settled(config)  # Clients have the run's configuration from Flower, not from here.
    # The server builds the model to evaluate it, so torch must be there; it is imported only now.
    require(*extras_of(config.task))
    with uncollected():
        from fedlora_flwr.server.serve import run_federation

    run_dir = folder_of(config)
    print(f"Results: {run_dir.path}", flush=True)
    # A simulation has no such folder: its nodes have no keys, and it chooses their names itself.
    state = os.environ.get(SERVER_STATE)
    identities = Path(state) / "identities.json" if state else None
    certificates = Certificates(Path(state), config.num_rounds) if state else None
    if certificates:
        certificates.at_start()
    with recorded(run_dir, config), ExitStack() as stack:
        noise = float(os.environ[NOISE]) if NOISE in os.environ else None
        after_round = certificates.after_round if certificates else None
        if isinstance(grid, InMemoryGrid):  # The grid of Flower's simulations, which run on Ray.
            shared = stack.enter_context(SharedFolder(config.state_dir))
            stack.enter_context(LastingWorkers(shared.seen_by).serving())
            after_round = shared.after_round
        run_federation(
            WatchedGrid(grid, identities),
            config,
            run_dir,
            after_round,
            largest_noise=noise,
        )
    if (report := run_dir.path / REPORT).exists():
        print(f"Report: {report}", flush=True)


def folder_of(config: RunConfig) -> RunDirectory:
    """Return the folder of a run's results: one that it continues in, or one that it begins in."""
    claim, begun = os.environ.get(CLAIM, ""), has_begun(Path(config.resume))
    # An operator who starts a run again cannot know whether it had begun on the server.
    if config.resume and (begun or config.resume != config.run_dir):
        return RunDirectory(Path(config.resume), claim, resume=True)
    if config.run_dir:
        return RunDirectory(Path(config.run_dir), claim)
    return RunDirectory.new(data_folder() / "runs", config)
