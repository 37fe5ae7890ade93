"""``fedlora_flwr.simulate``: a run on this machine in one call."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.recipes import config_file, config_of
from fedlora_flwr.errors import InvalidValue, require
from fedlora_flwr.server.given import given
from fedlora_flwr.server.rounds import RoundRow, describe_round
from fedlora_flwr.server.run_result import RunResult
from fedlora_flwr.simulations.launch import FLOWER, PROCESS, open_run
from fedlora_flwr.tasks.registry import extras_of
from fedlora_flwr.terminal import counted

if TYPE_CHECKING:
    from fedlora_flwr.data.given import Table
    from fedlora_flwr.strategies.base import FedLoRA
    from fedlora_flwr.tasks.registry import Task, TaskFactory
    from fedlora_flwr.tracking.tracker import Tracker


def simulate(
    recipe: str | Path | RunConfig | None = None,
    *,
    task: str | Task | TaskFactory | None = None,
    strategy: str | type[FedLoRA] | None = None,
    train: Table | None = None,
    test: Table | None = None,
    trackers: str | Iterable[str | Tracker | type[Tracker]] | None = None,
    resume: str | Path | None = None,
    output: str | Path = "runs",
    engine: str = PROCESS,
    workers: int | None = None,
    progress: bool | None = None,
    **changes: Any,
) -> RunResult:
    """Run a federation on this machine, as ``fedlora simulate`` and ``fedlora run`` do.

    Parameters
    ----------
    recipe : str, Path or RunConfig (default: "digits")
        A recipe's name, a TOML file, or a configuration.
    task : str, Task or callable, optional
        What is learned: a name, or an object with the members of
        `fedlora_flwr.tasks.registry.Task`, or what makes one of the settings, such as a
        `TableTask`.
    strategy : str or type, optional
        The method: a name, or a subclass of `FedLoRA`. Its settings are keys.
    train, test : DataFrame or Dataset, optional
        The private records and the public ones, instead of the files of ``dataset``.
    trackers : str or Iterable, optional
        Who records the run's figures: ``"tensorboard"``, ``"mlflow"``, ``"wandb"``, or objects
        with the methods of `fedlora_flwr.tracking.tracker.Tracker`.
    resume : str or Path, optional
        The folder of a run to continue. There is no recipe then.
    output : str or Path (default: "runs")
        Folder in which the run's folder is made.
    engine : str (default: "process")
        ``"process"``, or ``"flower"`` for Flower's simulation engine on Ray.
    workers : int, optional
        Processes that serve clients: by default this one alone, and with Ray one per core.
    progress : bool, optional
        Whether progress is shown; by default in a terminal and in a notebook.
    **changes : Any
        Keys of the configuration, such as ``epsilon=3`` or ``num_rounds=20``.

    Returns
    -------
    RunResult
        The finished run.

    Raises
    ------
    InvalidValue
        A setting cannot be used, or an object would have to travel to another process. Nothing has
        run.
    FedLoRAError
        The run could not continue. A note of the error names its log.

    Examples
    --------
    >>> import tempfile
    >>> result = simulate(
    ...     "digits", num_clients=2, num_rounds=1, local_steps=1, output=tempfile.mkdtemp()
    ... )
    >>> result.summary["status"], len(result.rounds), result.adapter.name
    ('completed', 2, 'adapter')
    """
    with ExitStack() as stack:
        changes |= given(
            stack, task=task, strategy=strategy, train=train, test=test, trackers=trackers
        )
        config = _config(recipe, resume, changes)
        extra = "simulation" if engine == FLOWER else "flwr_datasets"
        require(*extras_of(config.task), extra, "pandas")
        opened = open_run(config, Path(output), engine, workers)
        tell = stack.enter_context(counted("round", progress))

        def on_round(row: RoundRow) -> None:
            state = describe_round(row, opened.prepared.metric)
            tell(row["round"], config.num_rounds, state)

        try:
            opened.play(on_round)
        except Exception as error:
            error.add_note(f"The run's folder is {opened.run_dir.path}; its log is run.log.")
            raise
    return RunResult(opened.run_dir.path.resolve(), task)


def _config(
    recipe: str | Path | RunConfig | None, resume: str | Path | None, changes: dict[str, Any]
) -> RunConfig:
    if resume is None:
        return config_of("digits" if recipe is None else recipe, changes)
    if recipe is not None:
        raise InvalidValue("recipe", str(recipe), "no recipe with resume, which reads the run's")
    found = config_file(Path(resume))
    return replace(config_of(found, changes), resume=str(found.parent))
