"""``fedlora audit``: attack what a recipe runs, and bound ε from below."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedlora_flwr.cli.arguments import AsJson, Overrides, Recipe
from fedlora_flwr.cli.convert import read_recipe
from fedlora_flwr.config.names import short_name
from fedlora_flwr.config.overrides import parse_overrides
from fedlora_flwr.errors import InvalidValue, require
from fedlora_flwr.files import write_json
from fedlora_flwr.processes import uncollected
from fedlora_flwr.tasks.registry import extras_of
from fedlora_flwr.terminal import Bar, show_json, show_lines

if TYPE_CHECKING:
    from fedlora_flwr.audit.record import AuditRecord


def audit(
    recipe: Recipe = "digits",
    overrides: Overrides = None,
    runs: Annotated[int, typer.Option(min=10, help="Short runs to attack.")] = 300,
    records: Annotated[
        int, typer.Option(min=2, help="Records of each client, the canary among them.")
    ] = 8,
    confidence: Annotated[
        float, typer.Option(min=0.5, max=0.9999, help="Confidence of all bounds together.")
    ] = 0.95,
    workers: Annotated[int, typer.Option(min=1, help="Processes that attack.")] = 1,
    output: Annotated[Path, typer.Option(help="JSON file of the record.")] = Path("audit.json"),
    as_json: AsJson = False,
) -> None:
    """Attack many short runs of a recipe, and show what ε the attack finds beside the claim.

    A coin decides for each client whether its canary takes part. The attacker is the server: it
    sees each upload, knows all but the coin, and guesses. Exits with code 1 if the claim is
    violated.
    """
    config = read_recipe(recipe, overrides)
    require(*extras_of(config.task), "flwr_datasets")
    if output.is_dir():
        raise InvalidValue("output", str(output), "a file")
    with uncollected():
        from fedlora_flwr.audit.paired import play, record_of, short
        from fedlora_flwr.audit.record import VIOLATED
        from fedlora_flwr.processes.workers import executor

    given = {short_name(key) for key in parse_overrides(overrides or [])}
    console, started = Console(stderr=as_json), time.perf_counter()
    attacked, bar = short(config, records, keep=given), Bar(console, "run", remaining=True)

    def on_runs(done: int) -> None:
        if console.is_terminal:
            bar.to(done, runs, "")

    try:
        with executor(workers, output.with_suffix(".log")) as execute:
            played = play(attacked, records, runs, execute, on_runs)
    finally:
        bar.stop()
    found = record_of(attacked, played, confidence, time.perf_counter() - started)
    write_json(output, found.as_json())
    if as_json:
        show_json(found.as_json())
    else:
        show_lines(console, [*_lines(found), ("Record", str(output))])
    if found.verdict == VIOLATED:
        raise typer.Exit(1)


def _lines(found: AuditRecord) -> Iterator[tuple[str, str]]:
    """Yield what the screen says of an audit."""
    yield "Attack", found.attack
    trials = f"{found.absent + found.present:,} of {found.runs:,} runs"
    yield "Trials", f"{trials}: {found.present:,} with the canary, {found.absent:,} without"
    yield "Claim", f"ε = {found.claim:.3f} at δ = {found.delta:g}, by the clients' ledgers"
    for bound in found.bounds:
        assumes = f"assumes {bound.assumes}" if bound.assumes else "assumes nothing"
        yield "Bound", f"ε ≥ {bound.epsilon:.2f} by {bound.statistic}, which {assumes}"
    yield "Confidence", f"{100 * found.confidence:g} % for all bounds together"
    yield "Verdict", f"{found.verdict}: {found.ratio:.2f} of the claim was found"
    yield "Time", f"{found.seconds:.0f} s"
