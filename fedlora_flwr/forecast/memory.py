"""The memory of one client's private step, known before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.unit import USER
from fedlora_flwr.data.records import Batch
from fedlora_flwr.errors import FedLoRAError
from fedlora_flwr.lora.adapters import AdaptedModel
from fedlora_flwr.privacy.grad_sample import GradSampler
from fedlora_flwr.tasks.registry import Task, optional

FLOAT_BYTES = 4  # fp32


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
        Gradients by record of what trains in one step.
    activations : int or None
        What the forward pass keeps for the backward pass; ``None`` where it cannot be counted
        without running the model.
    """

    backbone: int
    trained: int
    per_record: int
    activations: int | None

    @property
    def total(self) -> int:
        """All of it."""
        return self.backbone + self.trained + self.per_record + (self.activations or 0)

    def as_json(self) -> dict[str, int | None]:
        """Return it in JSON types, all in bytes."""
        return {
            "backbone": self.backbone,
            "trained": self.trained,
            "per_record_gradients": self.per_record,
            "activations": self.activations,
        }


def step_memory(
    config: RunConfig, task: Task, model: AdaptedModel, coordinates: int, most: int
) -> Memory:
    """Work out what one client's private step needs.

    Parameters
    ----------
    config : RunConfig
        The run.
    task : Task
        What is learned.
    model : AdaptedModel
        As of `fedlora_flwr.forecast.forecast.skeleton`.
    coordinates : int
        Most numbers that train in one step.
    most : int
        Records, or users, of the largest client.
    """
    trained = sum(p.numel() for p in model.parameters.values())
    everything = sum(p.numel() * p.element_size() for p in model.model.parameters())
    # A value and a gradient; AdamW keeps two moments, momentum one.
    copies = 2 + (2 if config.optimizer.startswith("adamw") else int(config.momentum > 0))
    batch = math.ceil(config.sample_rate * most) if config.secure_sum else config.batch_size
    units = min(batch, config.microbatch_size or batch)
    # A pass holds records of several users, and the sums of these users are held as well.
    grouped = config.unit == USER
    joined = batch * (config.max_records_per_user if grouped else 1)
    records = min(joined, config.microbatch_size or joined)
    # Each view of a picture passes through the model.
    activations = activation_bytes(task, model, _example(task, records * config.views))
    return Memory(
        backbone=everything - FLOAT_BYTES * trained,
        trained=FLOAT_BYTES * trained * copies,
        per_record=FLOAT_BYTES * coordinates * (records + units * grouped),
        activations=activations,
    )


def activation_bytes(task: Task, adapted: AdaptedModel, batch: Batch) -> int | None:
    """Count what a forward pass keeps for the backward pass, without computing anything.

    Attention counts as if its weights were kept, which fused kernels avoid: an upper bound.

    Parameters
    ----------
    task : Task
        Whose loss is taken.
    adapted : AdaptedModel
        As of `skeleton`.
    batch : Batch
        Tensors of the shapes of a batch; their values are not read.

    Returns
    -------
    int or None
        Bytes, the model's own parameters left out; ``None`` where the model looks at values.

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
        # A storage that is freed would give its address, its name here, to another.
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
        # A user's model may read values, which do not exist here.
        return None
    own = {image.untyped_storage()._cdata for image in (*frozen, *images)}
    return sum(size for name, size in kept.items() if name not in own)


def _example(task: Task, records: int) -> Batch:
    """Return a batch of the largest shapes that the task has."""
    made = optional(task, "largest_batch")
    if made is not None:
        found: Batch = made(records)
        return found
    public = task.test_records()
    return public.batch(torch.arange(records) % len(public))
