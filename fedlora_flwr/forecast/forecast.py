"""Forecasts what a run will cost, what it promises and how noisy it is, before it trains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedlora_flwr.config import RunConfig
from fedlora_flwr.data.records import Batch
from fedlora_flwr.errors import FedLoRAError, InvalidValue, explained
from fedlora_flwr.forecast.participation import participation
from fedlora_flwr.layout import Layout, is_shared
from fedlora_flwr.lora.adapters import AdaptedModel, attach
from fedlora_flwr.lora.build import lora_spec
from fedlora_flwr.plan import ComponentPlan
from fedlora_flwr.privacy.calibration import calibrated_mechanism
from fedlora_flwr.privacy.grad_sample import GradSampler
from fedlora_flwr.privacy.mechanism import Mechanism
from fedlora_flwr.server.noise import noise_to_signal, noisy_coordinates
from fedlora_flwr.server.rehearsal import check_folding, rehearse_unbuilt
from fedlora_flwr.server.strategy import build_strategy
from fedlora_flwr.server.sum_step import sum_grid
from fedlora_flwr.strategies import FedLoRA
from fedlora_flwr.strategies.cohort import cohort_size
from fedlora_flwr.tasks.registry import Task, build_task, optional

# None of our measured runs with more noise ended above its start; see docs/results.md and
# `benchmarks.learning`, which measures it. Other data and models may differ.
MOST_THAT_GAINED = 5.0
_BYTES = 4  # fp32
_HEADER = 128  # Bytes before an array in NumPy's format, which Flower's records use.


@dataclass(frozen=True)
class ClientForecast:
    """One client's mechanism, or why it cannot have one.

    Parameters
    ----------
    records : int
        Private records n.
    mechanism : Mechanism or None
        Its noise; ``None`` if the promise cannot be kept.
    problem : str
        Why the promise cannot be kept.
    """

    records: int
    mechanism: Mechanism | None
    problem: str = ""


@dataclass(frozen=True)
class Memory:
    """Bytes of one client's private step.

    Parameters
    ----------
    backbone : int
        Frozen weights, which all clients of a process share.
    trained : int
        Adapters, head, their gradients and the optimizer's state.
    per_record : int
        Per-record gradients of the parameters that train in one step.
    activations : int or None
        Tensors that the forward pass keeps for the backward pass; ``None`` if they cannot be
        counted without running the model.
    """

    backbone: int
    trained: int
    per_record: int
    activations: int | None

    @property
    def total(self) -> int:
        """All of these together."""
        return self.backbone + self.trained + self.per_record + (self.activations or 0)


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
        its averaged gradients can have (see `noise_to_signal`); ``None`` without privacy, or if no
        client can train.
    warnings : list[str]
        Warnings of a run that cannot work, ends early, or has more noise than any that gained.
    """

    config: RunConfig
    clients: list[ClientForecast]
    coordinates: int
    layers: int
    blocks: int
    memory: Memory
    bytes_up: int
    bytes_down: int
    noise_to_signal: float | None
    warnings: list[str] = field(default_factory=list)

    @property
    def broken(self) -> int:
        """Clients whose promise cannot be kept."""
        return sum(client.mechanism is None for client in self.clients)


def forecast(config: RunConfig, records: int | None = None) -> Forecast:
    """Forecast a run without loading weights.

    Parameters
    ----------
    config : RunConfig
        The run.
    records : int, optional
        Private records of each client, the same for all. By default the data set is opened and
        split.

    Raises
    ------
    InvalidValue
        A setting cannot be used, or model or data cannot be found.
    PrivacyViolation, ModelFailed
        The model cannot train (see `fedlora_flwr.server.rehearsal`).
    """
    task = build_task(config.task, config)
    strategy = build_strategy(config)
    model = skeleton(config, task)
    check_folding(strategy, model)
    rehearse_unbuilt(config, task, model)
    layout = Layout.of(model.parameters, config.block_pattern)
    sizes = {name: parameter.numel() for name, parameter in model.parameters.items()}
    sent = {name: _BYTES * size + _HEADER for name, size in sizes.items()}
    strategy.num_rounds = config.num_rounds
    plans = [strategy.plan(number, layout) for number in (1, 2)]
    numbers = _sizes(config, task, records)
    clients = [_client(config, number) for number in numbers]
    active = _active(plans, layout, config.local_steps)
    coordinates = [sum(sizes[name] for name in names) for names in active]
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
        layers=len(layout.layers),
        blocks=len(layout.blocks),
        memory=_memory(config, task, model, max(coordinates), max(numbers)),
        bytes_up=round(_uploads(strategy, plans, layout, sent, config.local_steps)),
        bytes_down=sum(sent.values()),
        noise_to_signal=ratio,
    )
    found.warnings.extend(_warnings(found))
    return found


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


