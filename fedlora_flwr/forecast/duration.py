"""How long a run will take on this machine: one private step is measured, the rest is counted."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fedlora_flwr.clients.trainer import one_client
from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.sections import PrivacySection
from fedlora_flwr.config.unit import RECORD
from fedlora_flwr.data.records import Records, TensorRecords
from fedlora_flwr.data.users import count_units, users_of
from fedlora_flwr.errors import FedLoRAError, explained
from fedlora_flwr.forecast.forecast import active_per_step, skeleton
from fedlora_flwr.forecast.participation import participation
from fedlora_flwr.lora.adapters import AdaptedModel
from fedlora_flwr.lora.build import resolve_device
from fedlora_flwr.privacy.clip_weights import ClipWeights
from fedlora_flwr.privacy.engine import OptimizerSettings, PrivateEngine
from fedlora_flwr.privacy.mechanism import Mechanism
from fedlora_flwr.privacy.noise import NoiseSource, SecureNoise, SeededNoise
from fedlora_flwr.privacy.postprocessing.filters import make_filter
from fedlora_flwr.privacy.units import Units
from fedlora_flwr.randomness import RandomStream
from fedlora_flwr.server.rehearsal import build_unread, is_large
from fedlora_flwr.server.strategy import build_strategy
from fedlora_flwr.strategies.base import FedLoRA
from fedlora_flwr.tasks.registry import Task, optional
from fedlora_flwr.tasks.views import training_losses

# Seconds that a measurement may take. A batch that takes longer is measured by a part of it.
_PATIENCE = 3.0
_TRIED = 2
_LOOK = "To see how long a round takes, run one: -c num-rounds=1."


@dataclass(frozen=True)
class Duration:
    """An estimate of a run's time.

    Parameters
    ----------
    steps : int
        Private steps of all clients in all rounds.
    step : float
        Seconds of one private step with a batch of the expected size.
    evaluations : int
        Evaluations by the server, or by each client where models stay with the clients.
    evaluation : float or None
        Seconds of one evaluation; ``None`` where no data was opened.
    problem : str (default: "")
        Why nothing was measured.
    """

    steps: int = 0
    step: float = 0.0
    evaluations: int = 0
    evaluation: float | None = None
    problem: str = ""

    @property
    def total(self) -> float | None:
        """Seconds of the run where one client works after another; ``None`` if not measured."""
        if self.problem:
            return None
        return self.steps * self.step + self.evaluations * (self.evaluation or 0.0)

    def __str__(self) -> str:
        """Say it in one line."""
        if self.total is None:
            return f"not measured: {self.problem}"
        parts = f"{self.steps:,} private steps of {_seconds_of(self.step)}"
        if self.evaluation is not None:
            parts += f" and {self.evaluations:,} evaluations of {_seconds_of(self.evaluation)}"
        return (
            f"about {in_words(self.total)} by estimate, if one client works after another on this "
            f"machine: {parts}"
        )

    def as_json(self) -> dict[str, Any]:
        """Return it in JSON types, all times in seconds."""
        return {**asdict(self), "total": self.total}


def measure(config: RunConfig, task: Task, records: int | None = None) -> Duration:
    """Measure a private step of one client and, where data is opened, a part of an evaluation.

    The model has random weights where the task can build it so. Nothing is kept of what trains.

    Parameters
    ----------
    config : RunConfig
        The run.
    task : Task
        What is learned.
    records : int, optional
        Private records of each client. No data is opened then, and the batch is made up, of the
        largest records that there can be.
    """
    if config.quantization != "none":
        return Duration(problem=f"a plan loads no quantized weights. {_LOOK}")
    if is_large(skeleton(config, task)):
        return Duration(problem=f"a plan builds no model above 200 million weights. {_LOOK}")
    try:
        with explained("Measuring one private step", _LOOK):
            return _measured(config, task, records)
    except FedLoRAError as error:
        return Duration(problem=str(error))


def _measured(config: RunConfig, task: Task, records: int | None) -> Duration:
    adapted = build_unread(config, task)
    adapted.model.to(resolve_device(config.device))
    rounds = participation(config)
    messages = round(rounds.mean * config.num_clients)
    private = _private(config, task, records)
    size = count_units(config.unit, private) if records is None else records
    evaluation, due = None, 1 + math.ceil(rounds.last_round / config.eval_every)
    strategy = build_strategy(config)
    if strategy.personal:  # Its clients measure, after each of their rounds.
        due = 1 + messages
    if records is None:
        evaluation = _evaluation(task, adapted)
    return Duration(
        steps=messages * (1 if config.secure_sum else config.local_steps),
        step=_step(config, task, strategy, adapted, private, size),
        evaluations=due,
        evaluation=evaluation,
    )


def _private(config: RunConfig, task: Task, records: int | None) -> Records:
    """Return the records of the client in the middle, or made-up ones."""
    if records is None:
        return task.client_records(config.num_clients // 2, config.num_clients)
    made = optional(task, "made_up_batch")
    return task.test_records() if made is None else TensorRecords(made(8))


def _step(
    config: RunConfig,
    task: Task,
    strategy: FedLoRA,
    adapted: AdaptedModel,
    records: Records,
    size: int,
) -> float:
    """Return the seconds of one step with the expected batch."""
    expected = config.sample_rate * size if config.secure_sum else config.batch_size
    batch = max(1, min(round(expected), size))
    names = next(active_per_step(config, strategy, adapted))
    losses = training_losses(config, task)
    engine = PrivateEngine(adapted, losses, config.microbatch_size or None)
    noise: NoiseSource = SecureNoise() if config.secure_noise else SeededNoise(0)
    # More noise takes no more time.
    weights = ClipWeights.configured(config)
    # Made-up records name no users.
    unit = RECORD if users_of(records) is None else config.unit
    most = config.max_records_per_user
    units = Units.of(PrivacySection(unit=unit, max_records_per_user=most), records)
    mechanism = Mechanism(1.0, config.clip_norm, batch, max(size, batch), None, weights, unit)
    settings = OptimizerSettings.in_round(config, 1)
    engine.start_round(mechanism, settings, noise, make_filter(config.filter))

    def work(count: int) -> None:
        joined = torch.arange(count) % len(units)
        found, owners = units.sample(joined, RandomStream(0))
        engine.step(records, found, names, owners)

    with one_client(config.client_threads, 0), engine.training():
        return _seconds(work, batch, adapted)


def _evaluation(task: Task, adapted: AdaptedModel) -> float:
    """Return the seconds of the losses of all public records."""
    records, device = task.test_records(), next(adapted.model.parameters()).device
    adapted.model.eval()

    def work(count: int) -> None:
        positions = torch.linspace(0, len(records) - 1, count).long()
        batch = {key: value.to(device) for key, value in records.batch(positions).items()}
        with torch.inference_mode():
            task.losses(adapted.model, batch)

    return _seconds(work, len(records), adapted)


def _seconds(work: Callable[[int], None], count: int, adapted: AdaptedModel) -> float:
    """Return the seconds that ``work`` takes for a number of records, or in proportion."""
    few = min(_TRIED, count)
    parameter: Tensor = next(adapted.model.parameters())

    def timed(number: int) -> float:
        started = time.perf_counter()
        work(number)
        if parameter.is_cuda:
            torch.cuda.synchronize(parameter.device)
        return time.perf_counter() - started

    timed(few)  # The first pass checks the model, and reserves memory.
    each = timed(few) / few
    tried = max(few, min(count, 64, round(_PATIENCE / max(each, 1e-9))))
    return timed(tried) * (count / tried)


def _seconds_of(value: float) -> str:
    return f"{value:,.0f} s" if value >= 10 else f"{value:.2g} s"


def in_words(seconds: float) -> str:
    """Write a time in one or two units, e.g. ``"3 h 20 min"``.

    Examples
    --------
    >>> in_words(12_000)
    '3 h 20 min'
    """
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s" if seconds >= 1 else "1 s"
    if minutes < 120:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // (24 * 60)} d {minutes // 60 % 24} h"
