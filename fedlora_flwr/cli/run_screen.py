"""Shows a run on a screen: its announcement, its progress, and the closing table."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.unit import counted
from fedlora_flwr.environment import own_program
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.forecast.participation import participation
from fedlora_flwr.report.promise import NOT_PRIVATE, SEVERAL
from fedlora_flwr.report.scales import BESIDE, heading, in_words
from fedlora_flwr.server.best import is_better
from fedlora_flwr.server.checkpoint import Checkpoint, Checkpoints
from fedlora_flwr.server.rounds import RoundRow, describe_round
from fedlora_flwr.server.run_dir import REPORT, RunDirectory
from fedlora_flwr.simulations.runner import PreparedRun
from fedlora_flwr.terminal import Bar, show_line, show_lines
from fedlora_flwr.wire import OWN_LABELS

SIMULATED = "secure sum simulated"
REPEATS = f"runs on the same records add up: {SEVERAL}"
NOTHING_LEARNED = (
    "the run ended no better than it began, so look at the line Noise of that plan; if it is far "
    "below 1, run once with -c epsilon=inf to see whether the rates and layers can learn"
)
NOTHING_LEARNED_WITHOUT_NOISE = (
    "the run ended no better than it began although it had no noise, so change the rates, the "
    "layers or the number of rounds"
)
UNPROTECTED = "unprotected metrics were reported"


class Screen:
    """Shows one run on a console; on a plain stream, one line per round.

    Parameters
    ----------
    console : Console
        The console to write to.
    prepared : PreparedRun
        The run.
    """

    def __init__(self, console: Console, prepared: PreparedRun) -> None:
        self._console = console
        self._prepared = prepared
        self._bar = Bar(console, "round")

    def __enter__(self) -> Screen:
        """Announce the run and begin to show progress."""
        show_lines(self._console, describe_plan(self._prepared))
        if self._console.is_terminal:
            self._bar.to(0, self._prepared.config.num_rounds, "starting")
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the console as it was."""
        self._bar.stop()

    def round(self, row: RoundRow) -> None:
        """Show one row of ``rounds.jsonl``."""
        state = describe_round(row, self._prepared.metric)
        last = self._prepared.config.num_rounds
        if self._console.is_terminal:
            self._bar.to(row["round"], last, state)
        else:
            show_line(self._console, f"round {row['round']}/{last}: {state}")


def describe_plan(prepared: PreparedRun) -> list[tuple[str, str]]:
    """Return names and texts of the lines that announce a run."""
    config = prepared.config
    sizes = list(prepared.mechanisms.of_size)
    lines = [
        (
            "Task",
            f"{config.task}: {prepared.parameters:,} parameters frozen, {prepared.trained:,} in "
            f"LoRA of rank {config.rank}{' and the head' if prepared.head else ''}, "
            f"{prepared.per_step:,} of them in each step",
        ),
        ("Strategy", f"{config.strategy}: {config.num_rounds} rounds of {_steps(config)}"),
        (
            "Clients",
            f"{config.num_clients} with {_range(sizes, 'd')} private {config.unit}s "
            f"({config.split_in_words})",
        ),
        *(("Records", line) for line in prepared.records),
        *(("Warning", line) for line in prepared.notes),
    ]
    if config.fraction_train < 1 or config.max_rounds:
        lines.append(("Rounds", str(participation(config))))
    if prepared.precision:
        lines.append(("Precision", prepared.precision))
    lines += [("" if n else "Privacy", text) for n, text in enumerate(_promise(prepared))]
    if config.reproducible and config.private:
        lines.append(("", "the noise follows the seed: this is a simulation, not a release"))
    if config.report_unprotected_metrics:
        lines.append(("", UNPROTECTED))
    return lines


def _steps(config: RunConfig) -> str:
    if config.secure_sum:
        rate = f"q = {config.sample_rate:g}"
        return f"one step by a secure sum, which each {config.unit} joins with {rate}"
    batch = counted(config.batch_size, config.unit)
    return f"{config.local_steps} private steps, expected batch {batch}"


