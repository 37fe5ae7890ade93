"""The paired game: many short runs, in each of which a coin per client decides about its canary.

The server is the strategy itself, and the clients are those of any run, with their ledgers. The
attacker sees every upload of every round in order.
"""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
from flwr.app import Context, Message, MessageType

from fedlora_flwr.audit.attacker import Attacker, Upload
from fedlora_flwr.audit.bounds import Scores, clopper_pearson, gaussian
from fedlora_flwr.audit.canaries import WeightedTask, with_canary
from fedlora_flwr.audit.record import AuditRecord
from fedlora_flwr.clients.handler import answer_message
from fedlora_flwr.clients.local_round import LocalRound
from fedlora_flwr.clients.local_store import LocalStore
from fedlora_flwr.clients.trainer import LocalTrainer
from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.privacy.calibration import calibrated_mechanism
from fedlora_flwr.privacy.ledger import LEDGER, Ledger
from fedlora_flwr.processes.workers import Execute, one_by_one
from fedlora_flwr.server.strategy import build_strategy
from fedlora_flwr.simulations.local_grid import LocalGrid
from fedlora_flwr.strategies.replies import to_record
from fedlora_flwr.tasks.registry import Task, build_task
from fedlora_flwr.wire import ARRAYS, partition_name
from fedlora_flwr.wire.records import read_order

SHORT: dict[str, Any] = {
    "num-clients": 4, "min-clients": 4, "num-rounds": 2, "local-steps": 1, "batch-size": 8,
    "fraction-train": 1.0, "max-rounds": 0, "weighting": "uniform", "client-ranks": "",
    "robust": "none", "average-decay": 0.0, "reproducible": False, "share-weights": False,
    "run-epsilon": 0.0, "ledger-scope": "run",
}  # fmt: skip
"""What a short run is: two rounds of one step, in which every record takes part."""
BATCH = 10
"""Runs of one job."""
BOUNDS = (clopper_pearson, gaussian)


def short(config: RunConfig, records: int, keep: Collection[str] = ()) -> RunConfig:
    """Return a recipe's settings for short runs in which every record takes part.

    Parameters
    ----------
    config : RunConfig
        The recipe.
    records : int
        Records of each client.
    keep : Collection[str]
        Keys whose value stays the recipe's.

    Raises
    ------
    InvalidValue
        The settings cannot be used together.
    """
    changed = {**SHORT, "batch-size": records}
    return RunConfig.of(config.items(), {k: v for k, v in changed.items() if k not in keep})


@dataclass(frozen=True)
class Played:
    """The scores of all trials.

    Parameters
    ----------
    absent, present : ndarray
        The attacker's scores of clients without and with their canary, shape (trials,).
    epsilon : float
        The largest ε that a client's ledger claimed.
    runs : int
        Number of runs.
    """

    absent: Scores
    present: Scores
    epsilon: float
    runs: int


