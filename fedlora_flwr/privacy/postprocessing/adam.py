"""AdamW that takes the privacy noise out of its second moment.

Noise of variance φ adds φ to every coordinate of Adam's second moment. Where φ outweighs the
gradient, all coordinates get the same denominator, and Adam becomes SGD with momentum. DP-AdamBC
(arXiv 2312.14334) subtracts φ, a public constant. The lower limit of the difference is our own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fedlora_flwr.errors import InvalidValue


class NoiseAwareAdamW(torch.optim.Optimizer):
    """AdamW whose denominator estimates the gradient without its noise.

    With v̂ the bias-corrected second moment and Φ its expected noise content, the step divides by
    ``sqrt(max(v̂ - Φ, floor)) + eps``. The floor is the standard error of v̂ under white Gaussian
    noise, ``Φ·sqrt(2·Σw²)`` with w the normalized weights of the moving average; this is exact
    where the noise variance is constant. A difference below the floor cannot be told from zero, and
    to divide by less would amplify noise. At a parameter's first step the floor is √2·Φ.

    The optimizer reads released gradients and public constants only. It assumes that the noise is
    independent between steps; for correlated noise the floor is too low. Without noise, it is
    `torch.optim.AdamW`.

    Parameters
    ----------
    params : iterable
        Parameters, or groups of them that may carry settings of their own.
    lr : float (default: 1e-3)
        Learning rate.
    betas : tuple[float, float] (default: (0.9, 0.999))
        Decay of the moving averages of the gradient and of its square.
    eps : float (default: 1e-8)
        Added to the denominator.
    weight_decay : float (default: 0.0)
        Decoupled weight decay, as a share of the learning rate.

    Attributes
    ----------
    noise_variance : dict[Tensor, float]
        By parameter, the variance of the noise in each coordinate of the gradient at the next step;
        0 for a parameter that is missing. The caller sets it before each step.

    Raises
    ------
    InvalidValue
        A default is out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        for key, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise InvalidValue(key, value, "a number of at least 0")
        if not all(0 <= beta < 1 for beta in betas):
            raise InvalidValue("betas", betas, "two numbers of at least 0 and below 1")
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        self.noise_variance: dict[Tensor, float] = {}

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Move every parameter that has a gradient; leave the others and their state alone.

        Parameters
        ----------
        closure : callable, optional
            Evaluates the model, fills the gradients and returns the loss.

        Returns
        -------
        float or None
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)
        return loss

    def _move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        (beta1, beta2), lr, state = group["betas"], group["lr"], self.state[parameter]
        # Half precision has too small a range and too few digits for squares and their averages.
        grad = parameter.grad.to(torch.promote_types(parameter.dtype, torch.float32))  # type: ignore[union-attr]
        if not state:
            state.update(step=0, noise=0.0)
            state.update(exp_avg=torch.zeros_like(grad), exp_avg_sq=torch.zeros_like(grad))
        state["step"] += 1
        state["noise"] *= beta2
        state["noise"] += (1 - beta2) * self.noise_variance.get(parameter, 0.0)
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)

        correction = 1 - beta2 ** state["step"]
        noise = state["noise"] / correction
        signal = state["exp_avg_sq"].div(correction).sub_(noise)
        signal.clamp_(min=noise * relative_error(beta2, state["step"]))
        denominator = signal.sqrt_().add_(group["eps"])
        if group["weight_decay"]:
            parameter.mul_(1 - lr * group["weight_decay"])
        size = lr / (1 - beta1 ** state["step"])
        parameter.addcdiv_(state["exp_avg"], denominator, value=-size)


def relative_error(beta: float, steps: int) -> float:
    """Return the standard error of v̂ divided by its noise content Φ, after a number of steps.

    It is sqrt(2·Σw²): each squared Gaussian has variance 2φ², and w_i ∝ β^(steps - i).

    Parameters
    ----------
    beta : float
        Decay of the moving average of squares.
    steps : int
        Steps so far, from 1.
    """
    return math.sqrt(2 * (1 - beta) / (1 + beta) * (1 + beta**steps) / (1 - beta**steps))
