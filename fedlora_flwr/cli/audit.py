"""``fedlora audit``: attack what a recipe runs, and bound ε from below."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedlora_flwr.cli.arguments import AsJson, Overrides, Recipe
from fedlora_flwr.cli.convert import read_recipe
from fedlora_flwr.config.names import short_name
from fedlora_flwr.config.overrides import parse_overrides
from fedlora_flwr.errors import InvalidValue, NotInstalled, require
from fedlora_flwr.files import write_json
from fedlora_flwr.processes import uncollected
from fedlora_flwr.tasks.registry import extras_of
from fedlora_flwr.terminal import Bar, show_json, show_lines

if TYPE_CHECKING:
    from fedlora_flwr.audit.record import AuditRecord

_TRIALS, _ONE_RUN = 8, 100
"""Records of each client by default: in many short runs, and in one run."""


def audit(
    recipe: Recipe = "digits",
    overrides: Overrides = None,
    paired: Annotated[
        bool, typer.Option("--paired", help="Many short runs, the server attacks (default).")
    ] = False,
    one_run: Annotated[
        bool, typer.Option("--one-run", help="One run in which each record is a canary.")
    ] = False,
    black_box: Annotated[
        bool, typer.Option("--black-box", help="Many short runs; only the final model is seen.")
    ] = False,
    canary: Annotated[
        str, typer.Option(help="gradient, scaled, label or tokens; chosen by the mode if empty.")
    ] = "",
    runs: Annotated[int, typer.Option(min=20, help="Short runs to attack.")] = 300,
    records: Annotated[
        int, typer.Option(min=0, help="Records of each client; 0 = 8, or 100 in one run.")
    ] = 0,
    confidence: Annotated[
        float, typer.Option(min=0.5, max=0.9999, help="Confidence of all bounds together.")
    ] = 0.95,
    workers: Annotated[int, typer.Option(min=1, help="Processes that attack.")] = 1,
    output: Annotated[Path, typer.Option(help="JSON file of the record.")] = Path("audit.json"),
    attach_to: Annotated[
        Path | None,
        typer.Option("--attach", help="Folder of a run that gets the record, and its card too."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Attack what a recipe runs, and show what ε the attack finds beside the claim.

    A coin decides for each canary whether it takes part. The attacker knows all but the coins, and
    guesses. Exits with code 1 if the claim is violated.
    """
    if paired + one_run + black_box > 1:
        raise InvalidValue("mode", "several", "one of --paired, --one-run and --black-box")
    config = read_recipe(recipe, overrides)
    require(*extras_of(config.task), "flwr_datasets")
    if output.is_dir():
        raise InvalidValue("output", str(output), "a file")
    with uncollected():
        from fedlora_flwr.audit import trials
        from fedlora_flwr.audit.attached import attach, check_attachable
        from fedlora_flwr.audit.canaries import default_kind
        from fedlora_flwr.audit.game import short
        from fedlora_flwr.audit.one_run import attack, one_run_setting
        from fedlora_flwr.audit.record import VIOLATED
        from fedlora_flwr.processes.workers import executor

    given = {short_name(k): v for k, v in parse_overrides(overrides or []).items()}
    console, started = Console(stderr=as_json), time.perf_counter()
    mode = trials.BLACK_BOX if black_box else trials.PAIRED
    count, kind = records or (_ONE_RUN if one_run else _TRIALS), canary
    kind = kind or default_kind(config.task, black_box=black_box)
    clients = {"num-clients": 10} if one_run else {}
    attacked = short(config, count, {**clients, **{k: config.items()[k] for k in given}})
    if attach_to:
        check_attachable(attacked.items(), attach_to)
    if one_run:
        found = attack(one_run_setting(attacked, count, kind), confidence)
    else:
        setting = trials.trials_setting(attacked, count, kind, mode)
        with executor(workers, output.with_suffix(".log")) as execute, _bar(console, runs) as told:
            played = trials.play(setting, mode, runs, execute, told)
        found = trials.record_of(setting, mode, played, confidence)
    found = found.timed(time.perf_counter() - started)
    write_json(output, found.as_json())
    files = [output, *_picture(found, output)]
    files += attach(found, attach_to) if attach_to else []
    if as_json:
        show_json(found.as_json())
    else:
        names = {output: "Record", output.with_suffix(".png"): "Picture"}
        written = [(names.get(path, "Attached"), str(path)) for path in files]
        show_lines(console, [*_lines(found), *written])
    if found.verdict == VIOLATED:
        raise typer.Exit(1)


@contextmanager
def _bar(console: Console, runs: int) -> Iterator[Callable[[int], None]]:
    """Show how many runs are over, where there is a terminal."""
    bar = Bar(console, "run", remaining=True)

    def told(done: int) -> None:
        if console.is_terminal:
            bar.to(done, runs, "")

    try:
        yield told
    finally:
        bar.stop()


def _picture(found: AuditRecord, output: Path) -> list[Path]:
    """Draw the record beside its file if the extra for plots is installed."""
    try:
        require("plots")
    except NotInstalled:
        return []
    from fedlora_flwr.audit.picture import plot_audit

    picture = output.with_suffix(".png")
    plot_audit(found, picture)
    return [picture]


def _lines(found: AuditRecord) -> Iterator[tuple[str, str]]:
    """Yield what the screen says of an audit."""
    from fedlora_flwr.audit.canaries import KINDS

    counts = found.counts
    yield "Attacker", found.attack
    yield "Canary", KINDS[found.canary]
    yield (
        "Coins",
        f"{counts.absent + counts.present:,} in {counts.runs:,} runs: {counts.present:,} with the "
        f"canary, {counts.absent:,} without",
    )
    yield "Claim", f"ε = {found.claim:.3f} at δ = {found.delta:g}, by the clients' ledgers"
    for bound in found.bounds:
        assumes = f"assumes {bound.assumes}" if bound.assumes else "assumes nothing"
        yield "Bound", f"ε ≥ {bound.epsilon:.2f} by {bound.statistic}, which {assumes}"
    yield "Confidence", f"{100 * found.confidence:g} % for all bounds together"
    yield "Verdict", f"{found.verdict}: {found.ratio:.2f} of the claim was found"
    yield "Time", f"{found.seconds:.0f} s"
