"""One step on made-up records, to find a model that cannot train before the run starts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.sections.lora import LoRASection
from fedlora_flwr.config.sections.training import TrainingSection
from fedlora_flwr.config.settled import check_settled
from fedlora_flwr.data.records import Records, TensorRecords
from fedlora_flwr.errors import PrivacyViolation, explained
from fedlora_flwr.lora.adapters import AdaptedModel, attach
from fedlora_flwr.lora.build import lora_spec
from fedlora_flwr.lora.precision import run_in_bf16
from fedlora_flwr.lora.seeded import seeded
from fedlora_flwr.lora.weight_starts import check_start, folded_shapes
from fedlora_flwr.privacy.engine import OptimizerSettings, PrivateEngine
from fedlora_flwr.privacy.mechanism import Mechanism
from fedlora_flwr.privacy.noise import SeededNoise
from fedlora_flwr.tasks.registry import Task, optional
from fedlora_flwr.tasks.views import training_losses

if TYPE_CHECKING:
    from fedlora_flwr.strategies import FedLoRA

# Parameters of a model that is built for nothing but a rehearsal, and of one that is tried whole.
_LARGEST, _SMALL = 200_000_000, 2_000_000

_ADVICE = (
    "No client could train this model. Set another model, pooling, lora-targets or max-length. If "
    "memory ran out, set a smaller max-length or image-size."
)


def check_folding(config: LoRASection, strategy: FedLoRA, adapted: AdaptedModel) -> None:
    """Refuse a method or a start that cannot use the model, e.g. changes weights that must not.

    Parameters
    ----------
    config : LoRASection
        Its ``lora-init``.
    strategy : FedLoRA
        The method.
    adapted : AdaptedModel
        The model, which may be on the meta device.

    Raises
    ------
    InvalidValue
        The method or the start folds into weights, and a layer's weight is quantized or another's
        too; the start needs a lower rank; or the method refuses the model.
    """
    check_start(adapted, config.lora_init)
    if strategy.folds:
        adapted.folded.check_weights()
    shapes = {name: tuple(parameter.shape) for name, parameter in adapted.parameters.items()}
    strategy.check_model({**shapes, **folded_shapes(adapted, config.lora_init)})


def rehearse(
    config: TrainingSection, task: Task, adapted: AdaptedModel, *, whole: bool = True
) -> None:
    """Check that clients can train and measure a model; it is left as it was.

    Two records pass through it, are told apart, and take one step without noise. They are made up,
    or public where a task makes none up. No private record is read.

    Parameters
    ----------
    config : TrainingSection
        Whether pictures are augmented.
    task : Task
        Whose loss is taken.
    adapted : AdaptedModel
        The model, on the device where it trains.
    whole : bool (default: True)
        Whether more is done than the one pass. The rest takes about as long as thirty records.

    Raises
    ------
    InvalidValue
        A setting cannot be used.
    PrivacyViolation
        The model does not treat each record on its own, or a layer cannot be clipped.
    ModelFailed
        The model or the task's loss raises anything else.
    """
    with explained("A private step on two made-up records", _ADVICE), _as_it_was(adapted):
        records = _records(task)
        engine = PrivateEngine(adapted, training_losses(config, task))
        count, names = min(len(records), 2), list(adapted.parameters)
        mechanism = Mechanism(0.0, 1.0, count, count)
        still = OptimizerSettings("sgd", lr_a=0.0, lr_b=0.0, lr_head=0.0)
        try:
            engine.gradients_by_record(records, torch.arange(count), names)
            if whole:
                engine.start_round(mechanism, still, SeededNoise(0))
                engine.step(records, torch.arange(count), names)
        except PrivacyViolation as error:
            advice = "Choose other layers with lora-targets, or another model."
            raise PrivacyViolation(f"{error} {advice}") from error


def rehearse_unbuilt(config: RunConfig, task: Task, skeleton: AdaptedModel) -> None:
    """Do the same with random weights on the CPU, so that no checkpoint is read.

    A model of more than 2 million parameters makes one pass and no more, and one of more than 200
    million is not built: `rehearse` finds the rest, before the first round.

    Parameters
    ----------
    config : RunConfig
        The run.
    task : Task
        Whose model is built.
    skeleton : AdaptedModel
        The model on the meta device.

    Raises
    ------
    FedLoRAError
        As `rehearse`.
    """
    if not is_large(skeleton):
        rehearse(config, task, build_unread(config, task), whole=_size(skeleton) <= _SMALL)


def build_unread(config: RunConfig, task: Task) -> AdaptedModel:
    """Build a model on the CPU with random weights where the task can, so without a checkpoint.

    Raises
    ------
    FedLoRAError
        The model cannot be built, or the adapters cannot be attached.
    """
    check_settled(config)
    with seeded(0), explained("Building the model", _ADVICE):
        unread = optional(task, "skeleton") if optional(task, "made_up_batch") else None
        model = task.build_model() if unread is None else unread("cpu")
        adapted = attach(model, lora_spec(config, task), seed=0)
    if config.precision == "bf16":
        run_in_bf16(adapted.model)
    return adapted


def is_large(skeleton: AdaptedModel) -> bool:
    """Return whether a model has too many weights to be built before a run needs them."""
    return _size(skeleton) > _LARGEST


def _size(adapted: AdaptedModel) -> int:
    return sum(parameter.numel() for parameter in adapted.model.parameters())


def _records(task: Task) -> Records:
    made_up = optional(task, "made_up_batch")
    return task.test_records() if made_up is None else TensorRecords(made_up(2))


@contextmanager
def _as_it_was(adapted: AdaptedModel) -> Iterator[None]:
    """Restore a model's values, modes and ways of computing afterward."""
    model = adapted.model
    modes = [(module, module.training) for module in model.modules()]
    forwards = [(module, vars(module).get("forward")) for module in model.modules()]
    values = {name: p.detach().clone() for name, p in adapted.parameters.items()}
    try:
        with seeded(0):
            yield
    finally:
        for module, training in modes:
            module.training = training
        for module, forward in forwards:
            vars(module).pop("forward", None)
            if forward is not None:
                vars(module)["forward"] = forward
        with torch.no_grad():
            for name, parameter in adapted.parameters.items():
                parameter.copy_(values[name])
                parameter.requires_grad_(True)
                parameter.grad = parameter.grad_sample = None  # type: ignore[attr-defined]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
