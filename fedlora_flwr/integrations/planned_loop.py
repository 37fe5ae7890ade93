"""A project's own training loop under a plan. It is *not* private: nothing is clipped or noised.

`follow_plan` writes the server's arrays into the model and hooks the project's optimizer: each step
then changes only what the plan says. The loop itself stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from flwr.app import ConfigRecord, Message
from numpy.typing import NDArray
from torch import nn
from torch.optim import Optimizer

from fedlora_flwr.errors import FedLoRAError, InvalidValue, unknown
from fedlora_flwr.layout import Layout, is_folded
from fedlora_flwr.plan import BOTH, ComponentPlan
from fedlora_flwr.wire import NAMES, PLAN, SHARE, START_FROM
from fedlora_flwr.wire.arrays import to_numpy
from fedlora_flwr.wire.records import train_records
from fedlora_flwr.wire.report import Report

Scalars = dict[str, bool | bytes | float | int | str]

# The parts that PEFT adds to names. Servers send names with or without the first of them.
_PEFT = re.compile(
    r"^base_model\.model\.|\.modules_to_save(\.\w+)?|(?<=\.lora_[AB])\.\w+(?=\.weight)"
)


class PlannedRound:
    """One round of a project's own loop: from its first optimizer step to `reply`.

    `follow_plan` and `follow_fit` make it. Between two optimizer steps, exactly the arrays of the
    next step require gradients, so momentum and weight decay never change the others.

    Parameters
    ----------
    arrays : Mapping[str, ndarray]
        The server's arrays, by name.
    config : Mapping
        The server's configuration. Without a plan in it, everything trains and is returned.
    model : nn.Module
        The project's model. Its LoRA factors are called ``….lora_A.weight`` and
        ``….lora_B.weight``, as in PEFT, with or without an adapter's name.
    optimizer : Optimizer
        The optimizer that the loop steps. It must hold every array.
    blocks : str
        The strategy's ``blocks``, if the project sets it.

    Raises
    ------
    InvalidValue
        Arrays, model, optimizer and plan do not fit each other.
    """

    def __init__(
        self,
        arrays: Mapping[str, NDArray[np.generic]],
        config: Mapping[str, object],
        model: nn.Module,
        optimizer: Optimizer,
        blocks: str = "",
    ) -> None:
        _check_supported(arrays, config)
        layout = Layout.of(arrays, blocks)
        self._parameters = _parameters_of(model, arrays)
        _check_optimizer(optimizer, self._parameters)
        self._plan = _plan(config, layout)
        self._layout, self._steps = layout, 0
        with torch.no_grad():
            for name, array in arrays.items():
                self._parameters[name].copy_(torch.from_numpy(np.array(array)))
        self._hooks = [
            optimizer.register_step_post_hook(lambda *_: self._after_step()),
        ]
        self._activate()

    def upload(self) -> dict[str, NDArray[np.float32]]:
        """End the round and return what trained, fp32, by the server's names.

        Raises
        ------
        FedLoRAError
            The optimizer took no step.
        """
        if not self._steps:
            raise FedLoRAError(
                "The optimizer took no step in this round: give follow_plan the optimizer that the "
                "loop steps, and records to train on."
            )
        for hook in self._hooks:
            hook.remove()
        for parameter in self._parameters.values():
            parameter.requires_grad_(True)
        names = self._layout.names if self._plan is None else self._trained(self._plan)
        return {
            name: np.array(self._parameters[name].detach().to("cpu", torch.float32).numpy())
            for name in names
        }

    def fit_result(
        self, num_examples: int, metrics: Mapping[str, bool | bytes | float | int | str]
    ) -> tuple[list[NDArray[np.float32]], int, Scalars]:
        """End the round and return what a NumPyClient's ``fit`` returns."""
        report = Report.of_scalars(metrics, num_examples, self.upload())
        return report.to_fit()

    def reply(self, to: Message, metrics: Mapping[str, float | int]) -> Message:
        """End the round and answer the message that began it.

        Parameters
        ----------
        to : Message
            The message that began the round.
        metrics : Mapping[str, float]
            The project's own metrics, including ``num-examples``. They are sent without protection.
        """
        report = Report.of_words(self.upload(), metrics, {})
        return Message(train_records(report), reply_to=to)

    def _trained(self, plan: ComponentPlan) -> tuple[str, ...]:
        return self._layout.trained(plan, self._steps)

    def _activate(self) -> None:
        """Let exactly the arrays of the next step require gradients."""
        plan = self._plan or ComponentPlan.uniform(BOTH)
        active = set(self._layout.active(plan, self._steps + 1))
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(name in active)
            if name not in active:
                parameter.grad = None

    def _after_step(self) -> None:
        self._steps += 1
        self._activate()


