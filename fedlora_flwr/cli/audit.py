"""``fedlora audit``: attack what a recipe runs, and bound ε from below."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedlora_flwr.cli.arguments import AsJson, Overrides, Recipe
from fedlora_flwr.cli.convert import read_recipe
from fedlora_flwr.config.overrides import parse_overrides
from fedlora_flwr.config.toml import toml_value
from fedlora_flwr.errors import InvalidValue, require
from fedlora_flwr.processes import uncollected
from fedlora_flwr.tasks.registry import extras_of
from fedlora_flwr.terminal import show_json, show_lines

if TYPE_CHECKING:
    from fedlora_flwr.audit.record import AuditRecord

_Paired = Annotated[
    bool, typer.Option("--paired", help="Many short runs, the server attacks (default).")
]
_OneRun = Annotated[
    bool, typer.Option("--one-run", help="One run in which each record is a canary.")
]
_BlackBox = Annotated[
    bool, typer.Option("--black-box", help="Many short runs; only the final model is seen.")
]
_Canary = Annotated[
    str, typer.Option(help="gradient, scaled, label or tokens; chosen by the mode if empty.")
]
_Runs = Annotated[int, typer.Option(min=20, help="Short runs to attack.")]
_Records = Annotated[
    int, typer.Option(min=0, help="Records of each client; 0 = 8, or 100 in one run.")
]
_Confidence = Annotated[
    float, typer.Option(min=0.5, max=0.9999, help="Confidence of all bounds together.")
]
_Workers = Annotated[int, typer.Option(min=1, help="Processes that attack.")]
_Output = Annotated[Path, typer.Option(help="JSON file of the record.")]
_Attach = Annotated[
    Path | None,
    typer.Option("--attach", help="Folder of a run that gets the record, and its card too."),
]


def audit(
    recipe: Recipe = "digits",
    overrides: Overrides = None,
    paired: _Paired = False,
    one_run: _OneRun = False,
    black_box: _BlackBox = False,
    canary: _Canary = "",
    runs: _Runs = 300,
    records: _Records = 0,
    confidence: _Confidence = 0.95,
    workers: _Workers = 1,
    output: _Output = Path("audit.json"),
    attach_to: _Attach = None,
    as_json: AsJson = False,
) -> None:
    """Attack what a recipe runs, and show what ε the attack finds beside the claim.

    A coin decides for each canary whether it takes part. The attacker knows all but the coins, and
    guesses. Exits with code 1 if the claim is violated.
    """
    if paired + one_run + black_box > 1:
        raise InvalidValue("mode", "several", "one of --paired, --one-run and --black-box")
    config = read_recipe(recipe, overrides)  # Bad input is told before the slow imports.
    require(*extras_of(config.task), "flwr_datasets")
    with uncollected():
        from fedlora_flwr.audit.attached import files_of
        from fedlora_flwr.audit.audit_run import audit_run

    found = audit_run(
        recipe,
        mode="black-box" if black_box else "one-run" if one_run else "paired",
        canary=canary,
        runs=runs,
        records=records,
        confidence=confidence,
        workers=workers,
        output=output,
        attach_to=attach_to,
        **parse_overrides(overrides or []),
    )
    picture = output.with_suffix(".png")
    files = [output, *([picture] if picture.exists() else [])]
    files += files_of(attach_to) if attach_to else []
    _show(Console(stderr=as_json), found, files, as_json=as_json)


def _show(console: Console, found: AuditRecord, files: Sequence[Path], *, as_json: bool) -> None:
    """Show a record; a claim that is violated ends the command with code 1."""
    from fedlora_flwr.audit.record import VIOLATED

    if as_json:
        show_json(found.as_json())
    else:
        names = {files[0]: "Record", files[0].with_suffix(".png"): "Picture"}
        written = [(names.get(path, "Attached"), str(path)) for path in files]
        show_lines(console, [*_lines(found), *written])
    if found.verdict == VIOLATED:
        raise typer.Exit(1)


def _lines(found: AuditRecord) -> Iterator[tuple[str, str]]:
    """Yield what the screen says of an audit."""
    from fedlora_flwr.audit.canaries import KINDS

    counts = found.counts
    yield "Attacker", found.attack
    if other := [
        f"{key} = {toml_value(found.settings[key])} ({toml_value(value)})"
        for key, value in found.recipe.items()
    ]:
        yield "Settings", f"those of short runs (the recipe's): {', '.join(other)}"
    yield "Canary", KINDS[found.canary]
    yield (
        "Coins",
        f"{counts.absent + counts.present:,} in {counts.runs_in_words}: {counts.present:,} with "
        f"the canary, {counts.absent:,} without",
    )
    yield "Claim", f"ε = {found.claim:.3f} at δ = {found.delta:g}, by the clients' ledgers"
    for bound in found.bounds:
        assumes = f"assumes {bound.assumes}" if bound.assumes else "assumes nothing"
        yield "Bound", f"ε ≥ {bound.epsilon:.2f} by {bound.statistic}, which {assumes}"
    yield "Confidence", f"{100 * found.confidence:g} % for all bounds together"
    yield "Verdict", f"{found.verdict}: {found.ratio:.2f} of the claim was found"
    yield "Time", f"{found.seconds:.0f} s"
