"""The server's side of a run: build, train through a strategy, evaluate, write the results."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from logging import WARNING
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid

from fedlora_flwr import wire
from fedlora_flwr.algebra.means import MovingAverage
from fedlora_flwr.config import RunConfig
from fedlora_flwr.environment import versions
from fedlora_flwr.errors import explained
from fedlora_flwr.files import replacing
from fedlora_flwr.layout import Layout
from fedlora_flwr.lora.adapters import AdaptedModel
from fedlora_flwr.lora.build import build_adapted
from fedlora_flwr.lora.prefix_cache import PrefixCache
from fedlora_flwr.lora.started import start_of
from fedlora_flwr.plan import ComponentPlan
from fedlora_flwr.server.best import Best
from fedlora_flwr.server.card import ModelCard
from fedlora_flwr.server.checkpoint import Checkpoint
from fedlora_flwr.server.endings import reason_of, status_of
from fedlora_flwr.server.keeper import Keeper, read_checkpoint, rows_of, told_before
from fedlora_flwr.server.noise import noise_of_mean
from fedlora_flwr.server.norm_bound import check_known
from fedlora_flwr.server.rehearsal import check_folding, rehearse
from fedlora_flwr.server.report import try_report
from fedlora_flwr.server.rounds import OnRound, RoundRow, by_name, first_and_last
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.server.samples import measure
from fedlora_flwr.server.strategy import build_strategy
from fedlora_flwr.server.sum_step import sum_step
from fedlora_flwr.server.trackers import Trackers, tracked, trackers_of
from fedlora_flwr.server.watched_grid import is_simulated
from fedlora_flwr.strategies import FedLoRA
from fedlora_flwr.strategies.replies import RoundReport, to_record
from fedlora_flwr.strategies.roster import Attendance
from fedlora_flwr.tasks.registry import Task, build_task, class_names
from fedlora_flwr.terminal import uninterrupted
from fedlora_flwr.trained.saved_task import write_task
from fedlora_flwr.wire import ACCOUNTANT, CLIENT, DELTA, EPSILON_BUDGET, FINGERPRINT, WEIGHT
from fedlora_flwr.wire.arrays import to_numpy

ALL_ROUNDS, BUDGETS_SPENT = "all rounds are done", "no client has budget left"
_MOST_NAMED = 10


def run_federation(
    grid: Grid,
    config: RunConfig,
    run_dir: RunDirectory,
    on_round: OnRound | None = None,
    *,
    adapted: AdaptedModel | None = None,
    largest_noise: float | None = None,
) -> dict[str, Any]:
    """Run a federation from the first round to the summary.

    Parameters
    ----------
    grid : Grid
        Flower's way to the clients.
    config : RunConfig
        The run.
    run_dir : RunDirectory
        Where the results go.
    on_round : callable, optional
        Called with each row of ``rounds.jsonl``, round 0 (before training) included.
    adapted : AdaptedModel, optional
        The run's model at its start, which has been rehearsed; the run changes it. Built and
        rehearsed here if not given.
    largest_noise : float, optional
        Replaces the configuration's value if the caller knows the noise of each client.

    Returns
    -------
    dict[str, Any]
        What ``summary.json`` holds.

    Raises
    ------
    InvalidValue
        The folder holds another run's results, which are left as they are.
    FedLoRAError
        The run could not go on; the summary says why, and ``adapter/`` holds the last round's
        arrays.
    """
    trackers = trackers_of(config)
    run_dir.take()
    with run_dir.working():
        checkpoint = read_checkpoint(config, run_dir) if config.resume else None
        run_dir.write_config(config)
        with tracked(trackers, config, run_dir, on_round) as told:
            return _federation(grid, config, run_dir, told, adapted, checkpoint, largest_noise)


def _federation(
    grid: Grid,
    config: RunConfig,
    run_dir: RunDirectory,
    trackers: Trackers,
    adapted: AdaptedModel | None,
    checkpoint: Checkpoint | None,
    largest_noise: float | None,
) -> dict[str, Any]:
    started = time.perf_counter() - (checkpoint.seconds if checkpoint else 0.0)
    session: _Session | None = None
    try:
        noise = config.largest_noise if largest_noise is None else largest_noise
        known = replace(config, largest_noise=noise)
        check_known(known)
        task = build_task(config.task, config)
        strategy = build_strategy(known)
        if adapted is None:
            adapted = build_adapted(config, task)
            check_folding(config, strategy, adapted)
            rehearse(config, task, adapted)
        if config.secure_sum:
            strategy.opener = sum_step(config, task, adapted)
        session = _Session(config, task, adapted, strategy, run_dir, trackers, started)
        session.run(grid, checkpoint)
    except BaseException as error:
        summary = _summary(config, session, grid, time.perf_counter() - started)
        ending = {"status": status_of(error), "error": reason_of(error)}
        with uninterrupted(), suppress(OSError):  # The first error is the one to show.
            run_dir.write_summary({**summary, **ending})
            if session:
                session.write_card({**summary, **ending})
            try_report(run_dir)
        raise
    summary = _summary(config, session, grid, time.perf_counter() - started)
    summary["end"] = session.end
    session.write_card(summary)
    run_dir.write_summary(summary)
    try_report(run_dir)
    return summary


@dataclass
class _Session:
    config: RunConfig
    task: Task
    adapted: AdaptedModel
    strategy: FedLoRA
    run_dir: RunDirectory
    trackers: Trackers
    started: float
    rows: list[RoundRow] = field(default_factory=list)
    accountants: set[str] = field(default_factory=set)
    budgets: dict[str, tuple[float, float]] = field(default_factory=dict)
    unprotected: bool = False
    nodes: Attendance = field(default_factory=Attendance)
    connected: Callable[[], Iterable[int]] = tuple
    _mark: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self._average = MovingAverage(self.config.average_decay)
        self._prefix = PrefixCache.of(self.config, self.adapted)
        self._keeper = Keeper(self.run_dir, self.config, self.adapted.fingerprint)
        self.best = Best(self.config, self.task.metric)

    @property
    def layout(self) -> Layout:
        return Layout.of(self.adapted.parameters, self.config.block_pattern)

    @property
    def end(self) -> str:
        """Why the run ended, in words."""
        if len(self.rows) > self.config.num_rounds:
            return ALL_ROUNDS
        return self.best.why or BUDGETS_SPENT

    def run(self, grid: Grid, checkpoint: Checkpoint | None) -> None:
        # A federation has the nodes that it has; num-clients only says how many a run makes.
        self.connected = grid.get_node_ids
        self._absent()
        self._keeper.run = checkpoint.run if checkpoint else str(grid.run.run_id)
        if checkpoint:
            self._take_up(checkpoint)
        arrays = checkpoint.arrays if checkpoint else start_of(self.config, self.adapted)
        self.strategy.start(
            grid,
            initial_arrays=to_record(arrays),
            num_rounds=self.config.num_rounds,
            timeout=self.config.round_timeout,
            train_config=ConfigRecord({FINGERPRINT: self.adapted.fingerprint}),
            evaluate_config=ConfigRecord({FINGERPRINT: self.adapted.fingerprint}),
            evaluate_fn=self._after_round,
            stop_fn=lambda: self.best.why,
            **({"done": checkpoint.round} if checkpoint else {}),
        )
        if self.task.metric not in by_name(self.rows[-1]):
            # The last clients with budget left have gone since, so nobody knew that it was the end.
            by_name(self.rows[-1]).update(self._evaluate(self.config.num_rounds))

    def _take_up(self, checkpoint: Checkpoint) -> None:
        """Restore the state after a round from a checkpoint, including the rows."""
        self._keeper.check(checkpoint)
        self.strategy.load_state_dict(checkpoint.strategy)
        self.strategy.continues = checkpoint.run
        self._average.load_state_dict(checkpoint.average)
        if self.strategy.opener:
            self.strategy.opener.load_state_dict(checkpoint.opener)
        self.best.load_state_dict(checkpoint.best)
        if self.best.arrays:  # The folder may hold what a round after the checkpoint has left.
            self.adapted.write(self.best.arrays)
            with replacing(self.run_dir.best) as draft:
                self.adapted.export(draft)
        self.adapted.write(self._average.model(checkpoint.arrays))
        self.rows = rows_of(self.run_dir, self.config)
        for row in told_before(self.run_dir):
            self._hear(row[CLIENT], row)

    def write_card(self, summary: Mapping[str, Any]) -> None:
        """Write the card of the last round's adapter, which a run that ends early has, too."""
        if not self.run_dir.adapter.is_dir():
            return
        personal = self.strategy.personal
        try:
            # Where models stay with the clients, the server may have no test set.
            records = 0 if personal else len(self.task.test_records())
            classes = class_names(self.task)
            card = ModelCard(self.config, summary, self.adapted, personal, records, classes)
            card.write(self.run_dir.adapter)
            write_task(self.run_dir.adapter, self.config, classes)
            if self.run_dir.best.is_dir():
                card.of_best().write(self.run_dir.best)
                write_task(self.run_dir.best, self.config, classes)
        except Exception as error:  # A missing card must not fail the run: the plain card remains.
            log(WARNING, "The model card could not be written.", exc_info=error)

    def _after_round(self, server_round: int, arrays: ArrayRecord) -> MetricRecord:
        """Evaluate on the public test set, keep the arrays, write the round's rows."""
        current = {name: to_numpy(array) for name, array in arrays.items()}
        measured = self._average.add(current)
        self.adapted.write(measured)
        metrics = self._evaluate(server_round)
        with replacing(self.run_dir.adapter) as draft:
            self.adapted.export(draft)
        # Figures that clients measure on their own records decide nothing.
        here = not self.strategy.measured_there
        if metrics and here and self.best.take(server_round, metrics, measured):
            with replacing(self.run_dir.best) as draft:
                draft.mkdir()
                for file in self.run_dir.adapter.iterdir():
                    (draft / file.name).write_bytes(file.read_bytes())
        # What clients measured may have any name, and must not pass for what the server counted.
        row: RoundRow = {"round": server_round}
        by_name(row).update({**metrics, **self._communication(server_round)})
        row["round"] = server_round
        now = time.perf_counter()
        row["seconds"], self._mark = now - self._mark, now
        self.rows.append(row)
        self.run_dir.append("rounds", row)
        opener = self.strategy.opener.state_dict() if self.strategy.opener else {}
        carried = self.strategy.state_dict(), self._average.state_dict(), opener
        best = self.best.state_dict()
        self._keeper.keep(server_round, now - self.started, current, *carried, best)
        self.trackers.on_round(row)
        return MetricRecord({name: float(value) for name, value in metrics.items()})

    def _evaluate(self, server_round: int) -> Mapping[str, float]:
        """Return the round's metrics, none where the round is not due."""
        report = self.strategy.last_round
        if report is not None and report.evaluation is not None:
            # Where models stay with the clients, the server has none to measure.
            return report.evaluation
        config = self.config
        last = server_round == config.num_rounds or self.strategy.finished
        if server_round % config.eval_every and not last:
            return {}
        if self._prefix is not None and report is not None:
            plan = ComponentPlan.parse(report.plan)
            self._prefix.follow(self.layout.trained(plan, config.local_steps))
        advice = "Set another model or test-split, or a smaller eval-batch-size."
        with explained("Measuring the model on the public records", advice):
            return measure(config, self.task, self.adapted.model, self.run_dir, server_round)

    def _absent(self) -> int:
        """Return how many nodes were connected earlier in this run and no longer are."""
        gone = sorted(map(self.strategy.shown, self.nodes.gone(self.connected())))
        if gone:
            text = f"{len(gone)} of {len(self.nodes)} nodes are not connected any more"
            more = f" and {len(gone) - _MOST_NAMED} more" if gone[_MOST_NAMED:] else ""
            log(WARNING, "%s: %s%s.", text, ", ".join(gone[:_MOST_NAMED]), more)
        return len(gone)

    def _noise(self, report: RoundReport) -> dict[str, Any]:
        """Return the noise of the round's mean, where the clients' weights tell their noise."""
        parts = report.compared.get("signal", {})
        means = self.strategy.robust.means
        if self.config.weighting != "inverse-noise" or not (parts and means):
            return {}
        told = [(upload.weight, 1 / upload.metrics[WEIGHT]) for upload in report.uploads]
        shapes = {name: tuple(p.shape) for name, p in self.adapted.parameters.items()}
        plan = ComponentPlan.parse(report.plan)
        found = noise_of_mean(self.config, report.server_round, plan, self.layout, shapes, told)
        return {"noise": {p: norm for p, norm in found.items() if p in parts}} if found else {}

    def _hear(self, client: str, told: Mapping[str, Any]) -> None:
        """Note what a client tells of its account."""
        self.accountants.add(str(told.get(ACCOUNTANT, "")))
        self.unprotected |= any(word.startswith(wire.UNPROTECTED) for word in told)
        if {EPSILON_BUDGET, DELTA} <= told.keys():
            self.budgets[client] = told[EPSILON_BUDGET], told[DELTA]

    def _communication(self, server_round: int) -> Mapping[str, object]:
        """Write what each client told, and return what the round's row says of all of them."""
        report = self.strategy.last_round
        if server_round == 0 or report is None:
            return {}
        for upload in report.uploads:
            told = {**upload.texts, **upload.metrics}
            row = {"round": server_round, CLIENT: upload.client}
            row.update({name: value for name, value in told.items() if name not in row})
            self._hear(upload.client, told)
            self.run_dir.append("clients", row)
        counted: RoundRow = {
            "plan": report.plan,
            "epsilon_max": report.epsilon_max,
            "clients_asked": report.sent,
            "clients_used": len(report.uploads),
            "clients_absent": self._absent(),
            "declined": report.declined,
            "failures": report.failures,
            "suspects": report.suspects,
            "bytes_down": report.bytes_down,
            "bytes_up": report.bytes_up,
            "bytes_up_adapters": report.bytes_up_adapters,
            "bytes_plain": report.bytes_plain,
        }
        return {**report.details, **report.compared, **self._noise(report), **counted}


