"""Commands for use before a run: ``fedlora budget``, ``plan`` and ``inspect-split``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedlora_flwr.cli.arguments import AsJson, Overrides, Recipe, named_file, read_budgets
from fedlora_flwr.cli.convert import read_recipe
from fedlora_flwr.errors import InvalidValue, require
from fedlora_flwr.processes import uncollected
from fedlora_flwr.tasks.registry import extras_of
from fedlora_flwr.terminal import say_loading, show, show_json, show_lines


def budget(
    delta: Annotated[float, typer.Option(help="Failure probability.")],
    epsilon: Annotated[float | None, typer.Option(help="Privacy budget.")] = None,
    noise_multiplier: Annotated[
        float | None, typer.Option(help="σ, in units of the clip norm.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds T of the whole run.")] = None,
    local_steps: Annotated[int, typer.Option(help="Private steps K per round.")] = 1,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Private steps T·K of the whole run, in place of --rounds and --local-steps."
        ),
    ] = None,
    records: Annotated[int | None, typer.Option(help="Records n of the client.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Expected batch size b; q = b/n.")] = None,
    sample_rate: Annotated[
        float | None, typer.Option(help="Sampling rate q, in place of --batch-size.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="A PNG file with ε and σ by rounds; none if not given.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print ε, noise multiplier σ or rounds, from the other two.

    Give two of --epsilon, --noise-multiplier and --rounds. Under a secure sum, give the run's
    --sample-rate, the --records of all clients together, and no --local-steps.
    """
    rounds = _rounds(rounds, local_steps, steps)
    path = named_file(plot, "a .png", "--plot") if plot else None
    require("client", *(["plots"] if path else []))
    from fedlora_flwr.forecast.plan_budget import plan_budget

    found = plan_budget(
        delta=delta, epsilon=epsilon, noise_multiplier=noise_multiplier, rounds=rounds,
        local_steps=local_steps, records=records, batch_size=batch_size, sample_rate=sample_rate,
    )  # fmt: skip
    if path:
        found.plot(path)
    if as_json:
        show_json({**found.as_json(), "plot": path and str(path)})
        return
    if found.solved_for == "rounds":
        more = found.epsilon_of_one_more
        border = "" if more is None else f"; one round more would spend ε = {more:.6g}"
        print(f"rounds T = {found.rounds}  ({found.steps} steps{border})")
    print(f"noise multiplier σ = {found.noise_multiplier:.4f}  (q = {found.sample_rate:.5f})")
    for name, value in found.epsilon.items():
        print(f"ε by {name.upper()} = {value:.4f}")
    if path:
        print(f"plot: {path}")


def _rounds(rounds: int | None, local_steps: int, steps: int | None) -> int | None:
    """Return the rounds; steps that are given alone count as rounds of one step."""
    if steps is None:
        return rounds
    if rounds is not None or local_steps != 1:
        raise InvalidValue("steps", steps, "none beside rounds and local-steps: steps are T·K")
    return steps


def plan(
    recipe: Recipe = "digits",
    overrides: Overrides = None,
    records: Annotated[
        int | None, typer.Option(min=1, help="Records of each client, instead of opening the data.")
    ] = None,
    epsilon: Annotated[
        str,
        typer.Option(
            help="Privacy budgets joined by commas, for a row each; none = no privacy. Nothing is "
            "measured then."
        ),
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Show what a run would cost, what it promises and how much noise it has; trains nothing.

    Exits with code 1 if a client cannot keep its promise.
    """
    budgets = read_budgets(epsilon) if epsilon else ()
    config = read_recipe(recipe, overrides)  # Bad input is told before the slow imports.
    require(*extras_of(config.task), *(["flwr_datasets"] if records is None else []))
    say_loading()
    with uncollected():
        from fedlora_flwr.cli.forecast_screen import show_budgets, show_forecast
        from fedlora_flwr.forecast.plan_run import plan_budgets, plan_run

    found = (
        plan_budgets(config, budgets, records) if budgets else [plan_run(config, records=records)]
    )
    if as_json:
        each = [one.as_json() for one in found]
        show_json({"budgets": each} if budgets else each[0])
    elif budgets:
        show_budgets(found, Console())
    else:
        show_forecast(found[0], Console())
    if any(one.broken for one in found):
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
    path = named_file(output or Path(f"split-{Path(recipe).stem}.png"), "a .png")
    require(*extras_of(config.task), "plots", "flwr_datasets")
    from fedlora_flwr.forecast.split_table import (
        MAX_COLUMNS,
        split_counts,
        split_json,
        split_table,
    )
    from fedlora_flwr.plots.splits import plot_split
    from fedlora_flwr.tasks.registry import build_task, client_values, reading, with_clients

    task = build_task(config.task, config)
    config = with_clients(config, task)
    counts, read = split_counts(config, task), reading(task, config.num_clients)
    values = client_values(config, task)
    plot_split(counts, path, f"{config.task}, {config.partitioner}")
    if as_json:
        show_json({**split_json(counts, config, values), "read": read, "plot": str(path)})
        return
    console = Console()
    show(console, split_table(counts, config, values))
    if counts.shape[1] > MAX_COLUMNS:
        text = f"{counts.shape[1]}; the table shows how many each client has, the plot shows all"
        show_lines(console, [("Classes", text)])
    show_lines(console, [*(("Records", line) for line in read), ("Plot", str(path))])