def _promise(prepared: PreparedRun) -> list[str]:
    """Say what the run promises, and whether uploads are masked."""
    config, grid = prepared.config, prepared.grid
    sigmas = [m.noise_multiplier for m in prepared.mechanisms.of_size.values()]
    whose = "of all clients together" if grid else "of each client"
    promise = f"ε ≤ {config.epsilon:g} at δ = {config.delta:g} for each {config.unit} {whose}; "
    if grid:
        return [
            f"{promise}noise multiplier {grid.noise_multiplier:.2f} in a sum of {grid.shares} "
            f"shares or more, clip norm {config.clip_norm:g}",
            f"{SIMULATED}: uploads are not masked, and each has only one share of the noise",
        ]
    if config.private:
        return [
            f"{promise}noise multiplier {_range(sigmas, '.2f')}, clip norm {config.clip_norm:g}"
        ]
    return ["none: epsilon = inf adds no noise"]


def closing_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Return names and values of the closing table."""
    spent, budget = summary["epsilon_max"], summary["epsilon_budget"]
    used = summary["bytes_up"] + summary["bytes_down"]
    plain, metric = summary["bytes_plain"], summary["metric"]
    privacy = (
        "none"
        if budget is None or math.isinf(budget)  # JSON has no infinity, the run itself has.
        else f"ε = {spent:.3f} of {budget:g} at δ = {summary['delta']:g}, "
        f"{_of_clients(summary['num_clients'])} ({summary['accountant'].upper()} accountant)"
    )
    rows = [
        (
            heading(metric),
            f"{summary[f'initial_{metric}']:.1%} → {summary[f'final_{metric}']:.1%}",
        ),
        *_beside(summary),
        *_best(summary),
        ("Privacy", privacy),
        ("Sent", f"{_megabytes(summary['bytes_up'])} up, {_megabytes(summary['bytes_down'])} down"),
    ]
    if plain:
        rows.append(
            ("", f"{used / plain:.0%} of the {_megabytes(plain)} that plain LoRA averaging sends")
        )
    done, planned = summary["rounds_done"], summary["num_rounds"]
    rounds = f"{done} rounds" if done == planned else f"{done} of {planned} rounds"
    early = "" if done == planned else f": {summary['end']}"
    rows += [
        ("Time", f"{summary['seconds']:.0f} s for {rounds}{early}"),
        (
            "Failures",
            f"{summary['failures']} failed replies, {summary['declined']} declined for lack of "
            "budget",
        ),
    ]
    if named := summary.get("suspects"):
        times = [f"{name} in {n} round{'s' * (n > 1)}" for name, n in named.items()]
        rows.append(("Suspects", ", ".join(times)))
    rows += [(name.capitalize(), sentence) for name, sentence in summary["remarks"].items()]
    if summary["unprotected_metrics"]:
        rows.append(("Note", UNPROTECTED))
    return rows


def _of_clients(count: int) -> str:
    return "that of the only client" if count == 1 else f"the largest of {count} clients"


def _range(values: Sequence[float], pattern: str) -> str:
    """Write the least and the largest value, or one where both look alike."""
    low, high = format(min(values), pattern), format(max(values), pattern)
    return low if low == high else f"{low} to {high}"


def _beside(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the figures beside the task's metric, before training, if they were, and after it."""
    found = []
    for name in BESIDE:
        if (last := summary.get(f"final_{name}")) is None or name == summary["metric"]:
            continue
        first = summary.get(f"initial_{name}")
        before = "" if first is None else f"{first:.1%} → "
        found.append((heading(name), f"{before}{last:.1%}"))
        if name == OWN_LABELS:
            found.append(("", "with the classes of the public records weighted as at each client"))
    return found


