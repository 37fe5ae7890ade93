"""Launch a run: on Flower's simulation engine, or in this process."""

from __future__ import annotations

import math
import os
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import FedLoRAError, InvalidValue
from fedlora_flwr.files import private_folder
from fedlora_flwr.forecast.forecast import numbers_per_step, open_splits, skeleton
from fedlora_flwr.forecast.placement import Placement, place
from fedlora_flwr.forecast.precision import settled
from fedlora_flwr.lora.adapters import AdaptedModel
from fedlora_flwr.lora.build import build_adapted
from fedlora_flwr.lora.started import read_adapter
from fedlora_flwr.privacy.calibration import Mechanisms
from fedlora_flwr.processes.workers import Execute, executor, one_by_one
from fedlora_flwr.secure_sum.grid import Grid
from fedlora_flwr.server.endings import COMPLETED, UNTOLD, untold
from fedlora_flwr.server.norm_bound import check_known
from fedlora_flwr.server.rehearsal import check_folding, is_large, rehearse
from fedlora_flwr.server.rounds import OnRound
from fedlora_flwr.server.run_dir import CLAIM, NOISE, RunDirectory
from fedlora_flwr.server.serve import run_federation
from fedlora_flwr.server.strategy import build_strategy
from fedlora_flwr.server.sum_step import sum_grid
from fedlora_flwr.simulations.app import write_app
from fedlora_flwr.simulations.superlink import LOCAL, SimulationSuperLink
from fedlora_flwr.strategies.cohort import cohort_size
from fedlora_flwr.tasks.registry import build_task, client_sizes, model_notes, optional

# Seconds between two questions to Flower, before a run has its summary and afterward.
STATUS_INTERVAL, ENDED_INTERVAL = 5.0, 0.5


class RunFailed(FedLoRAError):
    """A run ended without a result."""


@dataclass
class PreparedRun:
    """A checked run that has not started.

    Parameters
    ----------
    config : RunConfig
        The resolved configuration.
    mechanisms : Mechanisms
        Each client's mechanism. Making one checks that the client can keep its promise.
    parameters : int
        Parameters of the backbone.
    trained : int
        Parameters of the adapters, and of the head if it trains.
    per_step : int
        Those of them that one step trains, the mean over two rounds.
    metric : str (default: "accuracy")
        The figure to show.
    head : bool (default: True)
        Whether a head trains beside the adapters.
    records : list[str] (default: [])
        Sentences about the records that are read and left out.
    model : AdaptedModel or None
        The model at its start, which has been rehearsed, for the run that takes it.
    notes : list[str] (default: [])
        Sentences on the model that may not be what is meant.
    grid : Grid or None
        Under a secure sum, the grid of each round.
    precision : str (default: "")
        Which precision was chosen and why, if the run left it open.
    largest_noise : float (default: inf)
        Largest noise multiplier of a client; infinity if it is not known.
    """

    config: RunConfig
    mechanisms: Mechanisms
    parameters: int
    trained: int
    per_step: int
    metric: str = "accuracy"
    head: bool = True
    records: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    grid: Grid | None = None
    precision: str = ""
    largest_noise: float = math.inf
    model: AdaptedModel | None = field(default=None, repr=False)

    def take_model(self) -> AdaptedModel | None:
        """Return the model at the first call, then None: a run changes it, so others build one."""
        model, self.model = self.model, None
        return model


