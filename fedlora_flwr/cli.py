"""The ``fedlora`` command."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fedlora_flwr.config import RunConfig, parse_overrides
from fedlora_flwr.deploy import commands as deploy
from fedlora_flwr.errors import FedLoRAError, InvalidValue
from fedlora_flwr.recipes import RECIPES, load_recipe, recipe_names
from fedlora_flwr.terminal import guard

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Differentially private federated LoRA on Flower.",
)
app.add_typer(deploy.app, name="deploy")

Recipe = Annotated[
    str, typer.Argument(help="A recipe's name (see `recipes`), or a TOML file of keys.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("-c", help="key=value, in force over the recipe; repeatable.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the summary as JSON and no more.")]
Output = Annotated[Path, typer.Option(help="Folder that run directories are made in.")]


@app.command()
def run(
    recipe: Recipe = "digits",
    overrides: Overrides = None,
    json_only: AsJson = False,
    output: Output = Path("runs"),
    workers: Annotated[
        int | None, typer.Option(min=1, help="Ray workers; by default one a core.")
    ] = None,
) -> None:
    """Run a recipe with `flwr run` on Flower's simulation engine."""
    from fedlora_flwr.simulations.runner import run_on_flower

    launch = partial(run_on_flower, workers=workers)
    _launch(launch, recipe, overrides, json_only, output)


@app.command()
def simulate(
    recipe: Recipe = "digits",
    overrides: Overrides = None,
    json_only: AsJson = False,
    output: Output = Path("runs"),
    workers: Annotated[
        int, typer.Option(min=1, help="Processes that serve clients; 1 = this one.")
    ] = 1,
) -> None:
    """Run a recipe without Ray or a server: same seed, same arrays."""
    from fedlora_flwr.simulations.runner import run_in_process

    launch = partial(run_in_process, workers=workers)
    _launch(launch, recipe, overrides, json_only, output)


