"""What a client says of its blocks in AS-LoRA (arXiv 2605.05769): expected decrease of the loss.

Scores read privatised gradients, the parameters that these moved and public constants only, so
they are post-processing, at no privacy cost. The published code probes curvature with raw losses
on a private batch, which is not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedlora_flwr.errors import InvalidValue, unknown

CURVATURES = ("none", "secant")


@dataclass
class _Sums:
    """Sums over the steps of one array, and its last step where a secant needs it."""

    steps: int = 0
    energy: float = 0.0
    secant: float = 0.0
    movement: float = 0.0
    last: tuple[Tensor, Tensor, float] | None = None


class BlockScores:
    """Scores of the factors that trained in one client's round, one a block.

    A tensor's ``e = ‖g‖² - numel·variance``, averaged over its steps, estimates without bias the
    squared norm of the mean clipped gradient of a batch. A block's score is the sum over its
    tensors of ``η·e·(1 - ½·η·max(κ, 0))``, where η is the factor's learning rate and κ the block's
    curvature along the path. Where both factors of a block trained, both count.

    No score is clamped at zero here. Noise alone gives positive and negative estimates that cancel
    in the mean over clients; clamping each would leave a positive bias that grows with √numel. So
    the server clamps the mean.

    The secant estimate of κ is ``Σ⟨g_k - g_{k-1}, Δθ⟩ / Σ‖Δθ‖²`` over consecutive observations of
    all the block's tensors, less the noise's expected share of the numerator: plain SGD moves by
    ``Δθ = -η·g_{k-1}``, so the noise ξ in g_{k-1} adds ``E⟨-ξ, -η·ξ⟩ = η·numel·variance``. Valid
    for plain SGD only, which the caller must see to: momentum, Adam, a filter or a preconditioner
    moves by something else. The noise of sampling batches has a private size, so it stays in κ,
    and raises it.

    Parameters
    ----------
    block_of : Mapping[str, int]
        Block of every array of a LoRA factor, from 0. Other arrays, e.g. the head's, do not count.
    num_blocks : int
        Number of blocks.
    rates : Mapping[str, float]
        Learning rate η of every array in ``block_of``; others are ignored.
    curvature : str (default: "none")
        ``"none"`` for κ = 0, or ``"secant"``, which keeps two copies of every active array.

    Raises
    ------
    InvalidValue
        The curvature has another name, or an array is in no block of the model.
    """

    def __init__(
        self,
        block_of: Mapping[str, int],
        num_blocks: int,
        rates: Mapping[str, float],
        curvature: str = "none",
    ) -> None:
        if curvature not in CURVATURES:
            raise unknown("curvature", curvature, CURVATURES)
        for name, block in block_of.items():
            if not 0 <= block < num_blocks:
                raise InvalidValue(f"block of {name!r}", block, f"0 to {num_blocks - 1}")
        self._rates = {name: float(rates[name]) for name in block_of}
        self._secant = curvature == "secant"
        self._arrays = [[n for n in block_of if block_of[n] == i] for i in range(num_blocks)]
        self._sums: dict[str, _Sums] = {}

    def observe(self, name: str, grad: Tensor, value: Tensor, noise_variance: float) -> None:
        """Take in an array's local step, before the parameter moves.

        Parameters
        ----------
        name : str
            The array's name.
        grad : Tensor
            Its privatised gradient, divided by the expected batch size b, unfiltered. Neither it
            nor ``value`` is written to or kept.
        value : Tensor
            The parameter itself, shaped like ``grad``.
        noise_variance : float
            Variance of the noise in each coordinate of ``grad``, (σC/b)².
        """
        if name not in self._rates:
            return
        sums = self._sums.setdefault(name, _Sums())
        grad, value = grad.detach(), value.detach()
        sums.steps += 1
        sums.energy += float(grad.double().square().sum()) - grad.numel() * noise_variance
        if not self._secant:
            return
        if sums.last is not None:
            last_grad, last_value, last_variance = sums.last
            moved = value.double() - last_value.double()
            sums.secant += float(((grad.double() - last_grad.double()) * moved).sum())
            sums.secant -= self._rates[name] * grad.numel() * last_variance
            sums.movement += float(moved.square().sum())
        sums.last = (grad.clone(), value.clone(), noise_variance)

    def result(self) -> list[float]:
        """Return the score of each block; 0.0 for a block that nothing was observed for."""
        return [self._score([n for n in names if n in self._sums]) for names in self._arrays]

    def _score(self, names: list[str]) -> float:
        movement = math.fsum(self._sums[name].movement for name in names)
        secant = math.fsum(self._sums[name].secant for name in names)
        kappa = max(secant / movement, 0.0) if movement > 0 else 0.0
        # fsum rounds once, so that the order of arrays cannot matter.
        return math.fsum(
            self._rates[name]
            * (self._sums[name].energy / self._sums[name].steps)
            * (1 - 0.5 * self._rates[name] * kappa)
            for name in names
        )
