"""Forecasts what a run will cost, what it promises and how noisy it is, before it trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import InvalidValue, explained
from fedlora_flwr.forecast.advice import Advice, advise
from fedlora_flwr.forecast.client_noise import WorstClient, worst_client
from fedlora_flwr.forecast.memory import FLOAT_BYTES, Memory, step_memory
from fedlora_flwr.forecast.participation import participation
from fedlora_flwr.layout import Layout, factor_of, is_shared
from fedlora_flwr.lora.adapters import AdaptedModel, attach
from fedlora_flwr.lora.build import lora_spec
from fedlora_flwr.lora.weight_starts import RANDOM
from fedlora_flwr.plan import ComponentPlan
from fedlora_flwr.privacy.calibration import calibrated_mechanism
from fedlora_flwr.privacy.clip_weights import ClipWeights
from fedlora_flwr.privacy.mechanism import Mechanism
from fedlora_flwr.server.noise import noise_to_signal, noisy_coordinates
from fedlora_flwr.server.rehearsal import check_folding, rehearse_unbuilt
from fedlora_flwr.server.strategy import build_strategy
from fedlora_flwr.server.sum_step import sum_grid
from fedlora_flwr.strategies import FedLoRA
from fedlora_flwr.strategies.cohort import cohort_size
from fedlora_flwr.tasks.registry import (
    Task,
    build_task,
    client_sizes,
    client_values,
    model_notes,
    optional,
    reading,
    with_clients,
)

if TYPE_CHECKING:
    import pandas as pd

    from fedlora_flwr.forecast.duration import Duration
    from fedlora_flwr.forecast.gradients import Gradients

# None of our measured runs with more noise ended above its start; see docs/results.md and
# `benchmarks.learning`, which measures it. Other data and models may differ.
MOST_THAT_GAINED = 5.0
_HEADER = 128  # Bytes before an array in NumPy's format, which Flower's records use.


@dataclass(frozen=True)
class ClientForecast:
    """One client's mechanism, or why it cannot have one.

    Parameters
    ----------
    records : int
        n: its private records, or the users of them where ``unit = "user"``.
    mechanism : Mechanism or None
        Its noise; ``None`` if the promise cannot be kept.
    problem : str
        Why the promise cannot be kept.
    value : str
        The value of the partition column that the client is made of; empty if it is of none.
    """

    records: int
    mechanism: Mechanism | None
    problem: str = ""
    value: str = ""

    def as_json(self, unit: str) -> dict[str, Any]:
        """Return it in JSON types; ``unit`` names what its records are counted in."""
        made = self.mechanism
        return {
            "value": self.value or None,
            f"{unit}s": self.records,
            "sample_rate": made.sample_rate if made else None,
            "noise_multiplier": made.noise_multiplier if made else None,
            "problem": self.problem,
        }


@dataclass(frozen=True)
class Forecast:
    """What a run will cost and what it promises.

    Parameters
    ----------
    config : RunConfig
        The run.
    clients : list[ClientForecast]
        Every client.
    coordinates : int
        Numbers that are clipped and noised together in a step, the mean over a round.
    trained : int
        Numbers in adapters and, if it trains, head.
    layers : int
        Adapted layers.
    blocks : int
        Blocks that they form.
    memory : Memory
        Memory of one client.
    bytes_up, bytes_down : int
        Size of one client's arrays in one round. ``bytes_up`` is the mean of two rounds.
    noise_to_signal : float or None
        Norm of a round's averaged noise, less what a filter removes, over the largest norm that
        its averaged gradients can have (see `noise_to_signal`); ``None`` without privacy, or where
        no client can train.
    worst : WorstClient or None
        The client with the most noise, apart from that mean.
    read : list[str]
        Sentences on the records that are read and left out; none where no data is opened.
    test_records : int or None
        Public records; ``None`` where no data is opened.
    warnings : list[str]
        What will not work, or ends early, or has more noise than any run that gained.
    duration : Duration or None
        How long the run will take, where it was measured.
    gradients : Gradients or None
        What clipping leaves of each part's gradient, where it was measured.
    precision : str
        Which precision was chosen and why, if the run left it open.
    """

    config: RunConfig
    clients: list[ClientForecast]
    coordinates: int
    trained: int
    layers: int
    blocks: int
    memory: Memory
    bytes_up: int
    bytes_down: int
    noise_to_signal: float | None
    worst: WorstClient | None = None
    read: list[str] = field(default_factory=list)
    test_records: int | None = None
    warnings: list[str] = field(default_factory=list)
    duration: Duration | None = None
    gradients: Gradients | None = None
    precision: str = ""

    @property
    def broken(self) -> int:
        """Clients whose promise cannot be kept."""
        return sum(client.mechanism is None for client in self.clients)

    @property
    def table(self) -> pd.DataFrame:
        """One row per client: records (or users), sampling rate, noise multiplier and problem."""
        import pandas as pd

        return pd.DataFrame(self.as_json()["clients"])

    @property
    def advice(self) -> Advice:
        """What the measured rows support for a run like this."""
        return advise(self.config)

    def as_json(self) -> dict[str, Any]:
        """Return what ``fedlora plan --json`` prints."""
        return {
            "task": self.config.task,
            "strategy": self.config.strategy,
            "epsilon": self.config.epsilon if self.config.private else None,
            "delta": self.config.delta,
            "unit": self.config.unit,
            "steps": self.config.planned_steps,
            "rounds": asdict(participation(self.config)),
            "clients": [client.as_json(self.config.unit) for client in self.clients],
            "coordinates": self.coordinates,
            "trained": self.trained,
            "layers": self.layers,
            "blocks": self.blocks,
            "noise_to_signal": self.noise_to_signal,
            "worst_client": asdict(self.worst) if self.worst else None,
            "gradients": self.gradients.as_json() if self.gradients else None,
            "memory_bytes": self.memory.as_json(),
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "read": self.read,
            "test_records": self.test_records,
            "duration": self.duration.as_json() if self.duration else None,
            "advice": self.advice.as_json(),
            "warnings": self.warnings,
        }


def forecast(config: RunConfig, records: int | None = None, task: Task | None = None) -> Forecast:
    """Work out a run before it starts; no weights are loaded.

    Parameters
    ----------
    config : RunConfig
        The run.
    records : int, optional
        Private records (or users) of each client, all alike. By default the data set is opened and
        split, and the test split is opened, too.
    task : Task, optional
        What is learned; by default that of the configuration, built here.

    Raises
    ------
    InvalidValue
        A setting cannot be used, or model or data cannot be found.
    PrivacyViolation, ModelFailed
        The model cannot train (see `fedlora_flwr.server.rehearsal`).
    """
    task = task or build_task(config.task, config)
    config = with_clients(config, task)
    strategy = build_strategy(config)
    model = skeleton(config, task)
    check_folding(config, strategy, model)
    read, tests = ([], None) if records is not None else open_splits(task, config.num_clients)
    rehearse_unbuilt(config, task, model)
    layout = Layout.of(model.parameters, config.block_pattern)
    sizes = {name: parameter.numel() for name, parameter in model.parameters.items()}
    sent = {name: FLOAT_BYTES * size + _HEADER for name, size in sizes.items()}
    strategy.num_rounds = config.num_rounds
    plans = [strategy.plan(number, layout) for number in (1, 2)]
    if records is None:
        numbers: list[int] = client_sizes(config, task).tolist()
    else:
        numbers = [records] * config.num_clients
    values = [] if records is not None else client_values(config, task)
    # Clients of one size have one mechanism.
    of_size = {number: _client(config, number) for number in dict.fromkeys(numbers)}
    clients = [of_size[number] for number in numbers]
    if values:
        named = zip(clients, values, strict=True)
        clients = [replace(client, value=value) for client, value in named]
    coordinates = numbers_per_step(config, strategy, model)
    made = [client.mechanism for client in clients if client.mechanism is not None]
    shapes = {name: tuple(parameter.shape) for name, parameter in model.parameters.items()}
    noisy = noisy_coordinates(plans, layout, shapes, config.local_steps, config.filter)
    if config.secure_sum:
        made = [_together(config, numbers, max(coordinates))]
    ratio = noise_to_signal(config, made, noisy) if made else None
    found = Forecast(
        config=config,
        clients=clients,
        coordinates=round(float(np.mean(coordinates))),
        trained=sum(sizes.values()),
        layers=len(layout.layers),
        blocks=len(layout.blocks),
        memory=step_memory(config, task, model, max(coordinates), max(numbers)),
        bytes_up=round(_uploads(strategy, plans, layout, sent, config.local_steps)),
        bytes_down=sum(sent.values()) + _folded_at_start(config, sent),
        noise_to_signal=ratio,
        worst=worst_client(config, [client.mechanism for client in clients], noisy),
        read=read,
        test_records=tests,
    )
    found.warnings.extend([*_warnings(found), *model_notes(task)])
    return found


def active_per_step(
    config: RunConfig, strategy: FedLoRA, model: AdaptedModel
) -> Iterator[Sequence[str]]:
    """Yield the names of the arrays that each local step of the first two rounds trains.

    Raises
    ------
    InvalidValue
        The strategy refuses the model, e.g. one whose blocks have no name.
    """
    layout = Layout.of(model.parameters, config.block_pattern)
    strategy.num_rounds = config.num_rounds
    plans = [strategy.plan(number, layout) for number in (1, 2)]
    for plan in plans:
        for step in range(config.local_steps):
            yield layout.active(plan, step + 1)


def numbers_per_step(config: RunConfig, strategy: FedLoRA, model: AdaptedModel) -> list[int]:
    """Return how many numbers each local step of the first two rounds trains.

    Raises
    ------
    InvalidValue
        As `active_per_step`.
    """
    active = active_per_step(config, strategy, model)
    return [sum(model.parameters[name].numel() for name in names) for names in active]


def open_splits(task: Task, num_partitions: int) -> tuple[list[str], int]:
    """Open the private and the public records of a simulation, before anything costs time.

    Returns
    -------
    tuple[list[str], int]
        Sentences on the records that are read and left out; and the number of public records.

    Raises
    ------
    InvalidValue
        A split cannot be read.
    ModelFailed
        A user's own task fails.
    """
    lines = reading(task, num_partitions)
    with explained("Opening the public records", "Set another test-split, or correct the task."):
        return lines, len(task.test_records())


def skeleton(config: RunConfig, task: Task) -> AdaptedModel:
    """Return the adapted model on the meta device: names and shapes without weights.

    Raises
    ------
    InvalidValue
        The adapters cannot be attached.
    """
    bare = optional(task, "skeleton")
    with explained(f"Building the model of task {config.task!r}", "Set another model."):
        model: nn.Module = bare() if bare else task.build_model().to("meta")
        with torch.device("meta"):
            return attach(model, lora_spec(config, task), seed=0)


def _client(config: RunConfig, records: int) -> ClientForecast:
    try:
        return ClientForecast(records, calibrated_mechanism(config, records))
    except InvalidValue as error:
        return ClientForecast(records, None, str(error))


def _together(config: RunConfig, numbers: Sequence[int], coordinates: int) -> Mechanism:
    """Return the mechanism of a whole secure sum, on the records of the whole cohort."""
    grid = sum_grid(config, sum(numbers), coordinates)
    asked = cohort_size(config.num_clients, config.fraction_train) / config.num_clients
    records = max(1, round(sum(numbers) * asked))
    q = config.sample_rate
    weights = ClipWeights.configured(config)
    sigma, unit = grid.noise_multiplier, config.unit
    return Mechanism(sigma, config.clip_norm, q * records, records, q, weights, unit)


def _uploads(
    strategy: FedLoRA,
    plans: Sequence[ComponentPlan],
    layout: Layout,
    sizes: Mapping[str, int],
    steps: int,
) -> float:
    return float(
        np.mean(
            [
                sum(
                    sizes[name]
                    for name in layout.trained(plan, steps)
                    if is_shared(name, strategy.shared)
                )
                for plan in plans
            ]
        )
    )


def _folded_at_start(config: RunConfig, sent: Mapping[str, int]) -> int:
    """Return the bytes of the folded pairs of a start, which are as large as the factors."""
    if config.lora_init == RANDOM:
        return 0
    return sum(size for name, size in sent.items() if factor_of(name))


def _warnings(found: Forecast) -> list[str]:
    config, lines = found.config, []
    broken = [(n, c.problem) for n, c in enumerate(found.clients) if c.problem]
    lines += [f"Client {n} cannot keep the promise: {problem}" for n, problem in broken[:3]]
    if len(broken) > 3:
        lines.append(f"{len(broken) - 3} more clients cannot keep it.")
    ratio, worst = found.noise_to_signal, found.worst
    if ratio is not None and worst is not None and worst.decides(ratio):
        lines.append(worst.warning(ratio))
        # One tiny client must not speak for the run: what follows is about the others.
        ratio = worst.without
    if ratio is not None and ratio > MOST_THAT_GAINED:
        lines.append(
            f"A round's noise is {ratio:.1f} times the most that its signal can be. Of the runs "
            f"that this project has measured, none above {MOST_THAT_GAINED:g} ended better than it "
            f"began; other data may differ. More {config.unit}s per client, a larger batch, more "
            "clients, a lower rank, fewer targets or a larger ε bring it down."
        )
    rounds = participation(config)
    if rounds.ends_early:
        lines.append(
            f"The run ends after round {rounds.last_round} of {config.num_rounds}: no client has "
            f"budget left then, since each may join {config.max_rounds} (max-rounds). Raise "
            "max-rounds, or lower num-rounds or fraction-train, to use all rounds."
        )
    return lines
