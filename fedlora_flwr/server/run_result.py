"""The result of a run as an object, read from the run's folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.names import full_name
from fedlora_flwr.config.recipes import load_recipe
from fedlora_flwr.errors import InvalidValue, require
from fedlora_flwr.server.run_dir import RunDirectory

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_CONFIG, _ROUNDS = "config.toml", "rounds.jsonl"


@dataclass(frozen=True, eq=False)
class RunResult:
    """The result of a run: what its folder holds, as tables and paths.

    `fedlora_flwr.simulate` returns one, and `load` reads one from a folder.

    Parameters
    ----------
    path : str or Path
        The run's folder.
    task : str, Task or callable, optional
        The task's object, or the name of one with code of its own. `model` needs it.

    Raises
    ------
    InvalidValue
        The folder holds no run.

    Examples
    --------
    >>> import tempfile
    >>> from fedlora_flwr import simulate
    >>> folder = tempfile.mkdtemp()
    >>> made = simulate("digits", num_clients=2, num_rounds=1, local_steps=1, output=folder)
    >>> result = RunResult.load(made.path)
    >>> result.rounds["round"].tolist(), len(result.clients), result.summary["status"]
    ([0, 1], 2, 'completed')
    """

    path: Path
    task: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))
        if not (self.path / _ROUNDS).is_file():
            raise InvalidValue("path", str(self.path), f"the folder of a run, with {_ROUNDS}")

    @classmethod
    def load(cls, path: str | Path, task: Any = None) -> RunResult:
        """Read the result of a run.

        Parameters
        ----------
        path : str or Path
            The run's folder, e.g. ``"runs/latest"``.
        task : str, Task or callable, optional
            The task's object if the run was given one, or its name ``"module:name"`` if it has code
            of its own. `model` needs it.

        Raises
        ------
        InvalidValue
            The folder holds no run.
        """
        return cls(Path(path).expanduser().resolve(), task)

    @property
    def config(self) -> RunConfig:
        """The run's configuration, with all keys."""
        return load_recipe(str(self.path / _CONFIG))

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What ``summary.json`` holds; empty while the run has not ended."""
        return self._folder.summary() or {}

    @cached_property
    def rounds(self) -> pd.DataFrame:
        """One row per round, round 0 (before training) included.

        A figure by part is a column of its own, such as ``agreement.A``.
        """
        return _frame(self._folder.rows("rounds"))

    @cached_property
    def clients(self) -> pd.DataFrame:
        """One row per upload: round, client, ε, steps, seconds, memory."""
        return _frame(self._folder.rows("clients"))

    @property
    def adapter(self) -> Path:
        """Folder of the last round's adapter, in PEFT's format."""
        return self._folder.adapter

    @property
    def best(self) -> Path | None:
        """Folder of the adapter that was measured best, if the run kept one."""
        return self._folder.best if self._folder.best.is_dir() else None

    def model(self, *, best: bool = False, **changes: Any) -> Any:
        """Build the base model and load the adapter onto it.

        Parameters
        ----------
        best : bool (default: False)
            Whether to take the best round's adapter instead of the last round's.
        **changes : Any
            Settings by key, such as ``device="cpu"``.

        Returns
        -------
        PeftModel
            The model in evaluation mode.

        Raises
        ------
        InvalidValue
            The run kept no best adapter, or the base model cannot be found.
        """
        from fedlora_flwr.trained.opened import opened

        folder = self.best if best else self.adapter
        if folder is None:
            raise InvalidValue("best", True, "False for a run without a folder best/")
        with opened(folder, None, self.task, changes) as found:
            return found.model

    def plot(self, output: str | Path | None = None) -> Figure:
        """Draw the run round by round, as ``fedlora plot`` does.

        Parameters
        ----------
        output : str or Path, optional
            A PNG file that is written, too.

        Returns
        -------
        Figure
            A notebook shows it.

        Raises
        ------
        InvalidValue
            No round is finished.
        """
        require("plots")
        from fedlora_flwr.plots.figures import run_name, save
        from fedlora_flwr.plots.rounds import rounds_figure

        told = self.summary
        named = ("task", "strategy", "epsilon_budget", "seed")
        run = run_name(*(told[key] for key in named)) if told.keys() >= {*named} else ""
        metric = self.summary.get("metric", "accuracy")
        figure = rounds_figure(self._folder.rounds(), metric, run)
        if output is not None:
            save(figure, Path(output))
        return figure

    def as_json(self) -> dict[str, Any]:
        """Return what ``fedlora simulate --json`` prints: the summary."""
        return self.summary

    @cached_property
    def _folder(self) -> RunDirectory:
        return RunDirectory(self.path)


def load_runs(folder: str | Path = "runs") -> pd.DataFrame:
    """Read all runs in a folder as one table.

    Parameters
    ----------
    folder : str or Path (default: "runs")
        A folder of run folders.

    Returns
    -------
    pandas.DataFrame
        One row per run in the order of their names: ``run`` (the name of its folder), the figures
        of its summary, and every key by which the configurations differ, by its full name, such as
        ``lora.rank``. A run that has not ended has the status ``"unfinished"``.

    Raises
    ------
    InvalidValue
        There is no run in the folder.

    Examples
    --------
    >>> import tempfile
    >>> from fedlora_flwr import simulate
    >>> folder, small = tempfile.mkdtemp(), {"num_clients": 2, "num_rounds": 1, "local_steps": 1}
    >>> for rank in (2, 4):
    ...     _ = simulate("digits", output=folder, rank=rank, **small)
    >>> load_runs(folder)[["status", "lora.rank"]].values.tolist()
    [['completed', 2], ['completed', 4]]
    """
    root = Path(folder).expanduser()
    paths = sorted(root.iterdir()) if root.is_dir() else []
    runs = [
        RunResult.load(path)
        for path in paths
        if not path.is_symlink() and all((path / name).is_file() for name in (_CONFIG, _ROUNDS))
    ]
    if not runs:
        raise InvalidValue("folder", str(folder), "a folder with the folders of runs")
    settings = [run.config.items() for run in runs]
    keys = dict.fromkeys(key for values in settings for key in values)
    differ = [key for key in keys if len({values.get(key) for values in settings}) > 1]
    return _frame(
        [
            {
                "run": run.path.name,
                **(run.summary or {"status": "unfinished"}),
                **{full_name(key): values.get(key) for key in differ},
            }
            for run, values in zip(runs, settings, strict=True)
        ]
    )


def _frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Return rows as a table; an entry of a mapping becomes a column."""
    require("pandas")
    import pandas as pd

    return pd.json_normalize(rows, sep=".")