def follow_plan(
    message: Message, model: nn.Module, optimizer: Optimizer, blocks: str = ""
) -> PlannedRound:
    """Let a project's own loop obey the plan of a Message-API strategy. *Not* private.

    Call it before the loop, with the received message and the optimizer that the loop steps. After
    the loop, return ``planned.reply(message, metrics)``. If the message asks for a proximal term
    (``"proximal-mu"``), the loop has to add it.

    Parameters
    ----------
    message : Message
        The train message: one ArrayRecord, one ConfigRecord.
    model, optimizer, blocks
        See `PlannedRound`.

    Examples
    --------
    >>> from flwr.app import Array, ArrayRecord
    >>> from peft import LoraConfig, get_peft_model
    >>> from fedlora_flwr import LocalGrid, RoLoRA
    >>> adapter = LoraConfig(r=1, target_modules=["0"])
    >>> model = get_peft_model(nn.Sequential(nn.Linear(3, 2)), adapter)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> def app(message, context):
    ...     planned = follow_plan(message, model, optimizer)
    ...     model(torch.ones(4, 3)).sum().backward()
    ...     optimizer.step()
    ...     return planned.reply(message, {"num-examples": 4})
    >>> a, b = Array(np.ones((1, 3))), Array(np.zeros((2, 1)))
    >>> start = ArrayRecord({"0.lora_A.weight": a, "0.lora_B.weight": b})
    >>> with LocalGrid(app, 1, {}).running() as grid:
    ...     strategy = RoLoRA(min_train_nodes=1, min_available_nodes=1)
    ...     result = strategy.start(grid, start, num_rounds=1)
    >>> {name: round(float(array.numpy().sum()), 1) for name, array in result.arrays.items()}
    {'0.lora_A.weight': 3.0, '0.lora_B.weight': -19.2}
    """
    (arrays,) = message.content.array_records.values() or [{}]
    (config,) = message.content.config_records.values() or [ConfigRecord()]
    values = {name: to_numpy(array) for name, array in arrays.items()}
    return PlannedRound(values, config, model, optimizer, blocks)


def follow_fit(
    parameters: Sequence[NDArray[np.generic]],
    config: Mapping[str, object],
    model: nn.Module,
    optimizer: Optimizer,
    blocks: str = "",
) -> PlannedRound:
    """Let the loop of a NumPyClient's ``fit`` obey the plan. *Not* private.

    Parameters
    ----------
    parameters, config
        The arguments with which `LegacyStrategy` or `bridge` called ``fit``.
    model, optimizer, blocks
        See `PlannedRound`.

    Raises
    ------
    InvalidValue
        The configuration does not name the arrays.

    Examples
    --------
    >>> from peft import LoraConfig, get_peft_model
    >>> adapter = LoraConfig(r=1, target_modules=["0"])
    >>> model = get_peft_model(nn.Sequential(nn.Linear(3, 2)), adapter)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> config = {"array-names": "0.lora_A.weight,0.lora_B.weight", "plan": "B"}
    >>> planned = follow_fit([np.ones((1, 3)), np.zeros((2, 1))], config, model, optimizer)
    >>> model(torch.ones(4, 3)).sum().backward()
    >>> optimizer.step()
    >>> arrays, _, metrics = planned.fit_result(4, {})
    >>> len(arrays), metrics["array-names"]
    (1, '0.lora_B.weight')
    """
    names = [name for name in str(config.get(NAMES, "")).split(",") if name]
    if len(names) != len(parameters):
        raise InvalidValue(
            NAMES,
            config.get(NAMES),
            f"names of {len(parameters)} arrays: wrap the server's strategy in LegacyStrategy, or "
            "serve a Message-API strategy with ClientApp(client_fn, mods=[bridge])",
        )
    return PlannedRound(dict(zip(names, parameters, strict=True)), config, model, optimizer, blocks)


def _plan(config: Mapping[str, object], layout: Layout) -> ComponentPlan | None:
    if PLAN not in config:
        return None
    plan = ComponentPlan.parse(str(config[PLAN]))
    try:
        layout.check_plan(plan)
    except InvalidValue as error:
        allowed = (
            f"{error.allowed}, for blocks {layout.blocks}; give follow_plan the strategy's blocks"
        )
        raise InvalidValue(PLAN, str(plan), allowed) from error
    return plan


def _check_supported(arrays: Mapping[str, object], config: Mapping[str, object]) -> None:
    if SHARE in config:
        allowed = "no such key: FedSALoRA needs LoRAClient, which keeps B on the client's disk"
        raise InvalidValue(SHARE, config[SHARE], allowed)
    if START_FROM in config:
        allowed = "no such key: MRMTL needs LoRAClient, which keeps a model on the client's disk"
        raise InvalidValue(START_FROM, config[START_FROM], allowed)
    if folded := [name for name in arrays if is_folded(name)]:
        raise InvalidValue(
            "array",
            folded[0],
            "LoRA factors and a head: FLoRA, FedExLoRA and FFASeeds need LoRAClient",
        )


def _parameters_of(
    model: nn.Module, arrays: Mapping[str, NDArray[np.generic]]
) -> dict[str, nn.Parameter]:
    """Return the parameter of each array.

    Refuse an array without a parameter of its shape, and a trainable parameter without an array.
    """
    own = {
        _PEFT.sub("", name): parameter
        for name, parameter in model.named_parameters()
        if ".original_module." not in name
    }
    found = {}
    for name, array in arrays.items():
        plain = _PEFT.sub("", name)
        if plain not in own:
            trainable = [n for n, p in own.items() if p.requires_grad]
            before = "an array of this model: "
            raise unknown("array", plain, trainable, before=before, value=name)
        if array.shape != tuple(own[plain].shape):
            raise InvalidValue(f"shape of {name}", array.shape, str(tuple(own[plain].shape)))
        found[name] = own[plain]
    known = {id(parameter) for parameter in found.values()}
    for name, parameter in own.items():
        if parameter.requires_grad and id(parameter) not in known:
            raise InvalidValue(
                "trainable parameter", name, "one of the server's arrays: freeze it, or send it too"
            )
    return found


def _check_optimizer(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in parameters.items():
        if id(parameter) not in held:
            raise InvalidValue(
                "optimizer", type(optimizer).__name__, f"one over all arrays; it lacks {name!r}"
            )
