"""Clip each record to norm 1, add noise of deviation σ, and only then multiply by the clip norm.

In units of the clip norm, clipped sums and noise are numbers near 1. No clip norm, however small or
large, can therefore round the noise to zero or a record's share to infinity. The factor that is
applied after the noise is public, so an overflow at that point depends on the noisy sum alone.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fedlora_flwr.lora.wide_numbers import with_fp64
from fedlora_flwr.privacy.noise import NoiseSource
from fedlora_flwr.privacy.units import add_up

_handlers = list(logging.getLogger().handlers)
from opacus.optimizers import DPOptimizer  # noqa: E402

# Opacus installs a handler on the root logger when imported, which prints every line twice.
logging.getLogger().handlers[:] = _handlers

# Rounding changes each coordinate of a clipped gradient by at most half a machine epsilon. A
# gradient is cut to 1 minus four epsilons, so its norm is at most 1 after rounding.
_SLACK = 4
_COLUMNS = 1 << 14  # On a CPU: so few columns at once that their fp64 copies stay in its cache.


class NoisyOptimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus' optimizer with our noise source, and one row per record for all tensors together.

    Opacus loops over the tensors several times. With a hundred adapters on a GPU, these loops are
    most of the extra time of a private step over an ordinary one.

    Parameters
    ----------
    *args, **kwargs
        As for Opacus' ``DPOptimizer``.
    source : NoiseSource
        Where the noise comes from.
    weights : Sequence[float], optional
        For each parameter group, what its gradients are multiplied by before they are clipped, and
        divided by after the noise; by default 1 (see `ClipWeights`).

    Attributes
    ----------
    summed : Tensor or None
        Sum of the clipped weighted gradients so far, in units of the clip norm, fp32 or wider,
        shape (D,): the coordinates of all active tensors, in the optimizer's order. None before the
        first.
    gathered : Tensor or None
        Weighted mean gradients of units of several records, shape (units, D), as far as `gather`
        has added them up. None where each record is a unit.
    """

    def __init__(
        self,
        *args: object,
        source: NoiseSource,
        weights: Sequence[float] | None = None,
        **kwargs: object,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._weights = weights
        self._source = source
        self.summed: Tensor | None = None
        self.gathered: Tensor | None = None

    @property
    def unit(self) -> float:
        """The clip norm C as the unit of ``summed``; 1 where nothing is clipped."""
        return self.max_grad_norm if math.isfinite(self.max_grad_norm) else 1.0

    def clip_and_accumulate(self) -> None:
        """Clip the gradient of each record, or of each gathered unit, and add it to the sum.

        If any entry of a gradient is not finite, the whole gradient counts as zero. Its share of
        the sum then has norm 1 at most, and it cannot ruin the release. Without a clip norm such
        entries stay in the sum.
        """
        rows = self.rows()
        if math.isfinite(self.max_grad_norm):
            factors = clip_factors(row_norms(rows), self.max_grad_norm, rows.dtype)
            factors = factors.to(rows.device)
            # The factor of a record with such an entry is 0, but 0 times infinity would be NaN.
            rows.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        else:
            factors = rows.new_ones(len(rows))
        clipped = factors @ rows
        self.summed = clipped if self.summed is None else self.summed + clipped

    def rows(self) -> Tensor:
        """Return weighted gradients, one row per unit: (units, D).

        They are those of the records of the current pass, or of the units that have been gathered.
        Whoever clips these rows bounds the sensitivity under any weights.
        """
        return self._by_record() if self.gathered is None else self.gathered

    def gather(self, owners: Tensor, counts: Tensor) -> None:
        """Add the gradients of the current pass to the means of their units.

        Parameters
        ----------
        owners : Tensor
            The unit of each record, int64, shape (n,). Rows of the pass after the first n are left
            out.
        counts : Tensor
            Number of records of each unit over all passes, int64, shape (units,).
        """
        rows = self._by_record()[: len(owners)]
        if self.gathered is None:
            self.gathered = rows.new_zeros((len(counts), rows.shape[1]))
        add_up(rows, owners, counts, self.gathered)

    def _by_record(self) -> Tensor:
        like = self.params[0]
        wide = torch.promote_types(like.dtype, torch.float32)
        parts = [p.grad_sample.flatten(1).to(like.device, wide) for p in self.params]
        rows = torch.cat(parts, dim=1)
        for columns, weight in self._by_group(rows):
            columns.mul_(weight)
        return rows

    def add_noise(self) -> None:
        """Add noise of deviation σ to the sum, which is in units of the clip norm."""
        if self.noise_multiplier and self.summed is not None:
            noise = self._source.normal_like(self.summed)
            self.summed = self.summed + self.noise_multiplier * noise

    def scale_grad(self) -> None:
        """Multiply the sum by C, divide it by b and by the weights, and write it to ``grad``.

        Raises
        ------
        RuntimeError
            No clipped gradients have been added up since the last step.
        """
        if self.summed is None:
            raise RuntimeError("There are no clipped gradients: backward must run before a step.")
        mean, self.summed = self.summed * self.unit / self.expected_batch_size, None
        for columns, weight in self._by_group(mean):
            columns.div_(weight)
        parts = mean.split([p.numel() for p in self.params])
        for p, part in zip(self.params, parts, strict=True):
            p.grad = part.view_as(p).to(p)

    def _by_group(self, tensor: Tensor) -> Iterator[tuple[Tensor, float]]:
        """Yield the columns of each parameter group that has a weight, and the weight."""
        if self._weights is None or set(self._weights) == {1.0}:
            return
        widths = [sum(p.numel() for p in group["params"]) for group in self.param_groups]
        yield from zip(torch.split(tensor, widths, dim=-1), self._weights, strict=True)


def row_norms(rows: Tensor) -> Tensor:
    """Return the L2 norm of each row, shape (n,), in fp64 (see `with_fp64` for its device).

    In fp32, squares overflow for numbers above 1.8e19 and vanish for numbers below 1e-23, and a sum
    of half a million squares is off by 6e-6. In fp64 the norm of any finite fp32 row is finite, and
    its relative error is below 1e-12.

    Parameters
    ----------
    rows : Tensor
        Shape (n, D).
    """
    rows = with_fp64(rows)
    if rows.device.type != "cpu":
        norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
        return norms
    squares = rows.new_zeros(len(rows), dtype=torch.float64)
    for block in torch.split(rows, _COLUMNS, dim=1):
        squares += torch.linalg.vector_norm(block, dim=1, dtype=torch.float64).square_()
    return squares.sqrt_()


def clip_factors(norms: Tensor, clip_norm: float, kind: torch.dtype) -> Tensor:
    """Return the factor for each record that makes its norm at most 1 after rounding.

    Parameters
    ----------
    norms : Tensor
        Norms of the records, fp64, shape (n,).
    clip_norm : float
        C. A record of norm up to C is divided by it, and a longer one by its own norm.
    kind : dtype
        Type of the gradients and of the result.

    Returns
    -------
    Tensor
        ``min(1/C, (1 - 4 eps)/norm)``, shape (n,); 0 for a record whose norm is not finite.
    """
    limits = torch.finfo(kind)
    # The factor of a record with a tiny norm could overflow, so it is limited. The product of
    # factor and gradient cannot overflow, since its norm is at most 1.
    factors = ((1 - _SLACK * limits.eps) / norms).clamp(max=min(1 / clip_norm, limits.max))
    factors = torch.where(norms.isfinite(), factors, 0.0)
    rounded = factors.to(kind)
    # A factor below 1e-38 has few digits left, so rounding up could exceed the limit.
    lower = torch.nextafter(rounded, torch.zeros_like(rounded))
    return torch.where(rounded.to(factors) > factors, lower, rounded)