def _best(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Say which round was the best, unless it is the last, and what its figure is worth."""
    best = summary.get("best")
    if best is None or best["round"] == summary["rounds_done"]:
        return []
    if best["round"] == 0:
        words = in_words(best["chosen_by"])
        return [("Best", f"no round was better than the start, by {words}; best/ holds the start")]
    name = best["chosen_by"]
    value = best["metrics"][name]
    figure = f"{value:.4f}" if name != summary["metric"] else f"{value:.1%}"
    return [
        (
            "Best",
            f"{in_words(name)} {figure} after round {best['round']}, kept in best/",
        ),
        ("", "adapter/ holds the model of the last round"),
        ("", "the records that measure it also chose the round, so the figure is optimistic"),
    ]


def next_steps(config: RunConfig, run_dir: RunDirectory) -> list[tuple[str, str]]:
    """Return the places of a run's results, and a command for the next step."""
    lines = [
        ("Results", str(run_dir.path)),
        ("Adapter", f"{run_dir.adapter}, and its README.md says how to use it"),
        *report_of(run_dir),
    ]
    if config.private and config.ledger_scope == "run":
        lines.append(("Repeats", REPEATS))
    if not config.private:
        lines.append(("Warning", NOT_PRIVATE))
    return [*lines, *_what_to_do(config, run_dir)]


def _what_to_do(config: RunConfig, run_dir: RunDirectory) -> list[tuple[str, str]]:
    """Return commands for the next step, which depends on whether the run has learned anything."""
    fedlora, run = own_program("fedlora"), shlex.quote(str(run_dir.path))
    if not _has_learned(run_dir.summary() or {}):
        config_file = shlex.quote(str(run_dir.path / "config.toml"))
        return [
            ("Next", f"{fedlora} plan {config_file}"),
            ("", NOTHING_LEARNED if config.private else NOTHING_LEARNED_WITHOUT_NOISE),
        ]
    if config.private and config.reproducible:
        # A simulation with noise from a seed is not for others to have.
        return [("Next", f"{fedlora} plot {run}")]
    own = f" -c task={shlex.quote(config.task)}" if ":" in config.task else ""
    lines = [
        ("Next", f"{fedlora} evaluate {run}{own}"),
        ("", f"{fedlora} predict {run} FILE{own}"),
    ]
    if config.private:
        adapter = shlex.quote(str(run_dir.adapter))
        lines.append(("Publish", f"{own_program('hf')} upload OWNER/NAME {adapter}"))
    return lines


def _has_learned(summary: Mapping[str, Any]) -> bool:
    """Tell whether a run ended better than it began; a run that was not measured may have."""
    metric = summary.get("metric", "")
    begin, end = summary.get(f"initial_{metric}"), summary.get(f"final_{metric}")
    if begin is None or end is None:
        return True
    return is_better(metric, end, begin)


def report_of(run_dir: RunDirectory) -> list[tuple[str, str]]:
    """Return the place of the report, which an error may have kept from being written."""
    report = run_dir.path / REPORT
    return [("Report", f"{report}, for a browser")] if report.exists() else []


def what_is_kept(command: str, run_dir: RunDirectory) -> list[tuple[str, str]]:
    """Return what a run that was interrupted has left behind, and how to continue it.

    Parameters
    ----------
    command : str
        ``"run"`` or ``"simulate"``.
    run_dir : RunDirectory
        The run's folder.
    """
    again, checkpoint = how_to_continue(command, run_dir), _last_checkpoint(run_dir)
    if checkpoint is None or not again:
        return [("Kept", "nothing to continue from, because no round was finished")]
    done, planned = checkpoint.round, checkpoint.config["num-rounds"]
    kept = f"{done} of {planned} rounds in {run_dir.path}, with the adapter and the ledgers"
    if checkpoint.config["epsilon"] != math.inf:
        kept += "; the ε of an interrupted round counts as spent"
    return [("Kept", kept), ("Resume", again)]


def how_to_continue(command: str, run_dir: RunDirectory) -> str:
    """Return the command that continues a run; empty where no round of it is over.

    Parameters are those of `what_is_kept`.
    """
    checkpoint = _last_checkpoint(run_dir)
    if checkpoint is None or not checkpoint.round:
        return ""
    return f"{own_program('fedlora')} {command} --resume {shlex.quote(str(run_dir.path))}"


def _last_checkpoint(run_dir: RunDirectory) -> Checkpoint | None:
    try:
        return Checkpoints(run_dir.path).last()[0]
    except InvalidValue:
        return None


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
