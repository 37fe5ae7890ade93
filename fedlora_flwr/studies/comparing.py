"""``fedlora_flwr.compare``: a comparison of strategies in one call."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.followed import COMPARISON, followed
from fedlora_flwr.config.names import key_named
from fedlora_flwr.config.recipes import config_of
from fedlora_flwr.errors import InvalidValue, require, unknown
from fedlora_flwr.processes.workers import kept_log
from fedlora_flwr.server.given import check_alone, given
from fedlora_flwr.strategies import STRATEGIES, strategy_class
from fedlora_flwr.studies.baseline_names import AUTO
from fedlora_flwr.studies.baselines import Chosen, with_baselines
from fedlora_flwr.studies.compare import OnRow, run_comparison
from fedlora_flwr.studies.compare_methods import read_methods
from fedlora_flwr.studies.compare_results import describe_row, read_rows
from fedlora_flwr.studies.compare_tables import Part, as_json, document_of
from fedlora_flwr.studies.comparison import Comparison
from fedlora_flwr.studies.metric import metric_of
from fedlora_flwr.studies.paired import Findings
from fedlora_flwr.studies.sampler_names import HALTON, OPTUNA, SAMPLERS
from fedlora_flwr.tasks.registry import build_task, extras_of
from fedlora_flwr.terminal import counted

if TYPE_CHECKING:
    import pandas as pd

    from fedlora_flwr.data.given import Table
    from fedlora_flwr.tasks.registry import Task, TaskFactory

_OWN = ("epsilon", "seed")
"""Keys that a comparison sets itself, beside the strategy."""


@dataclass(frozen=True, eq=False)
class Compared:
    """The results of a comparison.

    Parameters
    ----------
    comparison : Comparison
        What was compared.
    folder : Path
        ``rows.csv``, ``table.md``, ``table.tex``, ``accuracy.png``, ``settings.json`` and
        ``progress.json``.
    table : pandas.DataFrame
        One row per method and ε: mean and standard deviation of the final metric over the seeds,
        failed runs, bytes, and the learning rates.
    metric : str
        Name of the figure.
    findings : Findings
        Differences between rows, paired by seed, with their intervals.
    baselines : Chosen
        The baselines, and how many runs they added.

    Examples
    --------
    >>> import pandas as pd
    >>> table = pd.DataFrame({"row": ["rolora"], "epsilon": [8.0], "mean": [0.9]})
    >>> nothing = Comparison(RunConfig(), (), (8.0,), seeds=1, trials=0)
    >>> about = Findings("rolora"), Chosen((), named=1, added=0)
    >>> Compared(nothing, Path("runs"), table, "accuracy", *about).table["mean"].tolist()
    [0.9]
    """

    comparison: Comparison
    folder: Path
    table: pd.DataFrame
    metric: str
    findings: Findings
    baselines: Chosen

    @property
    def runs(self) -> pd.DataFrame:
        """One row per run, tuning included. An ``error`` says why a run failed."""
        return read_rows(self.folder / "rows.csv")

    @property
    def failed(self) -> int:
        """Runs that failed. The same call tries them again."""
        return int((self.runs["error"] != "").sum())

    def document(self) -> list[Part]:
        """Return the report of ``table.md``: sentences and tables."""
        what = self.comparison
        about = what.config, self.metric, what.trials, self.findings, what.sampler
        return document_of(self.table, *about)

    def as_json(self) -> dict[str, Any]:
        """Return what ``fedlora compare --json`` prints."""
        content = as_json(self.table, self.comparison.rows, self.metric, self.findings)
        return {"folder": str(self.folder), "baselines": self.baselines.as_json(), **content}


def compare(
    recipe: str | Path | RunConfig = "digits",
    strategies: Iterable[str] | None = None,
    *,
    rows: Sequence[str] = (),
    epsilons: Iterable[float] = (1.0, 3.0, 8.0, math.inf),
    seeds: int = 5,
    trials: int = 6,
    sampler: str = HALTON,
    baselines: str = AUTO,
    reference: str = "",
    workers: int = 1,
    output: str | Path | None = None,
    task: str | Task | TaskFactory | None = None,
    train: Table | None = None,
    test: Table | None = None,
    progress: bool | None = None,
    on_row: OnRow | None = None,
    on_baselines: Callable[[Iterable[str]], object] | None = None,
    **changes: Any,
) -> Compared:
    """Compare strategies over privacy budgets, as ``fedlora compare`` does.

    The same call continues where an earlier one stopped. An object has another name in each call,
    so a comparison on one needs a new folder.

    Parameters
    ----------
    recipe, task, train, test, progress, **changes
        As for `fedlora_flwr.simulate`: what all runs share.
    strategies : Iterable[str], optional
        Names; all built-in ones if neither this nor ``rows`` is given.
    rows : Sequence[str] (default: none)
        Rows with settings of their own, such as ``"la-lora filter=binomial"``.
    epsilons : Iterable[float] (default: 1, 3, 8 and infinity)
        Privacy budgets; infinity means no privacy.
    seeds : int (default: 5)
        Seeds 1 to N are reported.
    trials : int (default: 6)
        Learning rates tried per row and ε; 0 keeps the row's own.
    sampler : str (default: "halton")
        What chooses the rates to try: ``"halton"`` or ``"optuna"``.
    baselines : str (default: "auto")
        What is added to compare with (see `with_baselines`).
    reference : str (default: head-only, if it is a row, or the first row)
        The row from which differences are taken.
    workers : int (default: 1)
        Runs at a time.
    output : str or Path (default: "runs/compare-RECIPE")
        Folder of the results.
    on_row : callable, optional
        Called with each finished run (see `run_comparison`) instead of a progress bar.
    on_baselines : callable, optional
        Called before the first run with sentences on the baselines.

    Returns
    -------
    Compared
        Its ``table`` has the means, and its ``runs`` every run.

    Raises
    ------
    InvalidValue
        A setting cannot be used, or the folder holds a comparison with other settings.
    FedLoRAError
        Another process works in the folder, or a worker was killed. Finished runs are kept.

    Examples
    --------
    >>> import tempfile
    >>> small = {"num_clients": 2, "num_rounds": 1, "local_steps": 1, "output": tempfile.mkdtemp()}
    >>> once = {"epsilons": [8], "seeds": 1, "trials": 0, "baselines": "none"}
    >>> found = compare("digits", ["rolora"], **once, **small)
    >>> found.table[["row", "epsilon", "failed"]].values.tolist(), len(found.runs)
    ([['rolora', 8.0, 0]], 1)
    """
    from fedlora_flwr.forecast.precision import settled

    names = _names(strategies, rows)
    budgets = _budgets(epsilons)
    with ExitStack() as stack:
        _check_shared(changes)
        changes |= given(stack, task=task, train=train, test=test)
        own = {"epsilon": budgets[0], "seed": 0}
        first = (names or rows)[0].split()
        config = config_of(recipe, {**changes, **own, "strategy": first[0] if first else ""})
        config, left = followed(COMPARISON, config, changes)
        _check_possible(config, sampler, trials)
        check_alone(config, "workers", workers, alone=workers == 1)
        config = settled(config, build_task(config.task, config)).config
        methods = read_methods([*names, *rows], config)
        named = Comparison(
            config, methods, budgets, seeds, trials, reference=reference, sampler=sampler
        )
        what, chosen = with_baselines(named, baselines)
        if on_baselines:
            on_baselines([*left, *chosen.lines()])
        folder = comparison_folder(recipe, output)
        stack.enter_context(kept_log())
        console = Console(stderr=True)
        tell = on_row or _shown(stack, progress)
        summary, found = run_comparison(what, folder, tell, workers, console)
        metric = metric_of(config)
    return Compared(what, folder, summary, metric, found, chosen)


def comparison_folder(recipe: str | Path | RunConfig, output: str | Path | None) -> Path:
    """Return the absolute folder of a comparison's results."""
    name = recipe.task if isinstance(recipe, RunConfig) else Path(recipe).stem
    return Path(output or Path("runs") / f"compare-{name}").expanduser().resolve()