@app.command()
def compare(
    task: Annotated[str, typer.Option(help="A recipe, as for `run`: what all runs share.")] = (
        "digits"
    ),
    strategies: Annotated[str, typer.Option(help="Names joined by commas, or all.")] = "all",
    epsilon: Annotated[
        str, typer.Option(help="Privacy budgets joined by commas; none = no privacy.")
    ] = "1,3,8,none",
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 1 to N are reported.")] = 5,
    trials: Annotated[
        int,
        typer.Option(min=0, help="Learning rates tried per method and ε; 0 = the recipe's own."),
    ] = 6,
    workers: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the results; runs/compare-TASK if not given.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Compare strategies over privacy budgets; the same command again goes on where it stopped."""

    def work() -> None:
        from fedlora_flwr.simulations.compare import Comparison
        from fedlora_flwr.simulations.compare import compare as run_comparison
        from fedlora_flwr.simulations.compare_results import read_rows
        from fedlora_flwr.simulations.compare_screen import CompareScreen

        names, budgets = _strategies(strategies), _budgets(epsilon)
        config = load_recipe(task, _shared(overrides or [], names[0], budgets[0]))
        comparison = Comparison(config, names, budgets, seeds, trials)
        folder = (output or Path("runs") / f"compare-{Path(task).stem}").resolve()
        console = Console()
        with CompareScreen(console) as screen:
            run_comparison(comparison, folder, screen.row, workers, console)
        screen.table(folder)
        if failed := int((read_rows(folder / "rows.csv")["error"] != "").sum()):
            raise FedLoRAError(
                f"{failed} runs failed. rows.csv says why; the same command tries them again."
            )

    guard(work)


@app.command()
def budget(
    epsilon: Annotated[float, typer.Option(help="Privacy budget.")],
    delta: Annotated[float, typer.Option(help="Failure probability.")],
    records: Annotated[int, typer.Option(help="Records n of the client.")],
    batch_size: Annotated[int, typer.Option(help="Expected batch size b; q = b/n.")],
    steps: Annotated[int, typer.Option(help="Private steps T·K over the whole run.")],
) -> None:
    """Print the noise multiplier σ for a budget, and what each accountant says of it."""
    from fedlora_flwr.privacy.budget import Segment, calibrate, check_budget, epsilon_spent

    def work() -> None:
        check_budget(epsilon, delta, batch_size, records)
        sigma = calibrate(epsilon, delta, batch_size / records, steps)
        print(f"noise multiplier σ = {sigma:.4f}  (q = {batch_size / records:.5f})")
        for accountant in ("prv", "pld", "rdp"):
            spent = epsilon_spent([Segment(sigma, batch_size / records, steps)], delta, accountant)
            print(f"ε by {accountant.upper()} = {spent.epsilon:.4f}")

    guard(work)


@app.command()
def plan(
    recipe: Recipe = "digits",
    overrides: Overrides = None,
    records: Annotated[
        int | None, typer.Option(min=1, help="Records of each client, instead of opening the data.")
    ] = None,
    json_only: AsJson = False,
) -> None:
    """Show what a run would cost, what it promises and how much noise it has; trains nothing.

    Exits with 1 where a client could not keep its promise.
    """

    def work() -> None:
        from fedlora_flwr.simulations.forecast import as_json, forecast
        from fedlora_flwr.simulations.forecast_screen import show

        found = forecast(load_recipe(recipe, overrides), records)
        if json_only:
            print(json.dumps(as_json(found), indent=2))
        else:
            show(found, Console())
        if found.broken:
            raise typer.Exit(1)

    guard(work)


@app.command()
def pretrain(
    source: Annotated[
        str, typer.Argument(help="Tiny-ImageNet: files, a folder, or its name on the hub.")
    ],
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the pictures.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and order.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
) -> None:
    """Pretrain the small Swin on classes 0 to 99, for `model = "small-swin"`."""

    def work() -> None:
        from fedlora_flwr.clients.trainer import resolve_device
        from fedlora_flwr.tasks.pretrain_swin import SwinRecipe, pretrain_swin

        chosen = SwinRecipe(seed=seed) if epochs is None else SwinRecipe(seed=seed, epochs=epochs)
        console = Console()
        folder = pretrain_swin(source, chosen, device=resolve_device(device), console=console)
        card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
        console.print(
            f"Accuracy  {card['accuracy']:.1%} on valid after {card['seconds'] / 60:.0f} minutes"
        )
        console.print(f"Model     {folder}", highlight=False, soft_wrap=True)

    guard(work)


@app.command()
def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Benchmarks; those with bars for simulations if none."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
) -> None:
    """Measure speed and memory here, as ratios to what you would have otherwise."""

    def work() -> None:
        # The profiler, which weighs memory, else writes a line for each start and stop.
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        from fedlora_flwr.bench.suite import run_suite

        run_suite(names or [], output and output.resolve(), Console())

    guard(work)


@app.command("inspect-split")
def inspect_split(
    recipe: Recipe = "digits",
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option(help="The plot, a PNG file; split-RECIPE.png if not given.")
    ] = None,
) -> None:
    """Show which client of a simulation gets how many records of which class; trains nothing."""

    def work() -> None:
        from fedlora_flwr.simulations.plots import plot_split
        from fedlora_flwr.simulations.split_table import split_counts, split_table

        config = load_recipe(recipe, overrides)
        path = _png(output or Path(f"split-{Path(recipe).stem}.png"))
        counts = split_counts(config)
        console, table = Console(), split_table(counts, config)
        # A number that goes on in the next line cannot be read; the table is never squeezed.
        free = console.options.update(max_width=1000)
        width = max(console.width, console.measure(table, options=free).maximum)
        console.print(table, width=width, crop=False, no_wrap=True)
        plot_split(counts, path, f"{config.task}, {config.partitioner}")
        console.print(f"Plot   {path}", highlight=False, soft_wrap=True)

    guard(work)


@app.command()
def plot(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a run.")] = Path("runs/latest"),
    output: Annotated[
        Path | None,
        typer.Option(help="The plot, a PNG file; RUN_DIR/rounds.png if not given."),
    ] = None,
) -> None:
    """Draw a run round by round: its metric, how far uploads agree, and what their mean loses."""

    def work() -> None:
        from fedlora_flwr.simulations.round_plots import plot_rounds
        from fedlora_flwr.simulations.run_dir import RunDirectory

        if not (run_dir / "rounds.jsonl").is_file():
            raise InvalidValue("RUN_DIR", str(run_dir), "the folder of a run, with rounds.jsonl")
        path = _png(output or run_dir / "rounds.png")
        found = RunDirectory(run_dir)
        metric = (found.summary() or {}).get("metric", "accuracy")
        plot_rounds(found.rows("rounds"), path, metric)
        Console().print(f"Plot   {path}", highlight=False, soft_wrap=True)

    guard(work)


@app.command()
def recipes() -> None:
    """List the recipes that come with the package."""
    table = Table("recipe", "about", box=None)
    for name in recipe_names():
        first = (RECIPES / f"{name}.toml").read_text(encoding="utf-8").splitlines()[0]
        table.add_row(name, first.removeprefix("# "))
    Console().print(table)


@app.command()
def keys(
    who_decides: Annotated[
        bool,
        typer.Option("--who-decides", help="Who decides each value on a device, as Markdown."),
    ] = False,
) -> None:
    """List every configuration key with its default and meaning."""
    if who_decides:
        from fedlora_flwr.config.authority import markdown

        print(markdown(), end="")
        return
    table = Table("key", "default", "meaning", box=None)
    values = RunConfig().items()
    for entry, (key, value) in zip(fields(RunConfig), values.items(), strict=True):
        table.add_row(key, repr(value), entry.metadata["about"])
    Console().print(table)


def _png(path: Path) -> Path:
    """Return where a plot goes."""
    path = path.resolve()
    if path.suffix.lower() != ".png" or not path.parent.is_dir():
        raise InvalidValue("--output", str(path), "a .png file in a folder that exists")
    return path


def _strategies(text: str) -> tuple[str, ...]:
    from fedlora_flwr.strategies import STRATEGIES, strategy_class

    names = list(STRATEGIES) if text == "all" else [name.strip() for name in text.split(",")]
    for name in names:
        strategy_class(name)
    return tuple(dict.fromkeys(names))


def _budgets(text: str) -> tuple[float, ...]:
    """Read privacy budgets, smallest first."""
    found = set()
    for part in text.split(","):
        try:
            value = math.inf if part.strip() == "none" else float(part)
        except ValueError:
            value = math.nan
        if not value > 0:
            raise InvalidValue("epsilon", part.strip(), "a number above 0, or none")
        found.add(value)
    return tuple(sorted(found))


def _shared(overrides: list[str], strategy: str, epsilon: float) -> list[str]:
    """Return overrides for what all runs of a comparison share; it sets the other keys itself."""
    own = {"strategy": strategy, "epsilon": epsilon, "seed": 0, "run-dir": "", "state-dir": ""}
    for key in parse_overrides(overrides).keys() & own.keys():
        raise InvalidValue("-c", key, "a key that all runs of a comparison share")
    return [*overrides, *(f"{key}={value}" for key, value in own.items())]


def _launch(
    launch: Callable[..., dict[str, Any]],
    recipe: str,
    overrides: list[str] | None,
    json_only: bool,
    output: Path,
) -> None:
    console = Console(quiet=json_only)

    def work() -> None:
        from fedlora_flwr.simulations.endings import recorded
        from fedlora_flwr.simulations.report import Screen, closing_table
        from fedlora_flwr.simulations.run_dir import RunDirectory, check_unused
        from fedlora_flwr.simulations.runner import make_plan
        from fedlora_flwr.simulations.workers import log_to_file

        config = load_recipe(recipe, overrides)
        if config.run_dir:
            check_unused(Path(config.run_dir))
        plan = make_plan(config, console)
        run_dir = (
            RunDirectory(Path(config.run_dir))
            if config.run_dir
            else RunDirectory.new(output.resolve(), config)
        )
        try:
            with recorded(run_dir, config), Screen(console, plan) as screen:
                log_to_file(run_dir.log)
                summary = launch(plan, run_dir, screen.round)
        except FedLoRAError as error:
            raise FedLoRAError(f"{error}\nLog: {run_dir.log}") from error
        except KeyboardInterrupt:
            console.print(f"Results   {run_dir.path}", highlight=False, soft_wrap=True)
            raise
        console.print(closing_table(summary), highlight=False)
        console.print(f"Results   {run_dir.path}", highlight=False, soft_wrap=True)
        if json_only:
            print(json.dumps(run_dir.summary(), indent=2))

    guard(work)


if __name__ == "__main__":
    app()