def activation_bytes(task: Task, adapted: AdaptedModel, batch: Batch) -> int | None:
    """Count the bytes that a forward pass keeps for the backward pass, without computing anything.

    It is an upper bound: attention weights are counted, which fused kernels do not keep.

    Parameters
    ----------
    task : Task
        The task with the loss.
    adapted : AdaptedModel
        The model that `skeleton` returned.
    batch : Batch
        Tensors of the shapes of a batch; their values are not read.

    Returns
    -------
    int or None
        Bytes without the model's own parameters; ``None`` if the model reads values.

    Raises
    ------
    FedLoRAError
        The model cannot train: a setting cannot be used, or a layer cannot be clipped.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    kept: dict[int, int] = {}
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        # Without this reference the storage could be freed, and another could get its address,
        # which is the key here.
        held.append(tensor)
        return tensor

    sampler = GradSampler(adapted)
    sampler.num_records = len(next(iter(batch.values())))
    adapted.train()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.device("meta"):
            # Functions see the parameters, or images of them that the mode makes once.
            frozen = [*adapted.model.parameters(), *adapted.model.buffers()]
            images = [mode.from_tensor(tensor) for tensor in frozen]
            shapes = {k: torch.zeros(v.shape, dtype=v.dtype) for k, v in batch.items()}
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                task.losses(adapted.model, shapes)
    except FedLoRAError:
        raise
    except Exception:
        # A user's model may read values of tensors, but here they have none.
        return None
    own = {image.untyped_storage()._cdata for image in (*frozen, *images)}
    return sum(size for name, size in kept.items() if name not in own)


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
    return Mechanism(grid.noise_multiplier, config.clip_norm, q * records, records, q)


def _sizes(config: RunConfig, task: Task, records: int | None) -> list[int]:
    if records is not None:
        return [records] * config.num_clients
    return [
        len(task.client_records(client, config.num_clients)) for client in range(config.num_clients)
    ]


def _active(plans: Sequence[ComponentPlan], layout: Layout, steps: int) -> list[tuple[str, ...]]:
    return [layout.active(plan, step) for plan in plans for step in range(1, steps + 1)]


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


def _memory(
    config: RunConfig, task: Task, model: AdaptedModel, coordinates: int, most: int
) -> Memory:
    trained = sum(p.numel() for p in model.parameters.values())
    everything = sum(p.numel() * p.element_size() for p in model.model.parameters())
    # A value and a gradient; AdamW keeps two moments, momentum one.
    copies = 2 + (2 if config.optimizer.startswith("adamw") else int(config.momentum > 0))
    batch = math.ceil(config.sample_rate * most) if config.secure_sum else config.batch_size
    records = min(batch, config.microbatch_size or batch)
    activations = activation_bytes(task, model, _example(task, records))
    return Memory(
        backbone=everything - _BYTES * trained,
        trained=_BYTES * trained * copies,
        per_record=_BYTES * coordinates * records,
        activations=activations,
    )


def _example(task: Task, records: int) -> Batch:
    """Return a batch of the largest shapes that the task has."""
    made = optional(task, "largest_batch")
    if made is not None:
        found: Batch = made(records)
        return found
    public = task.test_records()
    return public.batch(torch.arange(records) % len(public))


def _warnings(found: Forecast) -> list[str]:
    config, lines = found.config, []
    broken = [(n, c.problem) for n, c in enumerate(found.clients) if c.problem]
    lines += [f"Client {n} cannot keep the promise: {problem}" for n, problem in broken[:3]]
    if len(broken) > 3:
        lines.append(f"{len(broken) - 3} more clients cannot keep it.")
    ratio = found.noise_to_signal
    if ratio is not None and ratio > MOST_THAT_GAINED:
        lines.append(
            f"A round's noise is {ratio:.1f} times the most that its signal can be. Of the runs "
            f"that this project has measured, none above {MOST_THAT_GAINED:g} ended better than it "
            "began; other data may differ. More records per client, a larger batch, more clients, "
            "a lower rank, fewer targets or a larger ε bring it down."
        )
    rounds = participation(config)
    if rounds.ends_early:
        lines.append(
            f"The run ends after round {rounds.last_round} of {config.num_rounds}: no client has "
            f"budget left then, since each may join {config.max_rounds} (max-rounds). Raise "
            "max-rounds, or lower num-rounds or fraction-train, to use all rounds."
        )
    return lines


def as_json(found: Forecast) -> dict[str, Any]:
    """Return a forecast in JSON types."""
    return {
        "task": found.config.task,
        "strategy": found.config.strategy,
        "epsilon": found.config.epsilon if found.config.private else None,
        "delta": found.config.delta,
        "steps": found.config.planned_steps,
        "rounds": asdict(participation(found.config)),
        "clients": [
            {
                "records": client.records,
                "sample_rate": client.mechanism.sample_rate if client.mechanism else None,
                "noise_multiplier": client.mechanism.noise_multiplier if client.mechanism else None,
                "problem": client.problem,
            }
            for client in found.clients
        ],
        "coordinates": found.coordinates,
        "layers": found.layers,
        "blocks": found.blocks,
        "noise_to_signal": found.noise_to_signal,
        "memory_bytes": {
            "backbone": found.memory.backbone,
            "trained": found.memory.trained,
            "per_record_gradients": found.memory.per_record,
            "activations": found.memory.activations,
        },
        "bytes_up": found.bytes_up,
        "bytes_down": found.bytes_down,
        "warnings": found.warnings,
    }