class PairedGame:
    """Short runs of one recipe, with a canary in each client or not.

    Parameters
    ----------
    config : RunConfig
        The runs' settings.
    records : int
        Records of each client, the canary included.

    Raises
    ------
    InvalidValue
        Clients share their noise over a secure sum, or the settings cannot be used.
    """

    def __init__(self, config: RunConfig, records: int) -> None:
        if config.secure_sum:
            allowed = (
                "'local'; the sum of a secure sum is audited by tests/secure_sum/test_audit.py"
            )
            raise InvalidValue("trust-model", config.trust_model, allowed)
        self._config, self._count, self._run = config, records, 0
        task = cast("Task", WeightedTask(build_task(config.task, config)))
        self._trainer = LocalTrainer.build(config, task)
        attackers = LocalTrainer.build(config, task)
        mechanism = calibrated_mechanism(config, records)
        self._records = [
            task.client_records(client, config.num_clients) for client in range(config.num_clients)
        ]
        self._attackers = [
            Attacker(attackers, mechanism, with_canary(found, records, present=True))
            for found in self._records
        ]

    def play(self, runs: int) -> Played:
        """Run so often; each run gives one trial per client."""
        scores: dict[bool, list[float]] = {False: [], True: []}
        epsilon = 0.0
        with tempfile.TemporaryDirectory() as folder:
            ledger, store = Ledger(Path(folder) / LEDGER), LocalStore(Path(folder))
            for _ in range(runs):
                coins = [bool(secrets.randbits(1)) for _ in self._records]
                found, claimed = self._one(coins, ledger, store)
                epsilon = max(epsilon, claimed)
                for coin, score in zip(coins, found, strict=True):
                    scores[coin].append(score)
        return Played(np.array(scores[False]), np.array(scores[True]), epsilon, runs)

    def _one(
        self, coins: Sequence[bool], ledger: Ledger, store: LocalStore
    ) -> tuple[list[float], float]:
        """Run once; return each client's score, and the largest ε that a ledger claims."""
        self._run += 1
        name, scores = f"audit-{self._run}", [0.0] * len(coins)
        clients = [
            with_canary(found, self._count, present=coin)
            for found, coin in zip(self._records, coins, strict=True)
        ]

        def respond(message: Message, context: Context) -> Message:
            client = int(context.node_config["partition-id"])
            who = partition_name(client)
            local = LocalRound(self._trainer, clients[client], ledger, who, name, store=store)
            reply = answer_message(local, message, who)
            if (upload := self._seen(message, reply)) is not None:
                scores[client] += self._attackers[client].score(upload)
            return reply

        strategy = build_strategy(replace(self._config, seed=self._run))
        with LocalGrid(respond, len(coins), self._config.items()).running() as grid:
            start, rounds = to_record(self._trainer.start), self._config.num_rounds
            result = strategy.start(grid, start, num_rounds=rounds)
        return scores, float(str(result.train_metrics_clientapp[rounds]["epsilon"]))

    def _seen(self, message: Message, reply: Message) -> Upload | None:
        """Return what the server sees of a client's round; None where nothing was trained."""
        sent = reply.content.array_records.get(ARRAYS) if reply.has_content() else None
        if message.metadata.message_type != MessageType.TRAIN or not sent:
            return None
        order, start = read_order(message.content)
        plan = order.plan_for(self._trainer.layout)
        if plan is None:
            return None
        arrays = {name: array.numpy() for name, array in sent.items()}
        return Upload(order.server_round, plan, start, arrays)


def play(
    config: RunConfig,
    records: int,
    runs: int,
    execute: Execute = one_by_one,
    on_runs: Callable[[int], object] = int,
) -> Played:
    """Play the game so often.

    Parameters
    ----------
    config : RunConfig
        The settings of each run (see `short`).
    records : int
        Records of each client, the canary included.
    runs : int
        Number of runs; each gives one trial per client.
    execute : Execute
        Where the runs take place.
    on_runs : callable, optional
        Called with the number of runs so far.

    Raises
    ------
    InvalidValue
        As `PairedGame`.
    """
    sizes = [min(BATCH, runs - first) for first in range(0, runs, BATCH)]
    found: list[Played] = []
    on_runs(0)
    for part in execute(_part, [(config, records, size) for size in sizes]):
        found.append(part)
        on_runs(sum(one.runs for one in found))
    return Played(
        np.concatenate([one.absent for one in found]),
        np.concatenate([one.present for one in found]),
        max(one.epsilon for one in found),
        runs,
    )


def record_of(config: RunConfig, played: Played, confidence: float, seconds: float) -> AuditRecord:
    """Return the record of trials: both bounds, and how they were found.

    Parameters
    ----------
    config : RunConfig
        The settings of each run.
    played : Played
        The scores.
    confidence : float
        Of all bounds together (Bonferroni).
    seconds : float
        How long they took.

    Raises
    ------
    InvalidValue
        There are too few trials (see `clopper_pearson`).
    """
    each, steps = 1 - (1 - confidence) / len(BOUNDS), config.num_rounds * config.local_steps
    return AuditRecord(
        settings=config.items(),
        attack=f"{config.strategy}: the server sees each upload of {steps} steps, and the "
        "canary's gradient fills the clip norm",
        runs=played.runs,
        absent=len(played.absent),
        present=len(played.present),
        claim=played.epsilon,
        delta=config.delta,
        confidence=confidence,
        bounds=[bound(played.absent, played.present, config.delta, each) for bound in BOUNDS],
        seconds=round(seconds, 1),
    )


_game = lru_cache(maxsize=1)(PairedGame)


def _part(job: tuple[RunConfig, int, int]) -> Played:
    config, records, runs = job
    return _game(config, records).play(runs)
