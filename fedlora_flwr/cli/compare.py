"""``fedlora compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedlora_flwr.cli.arguments import (
    AsJson,
    Overrides,
    complete_baselines,
    complete_recipe,
    complete_row,
    complete_sampler,
    complete_strategies,
    read_budgets,
)
from fedlora_flwr.cli.convert import read_recipe
from fedlora_flwr.config import parse_overrides
from fedlora_flwr.errors import FedLoRAError, InvalidValue, require
from fedlora_flwr.processes import uncollected
from fedlora_flwr.tasks.registry import extras_of
from fedlora_flwr.terminal import show_json, show_lines

if TYPE_CHECKING:
    from fedlora_flwr.cli.compare_screen import CompareScreen
    from fedlora_flwr.studies.comparing import Compared

Shared = Annotated[
    str,
    typer.Option(
        help="A recipe, as for `run`: what all runs share.", autocompletion=complete_recipe
    ),
]
Strategies = Annotated[
    str | None,
    typer.Option(
        help="Names joined by commas, or all; all if neither this nor --row is given.",
        autocompletion=complete_strategies,
    ),
]
Rows = Annotated[
    list[str] | None,
    typer.Option(
        "--row",
        metavar="'STRATEGY KEY=VALUE …'",
        help="A row with settings of its own, e.g. 'la-lora filter=binomial'; repeatable.",
        autocompletion=complete_row,
    ),
]
Budgets = Annotated[str, typer.Option(help="Privacy budgets joined by commas; none = no privacy.")]
Trials = Annotated[
    int,
    typer.Option(min=0, help="Learning rates tried per row and ε; 0 keeps the row's own rate."),
]
Sampler = Annotated[
    str,
    typer.Option(
        help="What chooses the learning rates to try: halton, or optuna (extra optuna).",
        autocompletion=complete_sampler,
    ),
]
Baselines = Annotated[
    str,
    typer.Option(
        help="What is added to compare with: all, none, names joined by commas, or auto, which "
        "adds at most half as many runs again.",
        autocompletion=complete_baselines,
    ),
]
Reference = Annotated[
    str, typer.Option(help="The row from which differences are taken; head-only if not given.")
]
Output = Annotated[
    Path | None, typer.Option(help="Folder of the results; runs/compare-TASK if not given.")
]


def compare(
    task: Shared = "digits",
    strategies: Strategies = None,
    rows: Rows = None,
    epsilon: Budgets = "1,3,8,none",
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 1 to N are reported.")] = 5,
    trials: Trials = 6,
    sampler: Sampler = "halton",
    baselines: Baselines = "auto",
    reference: Reference = "",
    workers: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    output: Output = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Compare strategies over privacy budgets; the same command continues where it stopped."""
    names, budgets = _names(strategies, rows or []), read_budgets(epsilon)
    texts = [*names, *(rows or [])]
    # Bad input is told before the slow imports.
    config = read_recipe(task, _shared(overrides or [], texts[0].split(), budgets[0]))
    require(*extras_of(config.task), "plots", "flwr_datasets")
    with uncollected():
        from fedlora_flwr.cli.compare_screen import CompareScreen
        from fedlora_flwr.studies.comparing import compare as run_comparison
        from fedlora_flwr.studies.comparing import comparison_folder

    folder = comparison_folder(task, output)
    console = Console(stderr=as_json)
    try:
        with CompareScreen(console, workers) as screen:
            found = run_comparison(
                task,
                names,
                rows=rows or [],
                epsilons=budgets,
                seeds=seeds,
                trials=trials,
                sampler=sampler,
                baselines=baselines,
                reference=reference,
                workers=workers,
                output=folder,
                on_row=screen.row,
                on_baselines=screen.baselines,
                **parse_overrides(overrides or []),
            )
    except KeyboardInterrupt:
        kept = f"the finished runs, in {folder}; the same command continues with the others"
        show_lines(console, [("Kept", kept)])
        raise
    _show(found, screen, as_json=as_json)


def _show(found: Compared, screen: CompareScreen, *, as_json: bool) -> None:
    if as_json:
        show_json(found.as_json())
    else:
        screen.document(found.document(), found.folder)
    if found.failed:
        raise FedLoRAError(
            f"{found.failed} runs failed. rows.csv says why; the same command tries them again."
        )


def _names(strategies: str | None, rows: list[str]) -> list[str]:
    """Return the strategies without settings of their own."""
    from fedlora_flwr.strategies import STRATEGIES, strategy_class

    if strategies is None:
        plain = [] if rows else list(STRATEGIES)
    else:
        plain = list(STRATEGIES) if strategies == "all" else strategies.split(",")
    names = [name.strip() for name in plain]
    for name in names:
        strategy_class(name)
    return names


def _shared(overrides: list[str], strategy: list[str], epsilon: float) -> list[str]:
    """Return overrides for all runs of a comparison, with values for the keys that it sets."""
    own: dict[str, object] = {"strategy": "", "epsilon": epsilon, "seed": 0}
    for key in parse_overrides(overrides).keys() & own.keys():
        raise InvalidValue("-c", key, "a key that compare itself does not set")
    own["strategy"] = strategy[0] if strategy else ""
    return [*overrides, *(f"{key}={value}" for key, value in own.items())]