def prepare_run(config: RunConfig, console: Console | None = None) -> PreparedRun:
    """Check everything that can be known before a run, and work out each client's noise.

    If a model has more than 200 million parameters and the task can do so, only its shapes are
    built. Its weights are read when the run needs them, and rehearsed before the first round.

    Parameters
    ----------
    config : RunConfig
        The run.
    console : Console, optional
        Shows progress if it is a terminal.

    Raises
    ------
    InvalidValue
        A setting cannot be used, or a client could not keep its promise.
    PrivacyViolation, ModelFailed
        The model cannot train (see `fedlora_flwr.server.rehearsal`).
    """
    strategy = build_strategy(config)
    task = build_task(config.task, config)
    config, precision = settled(config, task)
    bare = skeleton(config, task) if optional(task, "skeleton") else None
    read, _ = open_splits(task, config.num_clients)
    sizes = client_sizes(config, task)
    large = bare is not None and is_large(bare)
    adapted = bare if bare is not None and large else build_adapted(config, task)
    # A method may refuse a model, e.g. one whose blocks have no name.
    per_step = numbers_per_step(config, strategy, adapted)
    check_folding(config, strategy, adapted)
    if config.start and not large and not config.resume:
        read_adapter(Path(config.start), adapted)
    if not large:
        rehearse(config, task, adapted)
    progress = partial(
        track,
        description="Calibrating each client's noise",
        console=console,
        transient=True,
        disable=console is None or not console.is_terminal,
    )
    trained = sum(parameter.numel() for parameter in adapted.parameters.values())
    grid = sum_grid(config, int(sizes.sum()), trained) if config.secure_sum else None
    mechanisms = Mechanisms.calibrated(config, sizes, progress)
    prepared_noise = _largest_noise(config, mechanisms)
    check_known(replace(config, largest_noise=prepared_noise))
    asked = cohort_size(config.num_clients, config.fraction_train)
    strategy.robust.check_cohort(asked, strategy.needs_each_upload)
    return PreparedRun(
        config=config,
        mechanisms=mechanisms,
        largest_noise=prepared_noise,
        parameters=sum(parameter.numel() for parameter in adapted.model.parameters()) - trained,
        trained=trained,
        per_step=round(float(np.mean(per_step))),
        metric=task.metric,
        head=bool(adapted.head),
        records=read,
        notes=model_notes(task),
        model=None if large else adapted,
        grid=grid,
        precision=precision,
    )


def _largest_noise(config: RunConfig, mechanisms: Mechanisms) -> float:
    """Return the largest noise multiplier of an honest client, as far as it is known before a run.

    If budgets last over all runs, earlier runs may have fixed more noise than this run needs.
    """
    if config.ledger_scope != "run":
        return config.largest_noise
    return max(made.noise_multiplier for made in mechanisms.of_size.values())


def run_on_flower(
    prepared: PreparedRun, run_dir: RunDirectory, on_round: OnRound, workers: int | None = None
) -> dict[str, Any]:
    """Run with ``flwr run`` on Flower's Ray simulation engine.

    Parameters
    ----------
    prepared : PreparedRun
        The checked run. An empty ``run-dir`` or ``state-dir`` becomes the run directory.
    run_dir : RunDirectory
        The directory of results and the log.
    on_round : callable
        Called with each row of ``rounds.jsonl``.
    workers : int, optional
        Ray workers. By default as many as the cores carry and the GPUs have room for.

    Returns
    -------
    dict[str, Any]
        The summary.

    Raises
    ------
    InvalidValue
        ``workers`` is given although a cluster's own CPUs decide the number.
    RunFailed
        Flower reports anything but a completed run.
    """
    prepared.take_model()  # Free its memory: the server, in another process, has its own model.
    cluster = os.environ.get("RAY_ADDRESS", LOCAL) != LOCAL
    if workers is not None and cluster:
        raise InvalidValue("workers", workers, "no value while RAY_ADDRESS names a cluster")
    config, placement = _placed(prepared.config, run_dir), place(prepared.config, workers)
    if cluster:  # Ray accepts no number of CPUs for a cluster that already runs.
        placement = replace(placement, workers=None)
    # The user's own code is imported from the folder in which the command runs.
    own = ":" in config.task + config.strategy + config.trackers
    modules = Path.cwd() if own else None
    run_dir.take()
    # These stay out of the recipe, which may also be run on real devices.
    claim = {CLAIM: run_dir.claim, NOISE: repr(prepared.largest_noise)}
    with (
        run_dir.log.open("a", encoding="utf-8") as log,
        SimulationSuperLink(log, config.client_threads, modules, claim) as superlink,
    ):
        placed = superlink.file("run.toml", config.to_toml())
        superlink.submit(app_folder(run_dir, config), placed, _federation(config, placement))
        _follow(superlink, run_dir, on_round)
    summary = run_dir.summary()
    if summary is None or summary["status"] != COMPLETED:
        raise RunFailed(f"The run failed: {_reason(run_dir)}")
    return summary