def _remarks(session: _Session, grid: Grid) -> dict[str, str]:
    opener, made = session.strategy.opener, session.config.clients_are
    found = {"clients": made} if made and is_simulated(grid) else {}
    found |= session.strategy.remarks() | ({"secure sum": opener.remark} if opener else {})
    return found | session.trackers.remarks


def _summary(
    config: RunConfig, session: _Session | None, grid: Grid, seconds: float
) -> dict[str, Any]:
    rows = session.rows if session else []
    metric = session.task.metric if session else "accuracy"
    rounds = rows[1:]
    # Devices decide their own budgets; the run's own is what simulated clients have.
    told = list(session.budgets.values()) if session else []
    epsilons, deltas = zip(*told, strict=True) if told else ((config.epsilon,), (config.delta,))
    spent = [row["epsilon_max"] for row in rounds if row["epsilon_max"] is not None]
    return {
        "status": "completed",
        "task": config.task,
        "strategy": config.strategy,
        "num_clients": len(session.nodes) if session else 0,
        "num_rounds": config.num_rounds,
        "rounds_done": len(rounds),
        "metric": metric,
        **first_and_last(rows, metric),
        "best": session.best.summary if session else None,
        "epsilon_max": max(spent, default=0.0),
        "epsilon_budget": max(epsilons),
        "delta": max(deltas),
        "accountant": ", ".join(sorted(session.accountants)) if session else "",
        "bytes_up": sum(row["bytes_up"] for row in rounds),
        "bytes_up_adapters": sum(row["bytes_up_adapters"] for row in rounds),
        "bytes_down": sum(row["bytes_down"] for row in rounds),
        "bytes_plain": sum(row["bytes_plain"] for row in rounds),
        "seconds": seconds,
        "failures": sum(len(row["failures"]) for row in rounds),
        "declined": sum(len(row["declined"]) for row in rounds),
        "robust": session.strategy.robust.words if session else "",
        "suspects": Counter(name for row in rounds for name in row["suspects"]),
        "seed": config.seed,
        "simulated": is_simulated(grid),
        "reproducible_noise": config.reproducible,
        "weighting": config.weighting,
        "precision": config.precision,
        "trust_model": config.trust_model,
        "blocks": list(session.layout.blocks) if session else [],
        "remarks": _remarks(session, grid) if session else {},
        # A device's own file may ask for them where the run's settings do not.
        "unprotected_metrics": config.report_unprotected_metrics
        or (session is not None and session.unprotected),
        "versions": versions(),
    }
