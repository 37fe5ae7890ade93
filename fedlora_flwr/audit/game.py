"""Runs that are attacked: the real strategy, clients and ledgers, and a server that watches.

Without a secure sum the server sees each client's upload, so each client has an attacker of its
own. With one it sees opened sums, and one attacker looks at the canaries of all clients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MessageType
from numpy.typing import NDArray

from fedlora_flwr.audit.attacker import Arrays, Attacker, View
from fedlora_flwr.audit.canaries import GRADIENT, AuditRecords, AuditTask, Canaries, directed
from fedlora_flwr.clients.handler import answer_message
from fedlora_flwr.clients.local_round import LocalRound
from fedlora_flwr.clients.local_store import LocalStore
from fedlora_flwr.clients.trainer import LocalTrainer
from fedlora_flwr.config import RunConfig
from fedlora_flwr.lora.adapters import AdaptedModel
from fedlora_flwr.lora.build import build_adapted
from fedlora_flwr.privacy.calibration import calibrated_mechanism
from fedlora_flwr.privacy.clip_weights import ClipWeights
from fedlora_flwr.privacy.ledger import LEDGER, Ledger
from fedlora_flwr.processes.lifeline import scratch
from fedlora_flwr.secure_sum.grid import Grid
from fedlora_flwr.server.strategy import build_strategy
from fedlora_flwr.server.sum_step import SumStep, sum_grid, sum_noise
from fedlora_flwr.simulations.local_grid import LocalGrid
from fedlora_flwr.strategies.replies import to_record
from fedlora_flwr.tasks.registry import Task, build_task
from fedlora_flwr.wire import ARRAYS, partition_name
from fedlora_flwr.wire.arrays import to_numpy
from fedlora_flwr.wire.records import read_order

_MEMORY = Path("/dev/shm")  # noqa: S108
Watch = Callable[[int, View], object]
"""Called with the number of an attacker and what it sees."""
SHORT: Mapping[str, Any] = {
    "num-clients": 4, "min-clients": 2, "num-rounds": 2, "local-steps": 1, "fraction-train": 1.0,
    "max-rounds": 0, "weighting": "uniform", "client-ranks": "", "robust": "none",
    "server-optimizer": "none", "server-lr": 0.0, "average-decay": 0.0,
    "reproducible": False, "share-weights": False, "run-epsilon": 0.0, "ledger-scope": "run",
    "lora-init": "random",
}  # fmt: skip
"""What a short run is: two rounds of one step, in which every record takes part."""


def short(config: RunConfig, records: int, keep: Mapping[str, Any]) -> RunConfig:
    """Return a recipe's settings for short runs in which every record takes part.

    Parameters
    ----------
    config : RunConfig
        The recipe.
    records : int
        Records of each client.
    keep : Mapping[str, Any]
        Values by key that replace those of a short run.

    Raises
    ------
    InvalidValue
        The settings cannot be used together.
    """
    every: dict[str, Any] = {"batch-size": records}
    if config.secure_sum:
        every = {"sample-rate": 1.0, "dropouts": 0, "colluding": 0, "sum-records": 0}
    if config.clients_are and config.num_clients:  # As many as the partitioner makes.
        every["num-clients"] = config.num_clients
    return RunConfig.of(config.items(), {**SHORT, **every, **keep})


@dataclass(frozen=True)
class Setting:
    """What is attacked.

    Parameters
    ----------
    config : RunConfig
        The settings of each run.
    records : int
        Records of each client, canaries included.
    kind : str
        Kind of the canaries (see `canaries.KINDS`).
    canaries : tuple of int
        Number of canaries of each client.
    """

    config: RunConfig
    records: int
    kind: str
    canaries: tuple[int, ...]


@dataclass(frozen=True)
class Ending:
    """How a run ended.

    Parameters
    ----------
    arrays : Mapping[str, ndarray]
        The final arrays.
    claim : float
        The largest ε that a client's ledger claims.
    """

    arrays: Arrays
    claim: float


class Game:
    """Plays runs of one setting, each with coins of its own.

    Parameters
    ----------
    setting : Setting
        What is attacked.

    Raises
    ------
    InvalidValue
        The task has no such canaries, clients have too few records, or the settings cannot be used.
    """

    def __init__(self, setting: Setting) -> None:
        config = setting.config
        self._setting, self._run = setting, 0
        # The ledgers end with the game. In memory, a row costs no wait for a disk.
        self._stack = ExitStack()
        memory = _MEMORY if _MEMORY.is_dir() else None
        folder = self._stack.enter_context(scratch("fedlora-audit-", memory))
        self._ledger, self._store = Ledger(folder / LEDGER), LocalStore(folder)
        self._task = cast("Task", AuditTask(build_task(config.task, config)))
        self._trainer, own = self._build(), self._build()
        self._kinds = Canaries.of(setting.kind, self._task, own.adapted.model)
        ends = list(accumulate(setting.canaries))
        self._clients = [
            (self._task.client_records(client, config.num_clients), end - count)
            for client, (end, count) in enumerate(zip(ends, setting.canaries, strict=True))
        ]
        there = [
            AuditRecords(found, count, self._kinds, [True] * count, first)
            for (found, first), count in zip(self._clients, setting.canaries, strict=True)
        ]
        about: tuple[float, float, float]
        if config.secure_sum:
            self._server = self._built_server()
            units, self._batch = [there], 0.0
            about = sum_noise(config), config.clip_norm, config.sample_rate
        else:
            mechanism = calibrated_mechanism(config, setting.records)
            units, self._batch = [[one] for one in there], mechanism.batch_size
            about = mechanism.noise_multiplier, config.clip_norm, mechanism.sample_rate
        weights = ClipWeights.configured(config)
        self.attackers = [Attacker(own, unit, *about, weights) for unit in units]

    def run(self, coins: Sequence[Sequence[bool]], watch: Watch | None = None) -> Ending:
        """Run once.

        Parameters
        ----------
        coins : Sequence[Sequence[bool]]
            For each client and canary, whether it takes part.
        watch : callable, optional
            Gets what the attackers see, round by round.
        """
        self._run += 1
        setting, name = self._setting, f"audit-{self._run}"
        config = replace(setting.config, seed=self._run)
        clients = [
            AuditRecords(found, setting.records, self._kinds, coin, first)
            for (found, first), coin in zip(self._clients, coins, strict=True)
        ]
        strategy = build_strategy(config)
        if config.secure_sum:
            strategy.opener = WatchedStep(config, *self._server, watch)

        def respond(message: Message, context: Context) -> Message:
            client = int(context.node_config["partition-id"])
            who, store = partition_name(client), self._store
            local = LocalRound(self._trainer, clients[client], self._ledger, who, name, store=store)
            reply = answer_message(local, message, who)
            if watch and not config.secure_sum:
                self._look(client, message, reply, watch)
            return reply

        with LocalGrid(respond, len(coins), config.items()).running() as grid:
            start, rounds = to_record(self._trainer.start), config.num_rounds
            result = strategy.start(grid, start, num_rounds=rounds)
        claim = float(str(result.train_metrics_clientapp[rounds]["epsilon"]))
        return Ending(_values(result.arrays), claim)

    def _look(self, client: int, message: Message, reply: Message, watch: Watch) -> None:
        """Show an attacker what the server sees of a client's round, if something was trained."""
        sent = reply.content.array_records.get(ARRAYS) if reply.has_content() else None
        if message.metadata.message_type != MessageType.TRAIN or not sent:
            return
        order, start = read_order(message.content)
        if plan := order.plan_for(self._trainer.layout):
            attacker, arrays = self.attackers[client], _values(sent)
            watch(client, attacker.upload(order.server_round, plan, start, arrays, self._batch))

    def _build(self) -> LocalTrainer:
        """Return a model with its engine: one for the clients, and one for the attackers."""
        config = self._setting.config
        trainer = LocalTrainer.of(config, self._task)
        if self._setting.kind != GRADIENT:
            return trainer
        return directed(trainer, build_strategy(config).shared)

    def _built_server(self) -> tuple[AdaptedModel, Grid, int]:
        """Return what the server's step under a secure sum needs, the same in each run."""
        config, records = self._setting.config, self._setting.records * len(self._clients)
        adapted = build_adapted(config, self._task)
        size = sum(parameter.numel() for parameter in adapted.parameters.values())
        return adapted, sum_grid(config, records, size), records


def _values(record: ArrayRecord) -> Arrays:
    return {name: to_numpy(array) for name, array in record.items()}


class WatchedStep(SumStep):
    """A server's step that shows each opened sum to the attacker.

    Parameters
    ----------
    *args
        As for `SumStep`.
    """

    def __init__(self, *args: Any) -> None:
        *own, self._watch = args
        super().__init__(*own)

    def step(
        self, server_round: int, current: Arrays, total: Mapping[str, NDArray[np.int64]], count: int
    ) -> dict[str, NDArray[np.floating[Any]]]:
        """Show the sum, and take the step."""
        if self._watch:
            seen = {name: array / self.grid_norm for name, array in total.items()}
            active = tuple(name for name in self._adapted.parameters if name in total)
            self._watch(0, View(current, seen, {active: 1}))
        return super().step(server_round, current, total, count)