def run_in_process(
    prepared: PreparedRun, run_dir: RunDirectory, on_round: OnRound, workers: int = 1
) -> dict[str, Any]:
    """Run the same recipe without Ray or a server. Same seed, same arrays.

    Parameters
    ----------
    prepared, run_dir, on_round
        As for `run_on_flower`. The run takes the prepared model; a second run builds its own.
    workers : int (default: 1)
        Processes that serve clients; 1 means only this one.

    Raises
    ------
    InvalidValue
        The clients do not fit on the GPU.
    FedLoRAError
        The run could not continue.
    """
    from fedlora_flwr.client_app import respond
    from fedlora_flwr.simulations.local_grid import LocalGrid

    config = _placed(prepared.config, run_dir)
    place(config, workers)
    run_dir.take()
    execute: Execute = one_by_one
    with ExitStack() as stack:
        if workers == 1:
            config = replace(config, share_weights=False)
        else:
            execute = stack.enter_context(executor(workers, run_dir.log))
        grid = LocalGrid(respond, config.num_clients, config.items(), execute)
        stack.enter_context(grid.running())
        model, noise = prepared.take_model(), prepared.largest_noise
        return run_federation(grid, config, run_dir, on_round, adapted=model, largest_noise=noise)


def app_folder(run_dir: RunDirectory, config: RunConfig) -> Path:
    """Return the folder of the Flower app, beside the results; its bundle holds no code.

    A repository is an app, too. But Flower looks at each file in it, those of the environment
    included, and each process would compile the bundle's copy of this package.
    """
    folder = run_dir.path / "app"
    write_app(folder, dict(config.own))
    return folder


def _placed(config: RunConfig, run_dir: RunDirectory) -> RunConfig:
    """Put results and ledger in the run directory, and wait for all simulated clients."""
    folder = str(run_dir.path.resolve())
    if config.state_dir:  # Fail now rather than on each client in the first round.
        private_folder(Path(config.state_dir))
    return replace(
        config,
        run_dir=config.run_dir or folder,
        state_dir=config.state_dir or folder,
        min_clients=config.num_clients,
    )


def _federation(config: RunConfig, placement: Placement) -> str:
    text = f"num-supernodes={config.num_clients} client-resources-num-cpus={config.client_threads}"
    if placement.workers is not None:
        text += f" init-args-num-cpus={placement.workers * config.client_threads}"
    if placement.gpu_share:
        text += f" client-resources-num-gpus={placement.gpu_share}"
    return text


def _follow(superlink: SimulationSuperLink, run_dir: RunDirectory, on_round: OnRound) -> None:
    """Report rounds as they end, until Flower says that the run has ended."""
    # If a run continues, only its new rounds are reported.
    seen, asked = len(run_dir.rounds()) if run_dir.resume else 0, time.monotonic()
    while True:
        rows = run_dir.rounds()
        for row in rows[seen:]:
            on_round(row)
        seen = len(rows)
        ended = superlink.log_ended or run_dir.summary_file.exists()
        interval = ENDED_INTERVAL if ended else STATUS_INTERVAL
        if time.monotonic() - asked > interval:
            # `flwr run` exits with 0 even if the run fails; only the status tells.
            status = superlink.status()
            asked = time.monotonic()
            if status == "finished:completed":
                return
            if status.startswith("finished"):
                raise RunFailed(f"Flower reports {status}: {_reason(run_dir)}")
        time.sleep(0.2)


def _reason(run_dir: RunDirectory) -> str:
    """Return why a run failed: the error in its summary, or else the last error in the log."""
    summary = run_dir.summary()
    if summary is not None and not untold(summary):
        return str(summary["error"])
    lines = run_dir.log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line.strip() for line in lines if "Error" in line or "ERROR" in line]
    return errors[-1] if errors else UNTOLD