def _names(strategies: Iterable[str] | None, rows: Sequence[str]) -> list[str]:
    """Return the strategies without settings of their own."""
    names = ([] if rows else [*STRATEGIES]) if strategies is None else list(strategies)
    for name in names:
        strategy_class(name)
    return names


def _budgets(epsilons: Iterable[float]) -> tuple[float, ...]:
    """Return privacy budgets, smallest first."""
    found = {float(epsilon) for epsilon in epsilons}
    if not found or not all(epsilon > 0 for epsilon in found):
        raise InvalidValue("epsilons", sorted(found), "numbers above 0")
    return tuple(sorted(found))


def _check_shared(changes: Mapping[str, Any]) -> None:
    for key in changes:
        if key_named(key) in (*_OWN, "strategy"):
            allowed = (
                "a key that compare itself does not set. It has strategies, epsilons and seeds"
            )
            raise InvalidValue("changes", key, allowed)


def _check_possible(config: RunConfig, sampler: str, trials: int) -> None:
    """Refuse what a comparison cannot do, and packages that are missing."""
    if sampler not in SAMPLERS:
        raise unknown("sampler", sampler, SAMPLERS)
    chooses = [OPTUNA] if sampler == OPTUNA and trials else []
    require(*extras_of(config.task), "plots", "flwr_datasets", *chooses)


def _shown(stack: ExitStack, progress: bool | None) -> OnRow:
    """Return what shows the finished runs in a terminal or a notebook."""
    show = stack.enter_context(counted("run", progress))
    return lambda row, done, total: show(
        done, total, "starting" if row is None else describe_row(row)
    )
