"""Commands for use before a run: ``fedlora budget``, ``plan`` and ``inspect-split``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedlora_flwr.cli.arguments import AsJson, Overrides, Recipe, png_file
from fedlora_flwr.cli.convert import read_recipe
from fedlora_flwr.errors import require
from fedlora_flwr.processes import uncollected
from fedlora_flwr.tasks.registry import extras_of
from fedlora_flwr.terminal import show, show_json, show_lines


def budget(
    epsilon: Annotated[float, typer.Option(help="Privacy budget.")],
    delta: Annotated[float, typer.Option(help="Failure probability.")],
    records: Annotated[int, typer.Option(help="Records n of the client.")],
    batch_size: Annotated[int, typer.Option(help="Expected batch size b; q = b/n.")],
    steps: Annotated[int, typer.Option(help="Private steps T·K over the whole run.")],
    as_json: AsJson = False,
) -> None:
    """Print the noise multiplier σ for a budget, and the ε that each accountant gives for it."""
    require("client")
    from fedlora_flwr.privacy.accountants import ACCOUNTANTS
    from fedlora_flwr.privacy.budget import Segment, calibrate, check_budget, epsilon_spent

    check_budget(epsilon, delta, batch_size, records)
    rate = batch_size / records
    sigma = calibrate(epsilon, delta, rate, steps)
    spent = {
        name: epsilon_spent([Segment(sigma, rate, steps)], delta, name).epsilon
        for name in ACCOUNTANTS
    }
    if as_json:
        show_json({"noise_multiplier": sigma, "sample_rate": rate, "epsilon": spent})
        return
    print(f"noise multiplier σ = {sigma:.4f}  (q = {rate:.5f})")
    for name, value in spent.items():
        print(f"ε by {name.upper()} = {value:.4f}")


def plan(
    recipe: Recipe = "digits",
    overrides: Overrides = None,
    records: Annotated[
        int | None, typer.Option(min=1, help="Records of each client, instead of opening the data.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a run would cost, what it promises and how much noise it has; trains nothing.

    Exits with code 1 if a client cannot keep its promise.
    """
    config = read_recipe(recipe, overrides)  # Bad input is told before the slow imports.
    require(*extras_of(config.task), *(["flwr_datasets"] if records is None else []))
    with uncollected():
        from fedlora_flwr.cli.forecast_screen import show_forecast
        from fedlora_flwr.forecast.plan_run import plan_run

    found = plan_run(config, records=records)
    if as_json:
        show_json(found.as_json())
    else:
        show_forecast(found, Console())
    if found.broken:
        raise typer.Exit(1)


def inspect_split(
    recipe: Recipe = "digits",
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option(help="The plot, a PNG file; split-RECIPE.png if not given.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show how many records of each class each simulated client gets; trains nothing."""
    config = read_recipe(recipe, overrides)
    path = png_file(output or Path(f"split-{Path(recipe).stem}.png"))
    require(*extras_of(config.task), "plots", "flwr_datasets")
    from fedlora_flwr.forecast.split_table import (
        MAX_COLUMNS,
        split_counts,
        split_json,
        split_table,
    )
    from fedlora_flwr.plots.splits import plot_split
    from fedlora_flwr.tasks.registry import build_task, reading

    task = build_task(config.task, config)
    counts, read = split_counts(config, task), reading(task, config.num_clients)
    plot_split(counts, path, f"{config.task}, {config.partitioner}")
    if as_json:
        show_json({**split_json(counts, config), "read": read, "plot": str(path)})
        return
    console = Console()
    show(console, split_table(counts, config))
    if counts.shape[1] > MAX_COLUMNS:
        text = f"{counts.shape[1]}; the table shows how many each client has, the plot shows all"
        show_lines(console, [("Classes", text)])
    show_lines(console, [*(("Records", line) for line in read), ("Plot", str(path))])
