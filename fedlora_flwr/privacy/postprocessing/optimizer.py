"""The optimizer that moves the factors, and the post-processing of gradients before it.

A client's engine steps with its own noisy sum. Under a secure sum, the server steps with the sum
over all clients. Both use this code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.layout import factor_of
from fedlora_flwr.lora.adapters import AdaptedLinear, AdaptedModel
from fedlora_flwr.plan import A, B
from fedlora_flwr.privacy.postprocessing.adam import NoiseAwareAdamW
from fedlora_flwr.privacy.postprocessing.filters import GradientFilter
from fedlora_flwr.privacy.postprocessing.precondition import precondition


@dataclass(frozen=True)
class OptimizerSettings:
    """Settings of the local optimizer; each factor has its own learning rate.

    Parameters
    ----------
    name : str
        ``"sgd"``; ``"adamw"``, which takes the noise out of its second moment
        (`NoiseAwareAdamW`); or ``"adamw-plain"``, which is `torch.optim.AdamW`.
    lr_a, lr_b, lr_head : float
        Learning rates of A, of B and of the head.
    momentum : float
        Momentum of SGD; ignored by AdamW.
    weight_decay : float
        Weight decay of the active factor.
    precondition : bool
        Multiply each factor's gradient by the inverse of the other's Gram matrix (`precondition`).
    ridge : float
        Added to the diagonal of that Gram matrix.
    proximal_mu : float
        μ of a proximal term μ/2 ‖w − w₀‖², where w₀ is the round's start; 0 for no such term.

    Examples
    --------
    >>> settings = OptimizerSettings("sgd", lr_a=0.1, lr_b=0.5, lr_head=0.5)
    >>> settings.rates
    {'A': 0.1, 'B': 0.5, None: 0.5}
    """

    name: str
    lr_a: float
    lr_b: float
    lr_head: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    precondition: bool = False
    ridge: float = 0.0
    proximal_mu: float = 0.0

    @classmethod
    def in_round(cls, config: RunConfig, server_round: int) -> OptimizerSettings:
        """Return a run's settings in a round, counted from 1; the learning rates depend on it."""
        lr_a, lr_b, lr_head = config.learning_rates(server_round)
        return cls(
            name=config.optimizer,
            lr_a=lr_a,
            lr_b=lr_b,
            lr_head=lr_head,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            precondition=config.precondition,
            ridge=config.ridge,
        )

    @property
    def rates(self) -> dict[str | None, float]:
        """Learning rates by factor; None is the head."""
        return {A: self.lr_a, B: self.lr_b, None: self.lr_head}

    def build(self, groups: Sequence[dict[str, object]]) -> torch.optim.Optimizer:
        """Make a fresh optimizer over parameter groups that have their own ``lr``.

        Raises
        ------
        InvalidValue
            ``name`` is not one of the three.
        """
        if self.name == "sgd":
            return torch.optim.SGD(
                groups, lr=0.0, momentum=self.momentum, weight_decay=self.weight_decay
            )
        if self.name == "adamw":
            return NoiseAwareAdamW(groups, lr=0.0, weight_decay=self.weight_decay)
        if self.name == "adamw-plain":
            return torch.optim.AdamW(groups, lr=0.0, weight_decay=self.weight_decay)
        raise InvalidValue("optimizer", self.name, "'sgd', 'adamw' or 'adamw-plain'")


class PostProcessing:
    """Filters and preconditions privatized gradients; it reads nothing private.

    Parameters
    ----------
    adapted : AdaptedModel
        The model. Its active parameters hold the gradients.
    """

    def __init__(self, adapted: AdaptedModel) -> None:
        self._parameters: Mapping[str, nn.Parameter] = adapted.parameters
        self._partners: dict[str, tuple[AdaptedLinear, str, nn.Parameter]] = {}
        for layer in adapted.layers:
            self._partners[f"{layer.name}.lora_A.weight"] = (layer, A, layer.B)
            self._partners[f"{layer.name}.lora_B.weight"] = (layer, B, layer.A)
        self._anchors: dict[str, Tensor] = {}

    def begin(self, settings: OptimizerSettings) -> None:
        """Keep the arrays that a round starts from, for its proximal term."""
        held = self._parameters.items() if settings.proximal_mu else ()
        self._anchors = {name: p.detach().clone() for name, p in held}

    def groups(self, settings: OptimizerSettings) -> dict[str | None, list[str]]:
        """Return the names of the arrays by factor, in the order of the optimizer's groups."""
        found = {
            factor: [name for name in self._parameters if factor_of(name) == factor]
            for factor in settings.rates
        }
        return {factor: names for factor, names in found.items() if names}

    def optimizer(self, settings: OptimizerSettings) -> torch.optim.Optimizer:
        """Make a fresh optimizer over all arrays, in `groups`, each group with its rate."""
        return settings.build(
            [
                {"params": [self._parameters[name] for name in names], "lr": settings.rates[factor]}
                for factor, names in self.groups(settings).items()
            ]
        )

    def __call__(
        self,
        settings: OptimizerSettings,
        gradient_filter: GradientFilter,
        optimizer: torch.optim.Optimizer | None,
        noise_variance: Callable[[str], float],
    ) -> None:
        """Replace each active parameter's gradient by the one that the optimizer uses.

        Parameters
        ----------
        settings : OptimizerSettings
            Say whether to precondition, and give the strength of the proximal term.
        gradient_filter : GradientFilter
            The filter, with its state.
        optimizer : Optimizer
            If it is a `NoiseAwareAdamW`, it is given the variance of the noise after the filter.
        noise_variance : callable
            Maps an array's name to the variance of the noise in each coordinate of its gradient,
            before the filter.
        """
        for name, p in self._parameters.items():
            if not p.requires_grad or p.grad is None:
                continue
            p.grad = gradient_filter(name, p.grad)
            if name in self._anchors:
                p.grad = p.grad + settings.proximal_mu * (p.detach() - self._anchors[name])
            if settings.precondition and name in self._partners:
                layer, factor, other = self._partners[name]
                p.grad = precondition(p.grad, other, factor, layer.scaling, settings.ridge)
            if isinstance(optimizer, NoiseAwareAdamW):
                gain = gradient_filter.noise_gain(name)
                optimizer.noise_variance[p] = noise_variance(name) * gain
