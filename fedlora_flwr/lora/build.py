"""A task's backbone with fresh adapters, on the configured device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.settled import check_settled
from fedlora_flwr.errors import InvalidValue, explained
from fedlora_flwr.lora.adapters import AdaptedModel, LoRASpec, attach
from fedlora_flwr.lora.exported import DRAWN, outermost
from fedlora_flwr.lora.gradient_checkpointing import checkpoint_gradients
from fedlora_flwr.lora.precision import run_in_bf16
from fedlora_flwr.randomness import stream_seed

if TYPE_CHECKING:
    from fedlora_flwr.tasks.registry import Task


def build_adapted(config: RunConfig, task: Task) -> AdaptedModel:
    """Build the task's backbone with fresh adapters on the configured device.

    Raises
    ------
    InvalidValue
        The device does not exist here, the precision is not settled, the adapters cannot be
        attached, or the model has no gradient checkpointing.
    ModelFailed
        The model cannot be built, or does not fit on the device.
    """
    check_settled(config)
    device = resolve_device(config.device)
    advice = "Set another model, quantization or device."
    with explained(f"Building the model of task {config.task!r}", advice):
        model = task.build_model()
        # A quantized backbone is already on its device and must not be moved.
        model = model if getattr(model, "is_quantized", False) else model.to(device)
        spec = lora_spec(config, task, getattr(model, DRAWN, ()))
        adapted = attach(model, spec, stream_seed(config.seed, "adapters"))
    if config.gradient_checkpointing:
        checkpoint_gradients(adapted)
    if config.precision == "bf16":
        run_in_bf16(adapted.model)
    return adapted


def lora_spec(config: RunConfig, task: Task, drawn: tuple[str, ...] = ()) -> LoRASpec:
    """Return the adapters to attach to a task's backbone.

    Parameters
    ----------
    config : RunConfig
        The run's configuration.
    task : Task
        The task; its head trains if the run says so.
    drawn : tuple[str, ...]
        Names of modules besides the head whose weights are in no checkpoint.

    Raises
    ------
    InvalidValue
        The task's targets are not one text, or its head is not a tuple of texts.
    """
    # A user's own task may hold values of any type.
    targets: Any = config.lora_targets or task.lora_targets
    head: Any = task.head
    if not isinstance(targets, str):
        allowed = "one regular expression for whole names of modules, such as '.*(query|value)'"
        raise InvalidValue(f"lora_targets of task {task.name!r}", targets, allowed)
    if isinstance(head, str) or not all(isinstance(name, str) for name in head):
        allowed = "a tuple of the names of modules, such as ('classifier',), or ()"
        raise InvalidValue(f"head of task {task.name!r}", head, allowed)
    return LoRASpec(
        rank=config.rank,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        targets=targets,
        head=task.head if config.train_head else (),
        rslora=config.rslora,
        backbone_dropout=config.backbone_dropout,
        drawn=outermost((*task.head, *drawn)),
    )


def resolve_device(name: str) -> torch.device:
    """Return the device called ``name``; ``"auto"`` prefers a GPU.

    Raises
    ------
    InvalidValue
        This machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidValue("device", name, "'auto', 'cpu' or a device of this machine") from error
    return device
